"""Engines on a GPU: built, run, profiled and compared with ONNX Runtime. Where there is no GPU, every test skips."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from tensorrt_runner_model import CODES, CONV, FILE_NAME, HEIGHT, WIDTH, make_artifact

from qexport.benchmarks.latency_rows import sum_by_path
from qexport.engines import FOLDER, load_engines
from qexport.errors import ArtifactError, DatasetError
from qexport.runtimes.runner import OUTPUTS
from qexport.runtimes.tensorrt import TensorrtRunner, has_device
from qexport.runtimes.tensorrt_builder import build_from_file
from qexport.runtimes.tensorrt_library import load_library
from qexport.target_options import BuildOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not has_device() or importlib.util.find_spec("cuda") is None,
        reason="needs an NVIDIA GPU, its driver, TensorRT and cuda-bindings; `qexport doctor` says what is missing",
    ),
]
Frame = NDArray[np.uint8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    make_artifact(folder)
    build_from_file(load_library(), folder, {"int8": FILE_NAME}, "int8", BuildOptions())
    return folder


@pytest.fixture(scope="module")
def runner(folder: Path) -> Iterator[TensorrtRunner]:
    with TensorrtRunner(folder) as opened:
        yield opened


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    random = np.random.default_rng(5)
    return [random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8) for _ in range(3)]


def _reference(folder: Path, frame: Frame) -> dict[str, NDArray[np.generic]]:
    session = onnxruntime.InferenceSession(str(folder / FILE_NAME), providers=["CPUExecutionProvider"])
    return dict(zip(OUTPUTS, session.run(list(OUTPUTS), {"frame": frame}), strict=True))


def test_run_gives_what_onnx_runtime_gives(runner: TensorrtRunner, folder: Path, frames: list[Frame]) -> None:
    for frame in frames:
        found, expected = runner.run(frame), _reference(folder, frame)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=1e-3, err_msg=name)


def test_run_launches_a_graph_for_an_engine_without_loops(runner: TensorrtRunner) -> None:
    assert runner.graph_refusal == ""


def test_run_again_leaves_earlier_outputs_as_they_were(runner: TensorrtRunner, frames: list[Frame]) -> None:
    first = runner.run(frames[0])
    kept = {name: value.copy() for name, value in first.items()}
    second = runner.run(frames[1])
    assert not np.array_equal(second["boxes"], kept["boxes"])
    assert all(np.array_equal(value, kept[name]) for name, value in first.items())


def test_run_from_pinned_memory_is_the_same(runner: TensorrtRunner, frames: list[Frame]) -> None:
    expected = runner.run(frames[2])
    runner.input[...] = frames[2]
    found = runner.run(runner.input)
    assert all(np.array_equal(value, found[name]) for name, value in expected.items())


def test_run_of_intermediate_tensors_gives_their_codes(runner: TensorrtRunner, frames: list[Frame]) -> None:
    plain, probed = runner.run(frames[0]), runner.run(frames[0], [CODES])
    planes = frames[0].astype(np.float32).transpose(2, 0, 1)[None] / np.float32(255)
    expected = np.clip(np.rint(planes * 127), -128, 127)
    assert probed[CODES].dtype == np.int8
    assert np.abs(probed[CODES] - expected).max() <= 1
    for name, value in plain.items():
        np.testing.assert_allclose(probed[name], value, atol=1e-3, err_msg=name)


def test_run_of_several_frames_at_once_raises_what_is_taken(
    runner: TensorrtRunner, frames: list[Frame]
) -> None:
    with pytest.raises(DatasetError, match="one frame at a time"):
        runner.run(np.stack(frames))


def test_profile_has_every_layer_and_adds_up_by_module(runner: TensorrtRunner, frames: list[Frame]) -> None:
    runs = runner.profile(frames[0], warmup=2, runs=5)
    assert len(runs) == 5
    owners = runner.kernel_owners()
    for run in runs:
        assert run.whole_ms > 0
        assert {kernel.name for kernel in run.kernels} <= owners.keys()
    costs = sum_by_path(runs[:1], owners)
    total = sum(kernel.duration_ms for kernel in runs[0].kernels)
    assert sum(cost.median_ms for cost in costs.values()) == pytest.approx(total)
    assert costs[CONV].median_ms > 0
    assert runner.between_kernels_ms() >= 0


def test_open_of_an_engine_that_was_cut_off_raises_the_rebuild(tmp_path: Path) -> None:
    make_artifact(tmp_path)
    build_from_file(load_library(), tmp_path, {"int8": FILE_NAME}, "int8", BuildOptions())
    path = tmp_path / FOLDER / load_engines(tmp_path).engines[0].name
    path.write_bytes(path.read_bytes()[:1000])
    with (
        pytest.raises(ArtifactError, match=r"cut off after its build\. Build it here"),
        TensorrtRunner(tmp_path),
    ):
        pass
