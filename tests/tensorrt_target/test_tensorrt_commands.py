"""Commands with target tensorrt on a machine without a GPU: what they do, say and refuse, and the exit code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest
from cli_fixtures import DETECTOR, MEASURED, call, spawn, touched
from tensorrt_models import edited_manifest
from test_cli_errors import HIDE

from qexport.artifact import load_artifact
from qexport.engines import FOLDER, load_engines
from qexport.errors import ExportError

EVERY_TENSORRT = "tensorrt,tensorrt_rtx_bindings"
FROM_TORCH2TRT = "git clone https://github.com/NVIDIA-AI-IOT/torch2trt"


@pytest.fixture
def copied(tensorrt_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the finished run, which may be changed; it is the current folder."""
    shutil.copytree(tensorrt_run, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.engine"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def page(run: Path) -> str:
    return (run / "report.html").read_text()


def test_run_without_a_gpu_succeeds_and_says_that_it_was_not_timed(tensorrt_run: Path) -> None:
    out = (tensorrt_run / "answer.txt").read_text()
    row = next(line for line in out.splitlines() if line.startswith(" tensorrt"))
    assert "ok" in row
    assert "faster" not in row and "slower" not in row
    assert "tensorrt: no NVIDIA GPU here, so its latency was not measured." in out
    assert "then here: qexport report mine --merge FILE..." in " ".join(out.split())
    assert sorted(path.stem for path in (tensorrt_run / "mine/stages").iterdir()) == [
        *("calibrate", "compare.tensorrt", "detect.eager", "detect.reference", "detect.tensorrt"),
        *("evaluate", "export.tensorrt", "inspect"),
    ]


def test_report_of_such_a_run_says_what_it_stands_on_and_shows_the_engines(tensorrt_run: Path) -> None:
    run = tensorrt_run / "mine"
    report = json.loads((run / "report.json").read_bytes())
    (target,) = report["targets"]
    assert report["verdict"]["state"] == "ok"
    assert target["artifact"]["rung"] == target["parity"]["rung"] == "built"
    assert target["artifact"]["reformats"] == 0
    assert len(target["artifact"]["unquantized"]) > 5
    (missing,) = report["missing"]
    assert (missing["stage"], missing["needs_device"]) == ("latency", True)
    assert missing["command"].endswith("--merge FILE...")
    timings = json.loads((run / "timings.json").read_bytes())["targets"][0]
    assert (timings["latency"], timings["memory"]) == (None, None)
    assert [engine["role"] for engine in timings["engines"]] == ["fp16", "fp32", "int8"]
    text = page(run)
    assert "none: built on a CPU" in text
    assert "<b>Evidence</b> built without a GPU: NVIDIA&#39;s own builder made the engine" in text
    assert text.count("<b>Evidence</b>") == 2  # beside the verdict, and above the layers
    assert "was not measured: the device was not here" in text
    assert "Peak memory" not in text
    assert f"{load_engines(run / 'tensorrt').engines[0].size_bytes / 1e6:.2f} MB" in text


def test_run_given_again_runs_no_stage(copied: Path) -> None:
    when = touched(copied / "mine/stages")
    answer = call("run", *DETECTOR, "--target", "tensorrt", "--out", "mine", *MEASURED)
    assert answer.code == 0, answer.err
    assert touched(copied / "mine/stages") == when


def test_stage_commands_on_a_finished_run_only_read(copied: Path) -> None:
    when = touched(copied / "mine")
    for command in ("export", "compare"):
        answer = call(command, "mine", "--target", "tensorrt")
        assert answer.code == 0, answer.err
    assert touched(copied / "mine") == when
    exported = call("export", "mine", "--target", "tensorrt").out
    assert "detector.int8.engine: int8 engine" in exported
    assert "without a GPU: it shows what is built" in exported
    assert "; 0 reformats between them" in exported


def test_bench_without_a_gpu_leaves_with_3_and_says_where_to_measure(copied: Path) -> None:
    answer = call("bench", "mine", "--target", "tensorrt")
    assert answer.code == 3
    words = " ".join(answer.err.split())
    assert "tensorrt: no NVIDIA GPU here, so its latency was not measured." in words
    assert "qexport report mine --merge FILE..." in words
    assert not (copied / "mine/tensorrt/latency.json").exists()


def test_detect_without_a_gpu_leaves_with_3_and_names_the_build_on_the_device(copied: Path) -> None:
    answer = call("detect", "mine/tensorrt", "data/images/test_0000.png")
    assert answer.code == 3
    assert "qexport build tensorrt --precision int8" in " ".join(answer.err.split())


# build


def test_build_makes_the_engines_that_are_asked_for_and_says_what_they_are(copied: Path) -> None:
    before = (copied / "mine/tensorrt/artifact.json").read_bytes()
    answer = call("build", "mine/tensorrt", "--precision", "fp32", "-O", "tensorrt.workspace_mb=256")
    assert answer.code == 0, answer.err
    assert "detector.fp32.engine: fp32 engine" in answer.out
    folder = copied / "mine/tensorrt"
    assert [path.name for path in (folder / FOLDER).glob("*.engine")] == ["detector.fp32.engine"]
    engine = load_engines(folder).of("fp32")
    assert engine is not None
    assert engine.options == {"workspace_mb": "256"}
    assert (folder / "artifact.json").read_bytes() == before  # an engine belongs to no digest


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("-O", "tensorrt.dla_core=0"), 3, "DLA core 0 was asked for; this machine has no DLA core(s)"),
        (("-O", "tensorrt.batch=2"), 2, "batch 2: the detector is exported for one frame at a time"),
        (("-O", "tensorrt.speed=9"), 2, "target tensorrt has no such option"),
        (("--precision", "int4"), 2, "no file of role 'int4'"),
        (("--precision", "calibration-cache"), 2, "calibration.cache is no network; --precision takes int8"),
    ],
)
def test_build_of_what_cannot_be_built_is_refused_and_changes_nothing(
    words: tuple[str, ...], code: int, said: str, copied: Path
) -> None:
    when = touched(copied / "mine/tensorrt")
    answer = call("build", "mine/tensorrt", *words)
    assert answer.code == code, answer.err
    assert said in " ".join(answer.err.split())
    assert "Traceback" not in answer.err
    assert touched(copied / "mine/tensorrt") == when


def test_build_of_a_file_that_was_changed_is_refused(copied: Path) -> None:
    path = copied / "mine/tensorrt/detector.int8.onnx"
    path.write_bytes(path.read_bytes()[:-1000])
    answer = call("build", "mine/tensorrt")
    assert answer.code == 2
    assert "changed after export" in " ".join(answer.err.split())


def test_build_of_a_target_without_engines_says_so(copied: Path) -> None:
    edited_manifest(copied / "mine/tensorrt", lambda made: msgspec.structs.replace(made, target="onnx"))
    answer = call("build", "mine/tensorrt")
    assert answer.code == 2
    assert "target onnx has no engines" in " ".join(answer.err.split())


# What is missing


@pytest.mark.parametrize(
    ("hidden", "words", "said"),
    [
        (
            EVERY_TENSORRT,
            ("export", "mine", "--target", "tensorrt"),
            ("missing tensorrt or tensorrt_rtx_bindings", "pip install 'qexport[all,tensorrt-cpu]'"),
        ),
        (
            EVERY_TENSORRT,
            ("build", "mine/tensorrt"),
            ("TensorRT is not installed", "qexport[tensorrt-cpu]"),
        ),
        ("torch2trt", ("export", "mine", "--target", "torch2trt"), ("missing torch2trt", FROM_TORCH2TRT)),
        (
            "torch2trt",
            ("run", *DETECTOR, "--target", "torch2trt", "--out", "new"),
            ("missing torch2trt", FROM_TORCH2TRT),
        ),
    ],
    ids=["export", "build", "torch2trt export", "torch2trt run"],
)
def test_missing_packages_leave_with_3_and_the_command_that_installs_them(
    hidden: str, words: tuple[str, ...], said: tuple[str, ...], copied: Path, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    when = touched(copied / "mine")
    answer = spawn(*words, cwd=copied, PYTHONPATH=str(tmp_path), HIDDEN_PACKAGES=hidden)
    assert answer.code == 3, answer.err
    assert all(part in " ".join(answer.err.split()) for part in said), answer.err
    assert "Traceback" not in answer.err
    assert touched(copied / "mine") == when
    assert not (copied / "new").exists()


# Options


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("tensorrt.roi=grid", "has no such option; it has workspace_mb"),
        ("tensorrt.nms=fastest", "Invalid enum value 'fastest'"),
        ("tpu.nms=loop", "no target 'tpu'"),
        ("nms=loop", "expected TARGET.NAME=VALUE"),
    ],
)
def test_option_of_a_target_is_refused_before_any_work(option: str, said: str, copied: Path) -> None:
    answer = call("inspect", *DETECTOR, "--out", "new", "-O", option)
    assert answer.code == 2
    assert said in " ".join(answer.err.split())
    assert not (copied / "new").exists()
    record = (copied / "mine/run.json").read_bytes()
    answer = call("export", "mine", "--target", "tensorrt", "-O", option)
    assert answer.code == 2
    assert (copied / "mine/run.json").read_bytes() == record


def test_export_that_fails_leaves_no_artifact_and_its_options_in_the_record(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(quantized: object, encodings: object, folder: Path, *, labels: object, options: object) -> None:
        (folder / "detector.int8.onnx").write_bytes(b"of the new artifact")
        raise ExportError(f"nothing was built with {options}")

    monkeypatch.setattr("qexport.exporters.tensorrt.export", fail)
    answer = call("export", "mine", "--target", "tensorrt", "-O", "tensorrt.weights=int8")
    assert answer.code == 1
    assert "weights='int8'" in answer.err
    record = json.loads((copied / "mine/run.json").read_bytes())
    assert record["settings"]["target_options"] == ["tensorrt.weights=int8"]
    # The files of the old artifact were replaced in part: there is none any more, and a command that makes one.
    answer = call("compare", "mine", "--target", "tensorrt")
    assert answer.code == 2
    assert "qexport export mine --target tensorrt" in " ".join(answer.err.split())


def test_targets_list_what_each_target_can_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = call("targets").out
    row = next(line for line in out.splitlines() if line.startswith(" tensorrt.roi_align"))
    assert row.split()[1] == "auto"
    assert "torch2trt.workspace_mb" in out


def test_exported_artifact_has_the_files_of_the_run(tensorrt_run: Path) -> None:
    artifact, folder = load_artifact(tensorrt_run / "mine/tensorrt")
    assert {file.role for file in artifact.files} == {"int8", "fp16", "fp32", "calibration-cache"}
    complexity = json.loads((folder / "complexity.json").read_bytes())
    sizes = {engine.role: engine.size_bytes for engine in load_engines(folder).engines}
    assert (complexity["artifact_bytes"], complexity["float_bytes"]) == (sizes["int8"], sizes["fp32"])
