"""The number of proposals as a knob: what is made, measured and kept for each number."""

from __future__ import annotations

import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from cli_fixtures import call, copied, partial_files, place, spawn, stop_after, touched

from qexport import pipeline
from qexport.artifact import load_artifact
from qexport.benchmarks.proposals import require_numbers
from qexport.encodings import load_encodings
from qexport.errors import QexportError, RunFolderError
from qexport.files import read_json, sha256_json
from qexport.results import AccuracyReport, DetectionsRecord, ParityReport, ProposalCurve, ProposalLatency
from qexport.runtimes.onnx import OnnxRunner
from qexport.work import Work

__all__ = ["copied", "place"]

OWN = 100
"""The demo detector's own number."""
FEW = 2
CURVE = ("evaluate", "mine", "--target", "onnx", "--proposals")


@dataclass(frozen=True, slots=True)
class Priced:
    """A run whose curve was measured at OWN and FEW; tests only read it."""

    folder: Path
    work: Work
    curve: ProposalCurve
    latency: ProposalLatency


@pytest.fixture(scope="module")
def priced(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Priced:
    folder = tmp_path_factory.mktemp("priced")
    shutil.copytree(place, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # the run's data set is named relative to it
        work = pipeline.resume(Path("mine"))
        curve, latency = pipeline.price_proposals(work, "onnx", [FEW], runs=3, warmup=1)
    assert latency is not None
    return Priced(folder, work, curve, latency)


def test_curve_has_the_run_s_own_number_and_those_asked_for_most_first(priced: Priced) -> None:
    assert [point.proposals for point in priced.curve.points] == [OWN, FEW]
    own, few = priced.curve.points
    assert priced.curve.own_proposals == OWN
    assert own.artifact_sha256 == priced.curve.artifact_sha256
    assert own.voc_change_interval is None
    assert own.coco_change_interval is None
    assert few.voc_change_interval is not None
    assert few.macs < own.macs


def test_own_point_is_what_evaluate_says_of_the_target(priced: Priced) -> None:
    report = read_json(priced.folder / "mine/accuracy.json", AccuracyReport, RunFolderError)
    target = next(subject for subject in report.subjects if subject.subject == "onnx")
    own = priced.curve.points[0]
    assert (own.voc_map50, own.coco_map) == (target.voc_map50, target.coco_map)
    assert own.voc_map50_interval == target.voc_map50_interval


def test_too_few_proposals_cost_map_by_more_than_the_noise(priced: Priced) -> None:
    own, few = priced.curve.points
    assert few.voc_map50 < own.voc_map50
    assert few.voc_change_interval is not None
    assert few.voc_change_interval.high < 0


def test_variant_is_made_of_the_run_s_own_encodings_and_holds_int8_alone(priced: Priced) -> None:
    artifact, folder = load_artifact(priced.folder / f"mine/onnx/proposals/{FEW}")
    whole, _ = load_artifact(priced.folder / "mine/onnx")
    encodings = load_encodings(priced.folder / "mine/encodings.json")
    assert artifact.proposals == FEW
    assert artifact.encodings_sha256 == sha256_json(encodings) == priced.curve.encodings_sha256
    assert artifact.detector_sha256 == whole.detector_sha256 == encodings.detector_sha256
    assert [file.role for file in artifact.files] == ["int8"]
    assert [path.name for path in folder.glob("*.onnx")] == [artifact.file("int8").name]
    assert priced.curve.points[1].int8_bytes == artifact.file("int8").size_bytes


def test_variant_is_compared_layer_by_layer_with_its_own_shapes(priced: Priced) -> None:
    parity = read_json(priced.folder / f"mine/onnx/proposals/{FEW}/parity.json", ParityReport, RunFolderError)
    head = next(row for row in parity.layers if row.path == "roi_heads.box_head.fc6")
    assert head.shape[0] == FEW
    assert all(gate.passed for gate in parity.gates)
    gates = priced.curve.points[1].gates
    assert [gate.measured for gate in gates] == [gate.measured for gate in parity.gates]
    assert {gate.subject for gate in gates} == {f"onnx, {FEW} proposals"}


def test_variant_detects_what_its_artifact_detects_and_no_more_than_its_proposals_allow(
    priced: Priced,
) -> None:
    subject = f"onnx-{FEW}-proposals"
    path = priced.folder / f"mine/detections/{subject}.json"
    images = read_json(path, DetectionsRecord, RunFolderError).subjects[subject]
    folder = priced.folder / f"mine/onnx/proposals/{FEW}"
    classes = len(load_artifact(folder)[0].labels) - 1
    assert all(len(image.scores) <= FEW * classes for image in images)
    assert any(image.scores for image in images)
    with pytest.MonkeyPatch.context() as patch, OnnxRunner(folder) as runner:
        patch.chdir(priced.folder)
        frame = next(priced.work.subject.frames(list(priced.work.subject.evaluation.samples)))
        assert tuple(float(score) for score in runner.infer(frame).scores) == images[0].scores


def test_latency_is_of_the_curve_s_artifacts_and_not_in_the_curve(priced: Priced) -> None:
    timed = [(point.proposals, point.artifact_sha256) for point in priced.latency.points]
    assert timed == [(point.proposals, point.artifact_sha256) for point in priced.curve.points]
    assert [point.stats.runs for point in priced.latency.points] == [3, 3]
    assert all(point.stats.p50_ms > 0 for point in priced.latency.points)
    assert "_ms" not in (priced.folder / "mine/onnx/proposals.json").read_text()


def test_curve_asked_for_again_runs_nothing(priced: Priced, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(priced.folder)
    before = touched(Path("mine"))
    curve, latency = pipeline.price_proposals(
        pipeline.resume(Path("mine")), "onnx", [OWN, FEW], runs=3, warmup=1
    )
    assert (curve, latency) == (priced.curve, priced.latency)
    assert touched(Path("mine")) == before


def test_curve_with_another_number_makes_that_one_alone(
    priced: Priced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(priced.folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    before = touched(Path("mine"))
    answer = call(*CURVE, f"{FEW},{FEW + 1}", "--runs", "2")
    assert answer.code == 0, answer.err
    after = touched(Path("mine"))
    changed = {name for name in after if after[name] != before.get(name)}
    redone = {"proposals.json", "proposals_latency.json", "evaluate.onnx-proposals", "bench.onnx-proposals"}
    assert {name for name in changed if f"{FEW + 1}" not in name} == {
        *(f"onnx/{name}" for name in redone if name.endswith("json")),
        *(f"stages/{name}.json" for name in redone if not name.endswith("json")),
    }
    curve = read_json(Path("mine/onnx/proposals.json"), ProposalCurve, RunFolderError)
    assert [point.proposals for point in curve.points] == [OWN, FEW + 1, FEW]
    assert curve.points[2] == priced.curve.points[1]
    rows = [line for line in answer.out.splitlines() if " ok " in line]
    assert [int(row.split()[0]) for row in rows] == [OWN, FEW + 1, FEW]
    assert f"more than the noise of {curve.images} images" in answer.out


def test_curve_without_the_target_s_device_is_not_timed(
    priced: Priced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(priced.folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qexport.proposals.has_device", lambda target: False)  # a CPU is always there
    answer = call(*CURVE, f"{FEW}")
    assert answer.code == 0, answer.err
    assert "latency was not measured" in answer.out
    row = next(line for line in answer.out.splitlines() if line.split()[:1] == [str(FEW)])
    assert row.split()[-4:] == ["-", "-", "\N{EN DASH}", "ok"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("300,many", "'many' is no whole number"),
        ("12.5", "'12.5' is no whole number"),
        ("", "'' is no whole number"),
        ("50,", "'' is no whole number"),
        ("9" * 5000, "is no whole number"),
        ("50,0", "0 proposals"),
        ("-5", "-5 proposals"),
        ("50,20,50", "50 proposals are asked for more than once"),
        ("999999999", "RPN keeps"),
    ],
)
def test_numbers_that_make_no_curve_are_refused(text: str, said: str, copied: Path) -> None:
    before = touched(copied / "mine")
    answer = call(*CURVE, text)
    assert answer.code == 2
    assert said in answer.err
    assert touched(copied / "mine") == before


def test_number_above_what_the_rpn_keeps_is_refused_with_the_limit(copied: Path) -> None:
    work = pipeline.resume(Path("mine"))
    most = sum(work.subject.static.rpn.proposals.keep_per_level)  # type: ignore[union-attr, arg-type]
    assert f"from 1 to {most}." in call(*CURVE, f"{most + 1}").err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--proposals", "50", "--max-drop", "0.1"), "--max-drop is for"),
        (("--runs", "5"), "are for --proposals"),
        (("--threads", "2"), "are for --proposals"),
    ],
)
def test_option_that_nobody_would_look_at_is_refused(words: tuple[str, ...], said: str, copied: Path) -> None:
    answer = call("evaluate", "mine", *words)
    assert answer.code == 2
    assert said in answer.err


def test_curve_of_a_target_that_was_not_exported_names_the_command(copied: Path) -> None:
    shutil.rmtree("mine/onnx")
    answer = call(*CURVE, "50")
    assert answer.code == 2
    assert "qexport export mine --target onnx" in answer.err
    assert not Path("mine/onnx").exists()


def test_require_numbers_without_any_is_refused() -> None:
    with pytest.raises(QexportError, match="no number of proposals"):
        require_numbers([])


@pytest.mark.slow
def test_curve_interrupted_goes_on_where_it_stopped(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    exported = f"export.onnx-{FEW}-proposals"
    answer = stop_after(exported, signal.SIGINT, *CURVE, f"{FEW}", cwd=tmp_path, delay_s=0.1)
    assert answer.code == 130, answer.err
    assert "Traceback" not in answer.err
    assert partial_files(tmp_path) == []
    assert not (tmp_path / "mine/onnx/proposals.json").exists()
    done = touched(tmp_path / "mine")[f"stages/{exported}.json"]
    again = spawn(*CURVE, f"{FEW}", cwd=tmp_path)
    assert again.code == 0, again.err
    assert touched(tmp_path / "mine")[f"stages/{exported}.json"] == done
