"""The ExecuTorch runner on a small program: outputs, a look inside, times by layer, and files that it refuses."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from executorch_runner_model import (
    CHANNELS,
    DETECTIONS,
    FILE_NAME,
    HEAD,
    KEY,
    SCALE,
    SIDE,
    STEM,
    TENSOR,
    make_artifact,
    make_program,
)
from numpy.typing import NDArray

from qexport.artifact import describe_file, load_artifact, save_artifact
from qexport.errors import ArtifactError, DatasetError, TargetUnavailable
from qexport.plugins.executorch.program_file import ProgramFile
from qexport.runtimes import executorch_library
from qexport.runtimes.executorch import ExecutorchRunner
from qexport.runtimes.executorch_profile import kind_of_kernel, match
from qexport.runtimes.executorch_table import FORWARD, PROPOSALS, TableNode


@pytest.fixture(scope="module")
def program() -> bytes:
    return make_program()


@pytest.fixture(scope="module")
def artifact(program: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("executorch"), program)


@pytest.fixture
def frame() -> NDArray[np.uint8]:
    return np.random.default_rng(3).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def changed(artifact: Path, folder: Path, data: bytes) -> Path:
    """Return a copy of the artifact with another program under the same name, and its digest."""
    shutil.copytree(artifact, folder)
    (folder / FILE_NAME).write_bytes(data)
    made, _ = load_artifact(artifact)
    save_artifact(msgspec.structs.replace(made, files=(describe_file(folder, FILE_NAME, "int8"),)), folder)
    return folder


def test_run_returns_named_outputs_of_the_declared_types(artifact: Path, frame: NDArray[np.uint8]) -> None:
    with ExecutorchRunner(artifact) as runner:
        outputs = runner.run(frame)
    assert {name: (value.shape, str(value.dtype)) for name, value in outputs.items()} == {
        "boxes": ((DETECTIONS, 4), "float32"),
        "scores": ((DETECTIONS,), "float32"),
        "labels": ((DETECTIONS,), "int64"),
        "count": ((), "int64"),
    }


def test_run_again_leaves_the_outputs_of_the_run_before_as_they_were(
    artifact: Path, frame: NDArray[np.uint8]
) -> None:
    with ExecutorchRunner(artifact) as runner:
        first = runner.run(frame)
        kept = first["boxes"].copy()
        second = runner.run(np.zeros_like(frame))
    np.testing.assert_array_equal(first["boxes"], kept)
    assert not np.array_equal(second["boxes"], kept)


def test_run_of_a_frame_that_may_not_be_written_works(artifact: Path, frame: NDArray[np.uint8]) -> None:
    held = frame.copy()
    held.setflags(write=False)
    with ExecutorchRunner(artifact) as runner:
        np.testing.assert_array_equal(runner.run(held)["boxes"], runner.run(frame)["boxes"])


def test_run_with_tensors_returns_them_and_the_same_outputs(artifact: Path, frame: NDArray[np.uint8]) -> None:
    with ExecutorchRunner(artifact) as runner:
        plain, probed = runner.run(frame), runner.run(frame, [TENSOR, PROPOSALS])
    for name, value in plain.items():
        np.testing.assert_array_equal(probed[name], value)
    codes = probed[TENSOR]
    assert codes.shape == (1, SIDE, SIDE, CHANNELS)
    assert codes.dtype == np.int8
    best = np.sort(codes.astype(np.float32).mean((0, 1, 2)) * SCALE)[::-1][:DETECTIONS]
    np.testing.assert_allclose(plain["boxes"][:, 0], best, rtol=1e-5)


def test_run_with_a_tensor_that_is_not_there_is_refused(artifact: Path, frame: NDArray[np.uint8]) -> None:
    with (
        ExecutorchRunner(artifact) as runner,
        pytest.raises(ArtifactError, match="no tensor nothing in the program"),
    ):
        runner.run(frame, ["nothing"])


def test_run_of_an_array_of_another_shape_is_refused(artifact: Path, frame: NDArray[np.uint8]) -> None:
    with (
        ExecutorchRunner(artifact) as runner,
        pytest.raises(DatasetError, match=r"takes uint8 of shape \(16, 16, 3\)"),
    ):
        runner.run(frame[:8])


def test_run_forced_computes_each_layer_from_what_is_given(artifact: Path, frame: NDArray[np.uint8]) -> None:
    proposals = np.zeros((DETECTIONS, 4), np.float32)
    given = {KEY: np.zeros((1, CHANNELS, SIDE, SIDE), np.int8)}
    with ExecutorchRunner(artifact) as runner:
        found = runner.run_forced(frame, given, proposals)
        own = runner.run(frame, [TENSOR])[TENSOR]
    np.testing.assert_array_equal(found[KEY], own.transpose(0, 3, 1, 2))


def test_profile_gives_every_kernel_a_module_path_and_adds_up(
    artifact: Path, frame: NDArray[np.uint8]
) -> None:
    with ExecutorchRunner(artifact) as runner:
        runs = runner.profile(frame, warmup=1, runs=3)
        owners = runner.kernel_owners()
    assert len(runs) == 3
    for run in runs:
        assert {kernel.name for kernel in run.kernels} <= owners.keys()
        assert 0 < sum(kernel.duration_ms for kernel in run.kernels) <= run.whole_ms
    assert set(owners.values()) == {"preprocess", STEM, HEAD}
    kinds = {kernel.kernel.partition(":")[0] for kernel in runs[0].kernels}
    assert {"convolution", "convert", "mean", "aten"} <= kinds


def test_kernel_owners_for_a_baseline_takes_the_rows_of_the_artifact(
    artifact: Path, frame: NDArray[np.uint8]
) -> None:
    with ExecutorchRunner(artifact) as runner:
        runner.profile(frame, warmup=1, runs=1)
        assert set(runner.kernel_owners(["preprocess", HEAD]).values()) == {"preprocess", HEAD}


def test_kernel_set_counts_what_xnnpack_computes(artifact: Path) -> None:
    with ExecutorchRunner(artifact) as runner:
        assert runner.kernel_set.startswith("XNNPACK for ")


def test_another_number_of_threads_while_a_program_is_open_is_refused(artifact: Path) -> None:
    with (
        ExecutorchRunner(artifact, threads=1),
        pytest.raises(TargetUnavailable, match="one pool of threads: 2 asked for"),
        ExecutorchRunner(artifact, threads=2),
    ):
        pytest.fail("was opened")
    with ExecutorchRunner(artifact, threads=2) as runner:
        assert runner.threads == 2


def test_open_without_xnnpack_is_refused(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executorch_library, "XNNPACK", "AnotherBackend")
    with (
        pytest.raises(TargetUnavailable, match="was built without XNNPACK"),
        ExecutorchRunner(artifact),
    ):
        pytest.fail("was opened")


@pytest.mark.parametrize("share", [0.01, 0.3, 0.7])
def test_open_of_a_file_that_is_cut_off_is_refused(
    artifact: Path, program: bytes, tmp_path: Path, share: float
) -> None:
    cut = changed(artifact, tmp_path / "cut", program[: int(share * len(program))])
    with (
        pytest.raises((ArtifactError, TargetUnavailable), match=r"cut off|does not read|cannot prepare"),
        ExecutorchRunner(cut),
    ):
        pytest.fail("was opened")


def test_open_of_a_program_of_another_generation_is_refused(
    artifact: Path, program: bytes, tmp_path: Path
) -> None:
    place = program.index(b"ET12")
    other = changed(artifact, tmp_path / "other", program[:place] + b"ET99" + program[place + 4 :])
    with (
        pytest.raises(ArtifactError, match=r"by an ExecuTorch that \d+\.\d+\.\d+ does not read"),
        ExecutorchRunner(other),
    ):
        pytest.fail("was opened")


def test_open_of_a_program_for_another_backend_is_refused(
    artifact: Path, program: bytes, tmp_path: Path
) -> None:
    renamed = program.replace(b"XnnpackBackend", b"YnnpackBackend")
    assert renamed != program
    other = changed(artifact, tmp_path / "other", renamed)
    with pytest.raises(TargetUnavailable, match="cannot prepare forward"), ExecutorchRunner(other):
        pytest.fail("was opened")


def test_open_of_another_models_program_is_refused(artifact: Path, tmp_path: Path) -> None:
    other = changed(artifact, tmp_path / "other", make_program(detections=2))
    with pytest.raises(ArtifactError, match="another model's file: it takes"), ExecutorchRunner(other):
        pytest.fail("was opened")
    with ExecutorchRunner(artifact, threads=2):
        pass  # what was refused holds no threads


def test_program_file_names_calls_and_values(program: bytes) -> None:
    file = ProgramFile(program)
    assert file.backends() == {"XnnpackBackend"}
    calls = file.calls(FORWARD)
    (weighted,) = (
        (call.subgraph, node)
        for call in calls
        if call.subgraph is not None
        for node in call.subgraph.nodes
        if node.kind == "Conv2d"
    )
    graph, node = weighted
    source, weight, bias = (graph.values[number] for number in node.inputs)
    assert (source.datatype, source.scale) == ("qint8", (2.0,))
    assert (weight.datatype, weight.scale) == ("qcint8", (1 / 4096,) * CHANNELS)
    assert (bias.datatype, graph.values[node.output].scale) == ("qcint32", (SCALE,))


def test_import_of_the_runtime_loads_no_torch() -> None:
    code = (
        "import sys, qexport.runtimes.executorch; print('torch' in sys.modules, 'executorch' in sys.modules)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.split() == ["False", "False"]


NODES = (TableNode("convert", 0), TableNode("add", 0, True), TableNode("reshape", 0), TableNode("linear", 0))


@pytest.mark.parametrize(
    ("names", "matched"),
    [
        (
            ["Convert (NC)", "Add (ND)", "Clamp (NC)", "Static Reshape (NC)", "Fully Connected (NC)"],
            [0, 1, 1, 2, 3],
        ),
        (["Convert (NC)", "Add (ND)", "Fully Connected (NC)"], [0, 1, 3]),
        (["Convert (NC)", "Fully Connected (NC)"], None),
        (["Convert (NC)", "Add (ND)", "Fully Connected (NC)", "Add (ND)"], None),
        ([], None),
    ],
)
def test_match_takes_steps_for_nodes_only_one_by_one(names: list[str], matched: list[int] | None) -> None:
    assert match(NODES, names) == matched


def test_match_takes_a_lookup_for_the_function_between_two_conversions() -> None:
    nodes = [TableNode(kind, 0) for kind in ("convolution", "convert", "hardswish", "convert", "linear")]
    names = ["Convolution (NHWC, QC8)", "Invalid Unary Op", "Fully Connected (NC)"]
    assert match(nodes, names) == [0, 2, 4]


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("convolution: Fully Connected (NC, QS8, QC8W) GEMM", "convolution"),
        ("linear: Fully Connected (NC, QS8, QC8W) GEMM", "linear"),
        ("aten::cat.out", "concatenation"),
        ("aten::slice_copy.Tensor_out", "reformat"),
        ("aten::topk.values", "other"),
        ("subtract: Clamp (NC)", "elementwise"),
    ],
)
def test_kind_of_kernel_is_that_of_the_node(kernel: str, kind: str) -> None:
    assert kind_of_kernel(kernel) == kind
