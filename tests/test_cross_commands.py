"""`compare --cross` and `--method` on the command line: what a run of two targets makes, resumes and refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest
from cli_fixtures import DETECTOR, MEASURED, call, edit_json, touched

pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed (the extra tflite)")

from qexport.artifact import Artifact
from qexport.cross_results import CrossReport
from qexport.detectors.demo.scenes import write_scenes
from qexport.errors import ArtifactError, RunFolderError
from qexport.files import read_json, sha256_file, sha256_json, write_json
from qexport.method_results import MethodsLatency, MethodsReport

TARGETS = ("--target", "onnx", "--target", "tflite")
RUN = ("run", *DETECTOR, *TARGETS, "--out", "mine", "--method", "dynamic", *MEASURED)


@pytest.fixture(scope="module")
def two_targets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with scenes in `data` and a finished run of two targets in `mine`; not to be changed."""
    folder = tmp_path_factory.mktemp("two-targets")
    write_scenes(folder / "data", train=2, val=2, test=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "200")
        patch.setattr("os.cpu_count", lambda: 1)  # tests share the machine
        answer = call(*RUN)
    assert answer.code == 0, answer.err
    return folder


@pytest.fixture
def desk(two_targets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of it, which may be changed; it is the current folder."""
    shutil.copytree(two_targets, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    return tmp_path


def test_run_of_two_targets_compares_them_and_the_methods(two_targets: Path) -> None:
    run = two_targets / "mine"
    cross = read_json(run / "cross.json", CrossReport, RunFolderError)
    assert [target.name for target in cross.targets] == ["reference", "onnx", "tflite"]
    artifacts = [
        read_json(run / name / "artifact.json", Artifact, ArtifactError) for name in ("onnx", "tflite")
    ]
    assert [target.artifact_sha256 for target in cross.targets[1:]] == [one.sha256 for one in artifacts]
    assert cross.images == 2
    assert cross.encodings_sha256 == artifacts[0].encodings_sha256
    methods = read_json(run / "methods.json", MethodsReport, RunFolderError)
    assert [row.method for row in methods.rows] == ["fp32", "dynamic"]
    latency = read_json(run / "methods_latency.json", MethodsLatency, RunFolderError)
    assert set(latency.whole) == {"fp32", "dynamic"}
    page = (run / "report.html").read_text()
    for section in ("targets", "cross", "methods"):
        assert f'id="{section}"' in page
    assert "_ms" not in (run / "methods.json").read_text() + (run / "cross.json").read_text()


def test_compare_cross_of_a_finished_run_only_reads(desk: Path) -> None:
    when = touched(desk / "mine")
    answer = call("compare", "mine", "--cross")
    assert answer.code == 0, answer.err
    assert "onnx and tflite" in answer.out
    assert touched(desk / "mine") == when


def test_compare_cross_with_other_images_measures_again(desk: Path) -> None:
    answer = call("compare", "mine", "--cross", *TARGETS, "--parity-images", "1")
    assert answer.code == 0, answer.err
    assert read_json(desk / "mine" / "cross.json", CrossReport, RunFolderError).images == 1


def test_export_again_drops_the_comparison(desk: Path) -> None:
    (desk / "mine" / "tflite" / "artifact.json").unlink()
    answer = call("export", "mine", "--target", "tflite")
    assert answer.code == 0, answer.err
    assert not (desk / "mine" / "cross.json").exists()


def test_compare_cross_of_a_failing_pair_leaves_with_1(desk: Path) -> None:
    def fail(report: dict[str, list[dict[str, object]]]) -> None:
        report["gates"][0]["passed"] = False

    edit_json(desk / "mine" / "cross.json", fail)
    record = desk / "mine" / "stages" / "cross.json"
    digest = sha256_file(desk / "mine" / "cross.json")
    edit_json(record, lambda stage: stage["outputs"].update({"cross.json": digest}))
    answer = call("compare", "mine", "--cross")
    assert answer.code == 1
    assert "onnx and tflite: targets differ" in answer.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--cross", "--target", "onnx"), "only onnx was given or exported"),
        (("--cross", "--target", "onnx", "--target", "onnx"), "--target onnx is given more than once"),
        (("--cross", "--target", "onnx", "--target", "gameboy"), "no target 'gameboy'"),
        (("--cross", "--target", "onnx", "--target", "torch2trt"), "qexport export mine --target torch2trt"),
        (("--cross", "--tolerance", "0"), "the limits between two targets are fixed"),
        (("--target", "onnx", "--target", "tflite"), "--target is given 2 times"),
        ((), "--target is missing: which target of the run mine"),
    ],
)
def test_compare_with_targets_that_do_not_fit_is_refused(
    desk: Path, words: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qexport.target.Target.missing", lambda *_: ())
    when = touched(desk / "mine")
    answer = call("compare", "mine", *words)
    assert answer.code == 2
    assert said in answer.err
    assert "Traceback" not in answer.err
    assert touched(desk / "mine") == when


def test_compare_cross_of_a_run_with_one_artifact_is_refused(desk: Path) -> None:
    shutil.rmtree(desk / "mine" / "tflite")
    answer = call("compare", "mine", "--cross")
    assert answer.code == 2
    assert "takes two or more, and only onnx was given or exported" in answer.err


def test_compare_cross_with_an_artifact_of_other_encodings_is_refused(desk: Path) -> None:
    manifest = desk / "mine" / "tflite" / "artifact.json"
    artifact = read_json(manifest, Artifact, ArtifactError)
    write_json(manifest, msgspec.structs.replace(artifact, encodings_sha256=sha256_json("others")))
    answer = call("compare", "mine", "--cross")
    assert answer.code == 2
    assert "made of other encodings than" in answer.err
    assert "qexport export mine --target tflite" in answer.err


def test_compare_cross_where_a_device_is_refuses_its_target_plainly(
    desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qexport.target.Target.missing", lambda *_: ())
    monkeypatch.setattr("qexport.runtimes.tensorrt.has_device", lambda: True)
    answer = call("compare", "mine", "--cross", "--target", "onnx", "--target", "tensorrt")
    assert answer.code == 3
    assert "tensorrt: inside an engine on a GPU no layer can be given its inputs" in answer.err


def test_evaluate_with_other_methods_replaces_the_table_and_its_times(desk: Path) -> None:
    answer = call("evaluate", "mine", "--method", "activations")
    assert answer.code == 0, answer.err
    methods = read_json(desk / "mine" / "methods.json", MethodsReport, RunFolderError)
    assert [row.method for row in methods.rows] == ["fp32", "activations"]
    assert not (desk / "mine" / "methods_latency.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--method", "ternary"), "no method 'ternary'; there is dynamic, activations"),
        (("--method", "dynamic", "--method", "dynamic"), "--method dynamic is given more than once"),
        (("--method", "dynamic", "--proposals", "10"), "--method and --proposals are two tables"),
        (("--method", "dynamic", "--threads", "2"), "--runs and --threads are for --proposals"),
        (("--runs", "2"), "--runs for --method too"),
    ],
)
def test_evaluate_with_methods_that_do_not_fit_is_refused(
    desk: Path, words: tuple[str, ...], said: str
) -> None:
    when = touched(desk / "mine")
    answer = call("evaluate", "mine", *words)
    assert answer.code == 2
    assert said in answer.err
    assert touched(desk / "mine") == when


def test_run_with_a_method_that_there_is_not_is_refused_before_any_work(desk: Path) -> None:
    answer = call("run", *DETECTOR, "--target", "onnx", "--out", "other", "--method", "ternary")
    assert answer.code == 2
    assert "no method 'ternary'" in answer.err
    assert not Path("other").exists()
