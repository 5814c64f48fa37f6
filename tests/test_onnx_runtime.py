"""Running an ONNX artifact: frame in, detections out, a look inside, and every kernel timed."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from conftest import Frame
from numpy.typing import NDArray

from qexport.artifact import Artifact, describe_file, load_artifact, save_artifact
from qexport.errors import ArtifactError, DatasetError
from qexport.exporters.onnx import FILE_NAMES
from qexport.runtimes.onnx import OnnxRunner

ROLES = ("int8", "fp32", "int8-zero-point-0")


@pytest.mark.parametrize("role", ROLES)
def test_infer_returns_detections_best_first_in_pixels_of_the_frame(
    demo_artifact: Path, demo_frames: list[Frame], role: str
) -> None:
    with OnnxRunner(demo_artifact, role=role) as runner:
        found = [runner.infer(frame) for frame in demo_frames]
    assert len(found[0]) > 2
    assert len(found[-1]) == 0  # the blank frame
    for one in found:
        assert (one.boxes.dtype, one.scores.dtype, one.labels.dtype) == (np.float32, np.float32, np.int64)
        assert one.boxes.shape == (len(one), 4)
        assert (np.diff(one.scores) <= 0).all()
        assert ((one.boxes >= 0) & (one.boxes <= [320, 240, 320, 240])).all()
        assert (one.boxes[:, 2:] > one.boxes[:, :2]).all()
        assert ((one.labels >= 1) & (one.labels <= 3)).all()


def test_run_twice_and_with_more_threads_gives_the_same_detections(
    demo_artifact: Path, demo_frames: list[Frame]
) -> None:
    with OnnxRunner(demo_artifact) as one, OnnxRunner(demo_artifact, threads=2) as two:
        first, again = one.run(demo_frames[0]), one.run(demo_frames[0])
        other = two.infer(demo_frames[0])
    assert all(np.array_equal(value, again[name]) for name, value in first.items())
    np.testing.assert_array_equal(one.detections(first).labels, other.labels)
    np.testing.assert_allclose(one.detections(first).boxes, other.boxes, atol=1e-3)


def test_run_pads_its_outputs_with_zeros(
    demo_export: tuple[Artifact, Path], demo_frames: list[Frame]
) -> None:
    artifact, folder = demo_export
    with OnnxRunner(folder) as runner:
        outputs = runner.run(demo_frames[0])
    count = int(outputs["count"])
    assert 0 < count < artifact.detections
    for name in ("boxes", "scores", "labels"):
        assert len(outputs[name]) == artifact.detections
        assert not outputs[name][count:].any()


def test_run_of_intermediate_tensors_returns_them_and_changes_nothing(
    demo_export: tuple[Artifact, Path], demo_frames: list[Frame]
) -> None:
    artifact, folder = demo_export
    names = [site.tensor for site in artifact.sites] + [artifact.float_sites["proposals"]]
    with OnnxRunner(folder) as runner:
        plain = runner.run(demo_frames[0])
        probed = runner.run(demo_frames[0], names)
    assert probed.keys() == {*plain, *names}
    assert all(np.array_equal(value, probed[name]) for name, value in plain.items())
    assert probed[artifact.float_sites["proposals"]].shape == (artifact.proposals, 4)
    for site in artifact.sites:
        assert probed[site.tensor].dtype == np.uint8
        assert probed[site.tensor].size == np.prod(site.shape)


def test_profile_times_every_run_and_the_kernels_fit_into_it(
    demo_artifact: Path, demo_frames: list[Frame]
) -> None:
    with OnnxRunner(demo_artifact) as runner:
        runs = runner.profile(demo_frames[0], warmup=1, runs=3)
    assert len(runs) == 3
    assert len({tuple((kernel.name, kernel.kernel) for kernel in run.kernels) for run in runs}) == 1
    for run in runs:
        assert sum(kernel.kernel == "QLinearConv" for kernel in run.kernels) >= 33
        total = sum(kernel.duration_ms for kernel in run.kernels)
        assert 0 < total <= run.whole_ms * 1.01


WRONG_FRAMES: dict[str, NDArray[np.generic]] = {
    "size": np.zeros((320, 240, 3), np.uint8),
    "channels": np.zeros((240, 320), np.uint8),
    "type": np.zeros((240, 320, 3), np.float32),
}


@pytest.mark.parametrize("frame", WRONG_FRAMES.values(), ids=WRONG_FRAMES.keys())
def test_infer_on_a_frame_of_another_kind_raises_what_is_expected(demo_artifact: Path, frame: Frame) -> None:
    with (
        OnnxRunner(demo_artifact) as runner,
        pytest.raises(DatasetError, match=r"uint8 RGB frames of 240x320 .*given"),
    ):
        runner.infer(frame)


def test_runner_opens_an_artifact_by_its_folder_its_manifest_or_a_file(demo_artifact: Path) -> None:
    for place in (demo_artifact, demo_artifact / "artifact.json", demo_artifact / FILE_NAMES["fp32"]):
        runner = OnnxRunner(place)
        assert runner.path == demo_artifact / FILE_NAMES["int8"]


def test_runner_of_a_role_that_is_not_there_raises_those_that_are(demo_artifact: Path) -> None:
    with pytest.raises(ArtifactError, match=r"'int4'; it has int8, int8-zero-point-0, fp32"):
        OnnxRunner(demo_artifact, role="int4")


def test_runner_of_a_file_that_onnx_runtime_refuses_raises_its_name(
    demo_artifact: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(demo_artifact, tmp_path / "broken")
    (folder / FILE_NAMES["int8"]).write_bytes(b"not a model")
    artifact = msgspec.json.decode((folder / "artifact.json").read_bytes(), type=Artifact)
    files = tuple(describe_file(folder, file.name, file.role) for file in artifact.files)
    save_artifact(msgspec.structs.replace(artifact, files=files), folder)
    assert load_artifact(folder)
    with (
        pytest.raises(ArtifactError, match=rf"{FILE_NAMES['int8']}: ONNX Runtime refuses it"),
        OnnxRunner(folder),
    ):
        pass
