"""`run` and `calibrate` with a QAT checkpoint: from the file to the report."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import msgspec
import pytest
import torch
from cli_fixtures import DETECTOR, MEASURED, call
from qat_cases import write_modelopt

from qexport import pipeline
from qexport.cli.qat_options import following_run
from qexport.cli.tables import where_ranges_come_from
from qexport.detectors.demo import demo_weights
from qexport.detectors.demo.scenes import write_scenes
from qexport.diagnosing import diagnose
from qexport.encodings import load_encodings, origin_of
from qexport.errors import RunFolderError
from qexport.files import read_json, sha256_file
from qexport.results import AccuracyReport
from qexport.settings import Settings


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with scenes in `data` and a checkpoint."""
    write_scenes(tmp_path / "data", train=2, val=2, test=2)
    write_modelopt(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # tests share the machine
    return tmp_path


def test_run_from_a_qat_checkpoint_shows_where_the_scales_come_from(place: Path) -> None:
    answer = call("run", *DETECTOR, "--qat", "checkpoint.pt", "--target", "onnx", "--out", "mine", *MEASURED)
    assert answer.code == 0, answer.err
    assert "Scales of NVIDIA ModelOpt" in answer.out
    record = json.loads((place / "mine/run.json").read_bytes())
    assert record["weights_sha256"] == sha256_file(place / "checkpoint.pt")
    assert record["settings"]["qat"] == "checkpoint.pt"
    report = json.loads((place / "mine/report.json").read_bytes())
    assert report["calibration"]["origins"] == {"checkpoint": 53, "shared": 6, "calibrated": 21}
    assert report["calibration"]["calibration"]["qat"] == "NVIDIA ModelOpt"
    page = (place / "mine/report.html").read_text()
    assert "Where the scales come from" in page
    assert "backbone.body.conv1.input_quantizer._amax" in page.replace("<wbr>", "")
    again = call("run", *DETECTOR, "--qat", "checkpoint.pt", "--target", "onnx", "--out", "mine", *MEASURED)
    assert again.code == 0, again.err


def test_calibrate_with_a_qat_checkpoint_changes_weights_and_scales_of_a_run(place: Path) -> None:
    assert call("inspect", *DETECTOR, "--out", "mine").code == 0
    answer = call("calibrate", "mine", "--qat", "checkpoint.pt")
    assert answer.code == 0, answer.err
    assert "Scales of NVIDIA ModelOpt" in answer.out
    rows = load_encodings(place / "mine/encodings.json").rows
    assert sum(origin_of(row) == "checkpoint" for row in rows) == 53
    strict = call("calibrate", "mine", "--strict")
    assert strict.code == 2
    assert "--strict, and the checkpoint does not say 21 scales" in strict.err


@pytest.mark.parametrize(
    ("images", "said"), [(0, "every scale is the checkpoint's"), (8, "min-max on 8 images of scenes/train")]
)
def test_ranges_come_from_images_only_where_some_were_watched(images: int, said: str) -> None:
    notes = {
        "observer": "min-max" if images else "none",
        "images": images,
        "dataset": "scenes",
        "split": "train",
    }
    assert where_ranges_come_from(notes) == said


def test_qat_options_that_nobody_would_look_at_are_refused(place: Path) -> None:
    for words in (("--strict",), ("--qat-prepare", "model.py:prepare")):
        answer = call("inspect", *DETECTOR, "--out", "mine", *words)
        assert answer.code == 2
        assert f"{words[0]} is for a QAT checkpoint" in answer.err
    assert not (place / "mine").exists()


def test_checkpoint_that_changed_since_the_run_began_is_refused(place: Path) -> None:
    assert call("inspect", *DETECTOR, "--qat", "checkpoint.pt", "--out", "mine").code == 0
    (place / "checkpoint.pt").write_bytes((place / "checkpoint.pt").read_bytes() + b" ")
    answer = call("calibrate", "mine")
    assert answer.code == 2
    assert "checkpoint.pt: the weights changed" in answer.err


def test_weights_beside_a_checkpoint_are_the_baseline_and_its_own_floats_have_a_row(place: Path) -> None:
    state = dict(torch.load(demo_weights(), weights_only=True))
    state["roi_heads.box_predictor.cls_score.bias"] = torch.tensor([1e4, 0.0, 0.0, 0.0])  # all is background
    torch.save(state, place / "blind.pt")
    words = ("--qat", "checkpoint.pt", "--target", "onnx", *MEASURED)
    assert call("run", *DETECTOR, "--out", "own", *words).code == 0
    answer = call("run", *DETECTOR, "--weights", "blind.pt", "--out", "mine", *words)
    assert answer.code == 0, answer.err
    own, mine = (
        {one.subject: one.voc_map50 for one in accuracy.subjects}
        for accuracy in (accuracy_of(place / "own"), accuracy_of(place / "mine"))
    )
    assert list(mine) == ["eager", "checkpoint", "reference", "onnx"]
    assert mine["eager"] == 0.0
    assert mine["checkpoint"] == own["eager"] > 0.5
    assert mine["reference"] == own["reference"]
    assert {gate.subject for gate in accuracy_of(place / "mine").gates} == {"reference", "onnx"}
    methods = {
        row["method"]: row["voc_map50"]
        for row in json.loads((place / "mine/methods.json").read_bytes())["rows"]
    }
    assert methods == {"fp32": 0.0, "ptq": 0.0}  # of the detector before training, too
    assert "checkpoint" in (place / "mine/report.html").read_text()
    again = call("run", *DETECTOR, "--weights", "blind.pt", "--out", "mine", *words)
    assert again.code == 0, again.err


def test_weights_that_do_not_fit_beside_a_checkpoint_are_refused_before_anything_is_written(
    place: Path,
) -> None:
    torch.save({"a": torch.zeros(1)}, place / "other.pt")
    answer = call(
        "run",
        *DETECTOR,
        "--weights",
        "other.pt",
        "--qat",
        "checkpoint.pt",
        "--target",
        "onnx",
        "--out",
        "mine",
    )
    assert answer.code == 2
    assert "other.pt" in answer.err
    assert not (place / "mine").exists()


def test_fall_that_is_the_training_s_own_names_no_layer(place: Path) -> None:
    words = ("--qat", "checkpoint.pt", "--target", "onnx", *MEASURED)
    assert call("run", *DETECTOR, "--out", "own", *words).code == 0
    work = pipeline.resume(Path("own"))
    accuracy = accuracy_of(place / "own")
    eager, *others = accuracy.subjects
    checkpoint = msgspec.structs.replace(eager, subject="checkpoint")
    before = msgspec.structs.replace(eager, voc_map50=eager.voc_map50 + 0.5)
    failed = tuple(msgspec.structs.replace(gate, passed=False) for gate in accuracy.gates)
    trained = msgspec.structs.replace(accuracy, subjects=(before, checkpoint, *others), gates=failed)
    assert diagnose(work, trained) is None
    assert not (place / "own/diagnosis.json").exists()
    fallen = tuple(msgspec.structs.replace(one, voc_map50=0.1) for one in others)
    quantized = msgspec.structs.replace(trained, subjects=(before, checkpoint, *fallen))
    found = diagnose(work, quantized)
    assert found is not None
    assert found.drop == pytest.approx(eager.voc_map50 - 0.1)


def test_command_that_follows_is_complete() -> None:
    settings = Settings(
        model="my model.py:build",
        weights="weights.pt",
        data="data",
        classes=("a", "b"),
        frame_px=(240, 320),
        proposals=100,
        preprocess="outside",
        keep_float=("rpn.head", "*.conv1"),
    )
    words = shlex.split(following_run(Path("qat.pt"), settings, out="runs/b"))
    assert words == [
        "qexport", "run", "--qat", "qat.pt", "--model", "my model.py:build", "--weights", "weights.pt",
        "--data", "data",
        "--keep-float", "rpn.head", "--keep-float", "*.conv1", "--classes", "a,b", "--preprocess", "outside",
        "--frame", "240x320", "--proposals", "100", "--target", "onnx", "--out", "runs/b",
    ]  # fmt: skip
    answer = call(*words[1:])
    assert answer.code == 2
    assert "No such option" not in answer.err


def accuracy_of(run: Path) -> AccuracyReport:
    return read_json(run / "accuracy.json", AccuracyReport, RunFolderError)
