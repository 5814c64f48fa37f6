"""The TFLite runner: outputs, intermediate tensors, and what it refuses."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed: pip install 'qexport[tflite]'")

from tflite_runner_model import CODES, DETECTIONS, FILE_NAMES, SIDE, make_artifact, make_network

from qexport.errors import ArtifactError, DatasetError, TargetUnavailable
from qexport.plugins.tflite.writer import ModelWriter
from qexport.runtimes import tflite_library
from qexport.runtimes.tflite import RUNNER, BuiltinTfliteRunner, TfliteRunner, has_device
from qexport.runtimes.tflite_library import load_library, open_interpreter

Frame = NDArray[np.uint8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(
        tmp_path_factory.mktemp("tflite"), int8=make_network(), fp32=make_network(quantized=False)
    )


@pytest.fixture
def frame() -> Frame:
    return np.random.default_rng(3).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def _replaced(folder: Path, data: bytes) -> Path:
    """Return the artifact with this as its int8 file, and digests that say so."""
    return make_artifact(folder, int8=data)


# Outputs


@pytest.mark.parametrize("runner", [TfliteRunner, BuiltinTfliteRunner])
@pytest.mark.parametrize("role", ["int8", "fp32"])
def test_run_network_gives_the_declared_outputs(
    runner: type[TfliteRunner], role: str, folder: Path, frame: Frame
) -> None:
    with runner(folder, role=role) as opened:
        outputs = opened.run(opened.input_of(frame))
        assert {name: (array.shape, array.dtype.name) for name, array in outputs.items()} == {
            "boxes": ((DETECTIONS, 4), "float32"),
            "scores": ((DETECTIONS,), "float32"),
            "labels": ((DETECTIONS,), "int64"),
            "count": ((), "int64"),
        }
        assert len(opened.infer(frame)) == int(outputs["count"]) > 0
        assert set(outputs["labels"]) <= {1, 2, 3}


def test_runner_of_the_target_uses_xnnpack_and_needs_no_device(folder: Path) -> None:
    assert RUNNER is TfliteRunner
    assert has_device()
    with TfliteRunner(folder) as runner:
        assert runner.kernels == "xnnpack"
        assert runner.kernel_set.startswith("XNNPACK for ")
    with BuiltinTfliteRunner(folder) as runner:
        assert runner.kernels == "builtin"
        assert runner.kernel_set.startswith("builtin kernels, ai-edge-litert")


@pytest.mark.parametrize("runner", [TfliteRunner, BuiltinTfliteRunner])
def test_run_two_threads_gives_the_same_outputs(
    runner: type[TfliteRunner], folder: Path, frame: Frame
) -> None:
    with runner(folder, threads=1) as one, runner(folder, threads=2) as two:
        reference, actual = one.run(frame), two.run(frame)
    assert {name: array.tobytes() for name, array in reference.items()} == {
        name: array.tobytes() for name, array in actual.items()
    }


# Intermediate tensors


@pytest.mark.parametrize("runner", [TfliteRunner, BuiltinTfliteRunner])
def test_run_with_tensors_gives_codes_and_the_same_outputs(
    runner: type[TfliteRunner], folder: Path, frame: Frame
) -> None:
    with runner(folder) as opened:
        plain = opened.run(frame)
        found = opened.run(frame, [CODES, "preprocess/CAST"])
    assert list(found) == ["boxes", "scores", "labels", "count", CODES, "preprocess/CAST"]
    assert all(np.array_equal(plain[name], found[name]) for name in plain)
    assert found[CODES].dtype == np.int8
    assert found[CODES].any()
    np.testing.assert_array_equal(found["preprocess/CAST"], frame.astype(np.float32))


def test_run_with_other_outputs_while_tensors_are_kept_is_refused(
    folder: Path, frame: Frame, tmp_path: Path
) -> None:
    other = tmp_path / "other.tflite"
    other.write_bytes(make_network(seed=1))
    with TfliteRunner(folder) as runner:
        runner._kept = open_interpreter(load_library(), other, threads=1, keep=True)
        with pytest.raises(TargetUnavailable, match=r"computes other .* while it keeps intermediate tensors"):
            runner.run(frame, [CODES])


def test_run_unknown_tensor_raises_error_that_names_it(folder: Path, frame: Frame) -> None:
    with TfliteRunner(folder) as runner, pytest.raises(ArtifactError, match="no tensor nowhere/output in"):
        runner.run(frame, ["nowhere/output"])


# What is refused


def test_infer_frame_of_another_size_or_type_is_refused(folder: Path, frame: Frame) -> None:
    with TfliteRunner(folder) as runner:
        with pytest.raises(DatasetError, match="16x16"):
            runner.infer(np.zeros((SIDE, SIDE + 1, 3), np.uint8))
        with pytest.raises(DatasetError, match="float32"):
            runner.infer(frame.astype(np.float32))  # type: ignore[arg-type]
        with pytest.raises(DatasetError, match=r"takes uint8 of shape \(16, 16, 3\), given int8"):
            runner.run(frame.astype(np.int8))


@pytest.mark.parametrize("part", [0, 4, 100, -100], ids=["empty", "head", "short", "tail"])
def test_open_file_cut_off_raises_artifact_error(part: int, tmp_path: Path) -> None:
    runner = TfliteRunner(_replaced(tmp_path, make_network()[:part]))
    with pytest.raises(ArtifactError, match=r"no TFLite model|refuses it"):
        runner.open()


def test_open_file_cut_off_after_export_raises_artifact_error(tmp_path: Path) -> None:
    _replaced(tmp_path, make_network())
    path = tmp_path / FILE_NAMES["int8"]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match="changed after export"):
        TfliteRunner(tmp_path)


def test_open_file_of_another_model_raises_artifact_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"another model's file: it takes uint8 of \(8, 8, 3\)"):
        TfliteRunner(_replaced(tmp_path, make_network(side=8))).open()
    with pytest.raises(
        ArtifactError, match=r"expected outputs boxes, .* for 4 detections, found boxes \(5, 4\)"
    ):
        TfliteRunner(_replaced(tmp_path, make_network(detections=5))).open()


def test_open_model_without_the_outputs_raises_artifact_error(tmp_path: Path) -> None:
    writer = ModelWriter()
    source = writer.tensor((SIDE, SIDE, 3), "uint8", name="frame")
    result = writer.tensor((SIDE, SIDE, 3), "float32", name="detector/CAST")
    writer.operator("CAST", [source], [result], options="CastOptions")
    data = writer.finish([source], [result], description="test")
    with pytest.raises(ArtifactError, match="expected outputs boxes, scores, labels, count"):
        TfliteRunner(_replaced(tmp_path, data)).open()


@pytest.mark.parametrize(
    ("code", "version", "expected"),
    [("NEG", 9, "operator NEG of version 9"), (None, 1, "operator number 1000")],
)
def test_open_operator_newer_than_the_runtime_names_it(
    code: str | None, version: int, expected: str, tmp_path: Path
) -> None:
    writer = ModelWriter()
    source = writer.tensor((1,), "float32", name="frame")
    result = writer.tensor((1,), "float32", name="detector/NEW")
    writer.operator("NEG", [source], [result], options="NegOptions", version=version)
    if code is None:
        writer._codes = {(1000, version): 0}
    data = writer.finish([source], [result], description="test")
    with pytest.raises(ArtifactError, match=rf"is too old for it: it does not know {expected}\. .*--upgrade"):
        TfliteRunner(_replaced(tmp_path, data)).open()


def test_open_without_any_runtime_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tflite_library, "package_versions", lambda *names: {})
    with pytest.raises(
        TargetUnavailable, match=r"neither .* is installed\. Install: pip install 'qexport\[tflite"
    ):
        TfliteRunner(folder).open()


def test_open_runtime_that_does_not_load_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only = {"tflite-runtime": "2.14.0"}
    monkeypatch.setattr(tflite_library, "package_versions", lambda *names: only)
    monkeypatch.setitem(tflite_library._MODULES, "tflite-runtime", "nowhere_to_be_found.interpreter")
    with pytest.raises(
        TargetUnavailable, match=r"tflite-runtime 2\.14\.0 does not load here .*nowhere_to_be_found"
    ):
        TfliteRunner(folder).open()


def test_open_says_nothing_on_standard_error(
    folder: Path, frame: Frame, capfd: pytest.CaptureFixture[str]
) -> None:
    with TfliteRunner(folder) as runner:
        runner.run(frame, [CODES])
        runner.profile(frame, warmup=0, runs=1)
    assert capfd.readouterr().err == ""


def test_quiet_block_that_fails_shows_what_was_kept_back(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), tflite_library.quiet():
        os.write(2, b"why it failed")
        raise ZeroDivisionError
    assert "why it failed" in capfd.readouterr().err


def test_library_is_a_frozen_value() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_library().version = "0"  # type: ignore[misc]
