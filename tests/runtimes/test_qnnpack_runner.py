"""The QNNPACK runner: outputs, inner tensors, forced layers, times, torch left as it was, and what it refuses."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from conftest import Frame
from torch import Tensor

from qexport.artifact import Artifact, describe_file, load_artifact, save_artifact
from qexport.detectors.static import StaticDetector
from qexport.encodings import Encodings
from qexport.errors import ArtifactError, DatasetError, TargetUnavailable
from qexport.exporters.qnnpack import FILE_NAMES, export
from qexport.quantization.reference import QuantizedDetector, quantize
from qexport.runtimes.qnnpack import RUNNER, QnnpackRunner, has_device
from qexport.runtimes.qnnpack_library import engine_set, quiet
from qexport.runtimes.qnnpack_profiler import kind_of_operator
from qexport.runtimes.runner import OUTPUTS, ForcedRunner, ProfilingRunner
from qexport.sites import codes_of
from qexport.target_options import TargetOptions

LABELS = ("__background__", "a", "b", "c")


@pytest.fixture(scope="module")
def quantized(small_static: StaticDetector, small_encodings: Encodings) -> QuantizedDetector:
    return quantize(small_static, small_encodings)


@pytest.fixture(scope="module")
def folder(
    quantized: QuantizedDetector, small_encodings: Encodings, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    place = tmp_path_factory.mktemp("qnnpack")
    export(quantized, small_encodings, place, labels=LABELS, options=TargetOptions())
    return place


@pytest.fixture
def spoilt(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "spoilt"))


def replace_file(folder: Path, data: bytes) -> Path:
    """Put another int8 file into an artifact, with digests that say so."""
    artifact, _ = load_artifact(folder)
    (folder / FILE_NAMES["int8"]).write_bytes(data)
    files = tuple(describe_file(folder, name, role) for role, name in FILE_NAMES.items())
    save_artifact(msgspec.structs.replace(artifact, files=files), folder)
    return folder


def change_artifact(folder: Path, **changes: Any) -> Path:
    save_artifact(msgspec.structs.replace(load_artifact(folder)[0], **changes), folder)
    return folder


def saved(function: Callable[..., Any], path: Path) -> bytes:
    with quiet():
        torch.jit.save(torch.jit.script(function), str(path))
    return path.read_bytes()


# Outputs


@pytest.mark.parametrize("role", ["int8", "fp32"])
def test_run_gives_the_declared_outputs(role: str, folder: Path, small_frames: list[Frame]) -> None:
    with RUNNER(folder, role=role) as runner:
        outputs = runner.run(runner.input_of(small_frames[0]))
        rows = runner.artifact.detections
        assert {name: (array.shape, array.dtype.name) for name, array in outputs.items()} == {
            "boxes": ((rows, 4), "float32"),
            "scores": ((rows,), "float32"),
            "labels": ((rows,), "int64"),
            "count": ((), "int64"),
        }
        assert len(runner.infer(small_frames[0])) == int(outputs["count"]) > 0


def test_runner_of_the_target_forces_layers_and_times_them_and_says_its_engine(folder: Path) -> None:
    assert RUNNER is QnnpackRunner
    assert issubclass(RUNNER, ForcedRunner)
    assert issubclass(RUNNER, ProfilingRunner)
    assert has_device()
    with RUNNER(folder) as runner:
        assert runner.kernel_set == f"qnnpack engine, torch {torch.__version__}"


def test_run_on_a_frame_that_may_not_be_written_is_the_same(folder: Path, small_frames: list[Frame]) -> None:
    locked = small_frames[0].copy()
    locked.flags.writeable = False
    with RUNNER(folder) as runner:
        first, second = runner.run(small_frames[0]), runner.run(locked)
    assert all(np.array_equal(first[name], second[name]) for name in OUTPUTS)


def test_run_with_two_threads_gives_the_same_outputs(folder: Path, small_frames: list[Frame]) -> None:
    with RUNNER(folder, threads=1) as runner:
        one = runner.run(small_frames[0])
    with RUNNER(folder, threads=2) as runner:
        two = runner.run(small_frames[0])
    assert all(np.array_equal(one[name], two[name]) for name in OUTPUTS)


# torch as it was


def test_run_leaves_engine_threads_and_gradients_as_they_were(
    folder: Path, small_frames: list[Frame]
) -> None:
    state = (torch.backends.quantized.engine, torch.get_num_threads(), torch.is_grad_enabled())
    with engine_set("fbgemm"), RUNNER(folder, threads=2) as runner:
        assert torch.get_num_threads() == 2
        runner.run(small_frames[0])
        assert torch.backends.quantized.engine == "fbgemm"
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    assert (torch.backends.quantized.engine, torch.get_num_threads(), torch.is_grad_enabled()) == state


def test_run_under_another_engine_of_the_process_gives_qnnpacks_numbers(
    folder: Path, small_frames: list[Frame]
) -> None:
    with RUNNER(folder) as runner:
        tensors = [site.tensor for site in runner.artifact.sites]
        wanted = runner.run(small_frames[0], tensors)
    with engine_set("fbgemm"), RUNNER(folder) as runner:
        found = runner.run(small_frames[0], tensors)
    assert all(np.array_equal(wanted[name], found[name]) for name in wanted)


# Inner tensors and forced layers


def test_run_with_tensors_gives_codes_and_the_same_outputs(
    folder: Path, quantized: QuantizedDetector, small_frames: list[Frame]
) -> None:
    with RUNNER(folder) as runner:
        sites = runner.artifact.sites
        plain = runner.run(small_frames[0])
        found = runner.run(small_frames[0], [site.tensor for site in sites])
    assert all(np.array_equal(plain[name], found[name]) for name in OUTPUTS)
    assert {site.key for site in sites} == quantized.quantize_nodes.keys()
    for site in sites:
        assert found[site.tensor].dtype == np.uint8
        assert found[site.tensor].shape == site.shape


def test_run_unknown_tensor_raises_error_that_names_it(folder: Path, small_frames: list[Frame]) -> None:
    with RUNNER(folder) as runner, pytest.raises(ArtifactError, match="no tensor nowhere in the file"):
        runner.run(small_frames[0], ["nowhere"])


def test_run_forced_on_its_own_codes_gives_them_again(folder: Path, small_frames: list[Frame]) -> None:
    with RUNNER(folder) as runner:
        sites, boxes = runner.artifact.sites, runner.artifact.float_sites["proposals"]
        found = runner.run(small_frames[0], [*(site.tensor for site in sites), boxes])
        codes = {site.key: codes_of(site, found[site.tensor]) for site in sites}
        forced = runner.run_forced(small_frames[0], codes, found[boxes].astype(np.float32))
    assert list(forced) == [site.key for site in sites]
    assert all(np.array_equal(forced[key], codes[key]) for key in codes)


def test_run_forced_on_other_codes_computes_from_those_alone(folder: Path, small_frames: list[Frame]) -> None:
    with RUNNER(folder) as runner:
        sites, boxes = runner.artifact.sites, runner.artifact.float_sites["proposals"]
        found = runner.run(small_frames[0], [*(site.tensor for site in sites), boxes])
        codes = {site.key: codes_of(site, found[site.tensor]) for site in sites}
        changed = next(site.key for site in sites if site.key.startswith("backbone.0@0"))
        reads = next(site.key for site in sites if site.key.startswith("backbone.3@0"))
        other = codes | {changed: np.zeros_like(codes[changed])}
        forced = runner.run_forced(small_frames[0], other, found[boxes].astype(np.float32))
    assert np.array_equal(forced[changed], codes[changed])  # it reads the image, which is as it was
    assert {key for key in codes if not np.array_equal(forced[key], codes[key])} == {reads}


# Times


def test_profile_gives_every_operator_to_its_module(folder: Path, small_frames: list[Frame]) -> None:
    with RUNNER(folder) as runner:
        runs = runner.profile(small_frames[0], warmup=1, runs=3)
        owners = runner.kernel_owners()
        between = runner.between_kernels_ms()
    names = [kernel.name for kernel in runs[0].kernels]
    assert len(set(names)) == len(names)
    assert all([kernel.name for kernel in run.kernels] == names for run in runs)
    assert set(names) <= owners.keys()
    assert {"preprocess", "backbone.0", "rpn.proposals", "roi_heads.box_roi_pool"} <= set(owners.values())
    assert not [path for path in owners.values() if "__" in path]
    kinds = {owners[kernel.name]: kind_of_operator(kernel.kernel) for kernel in runs[0].kernels}
    assert kinds["backbone.0"] == "convolution"
    assert kinds["roi_heads.box_head.fc6"] == "linear"
    assert 0 < between < 0.1
    for run in runs:
        assert 0.5 * run.whole_ms < sum(kernel.duration_ms for kernel in run.kernels) < run.whole_ms


def test_profile_of_the_baseline_gives_activations_to_the_layers_before_them(
    folder: Path, small_frames: list[Frame]
) -> None:
    with RUNNER(folder, role="fp32") as runner:
        (run,) = runner.profile(small_frames[0], warmup=1, runs=1)
        owners = runner.kernel_owners(["backbone.0"])
    relus = {owners[kernel.name] for kernel in run.kernels if kernel.kernel == "aten::relu"}
    assert "backbone.0" in relus
    assert "backbone.2" not in relus


def test_profile_says_nothing_on_standard_error(folder: Path, small_frames: list[Frame]) -> None:
    """In a fresh process, where torch says once what it has to say."""
    code = (
        "import sys, numpy; from pathlib import Path; from qexport.runtimes.qnnpack import RUNNER\n"
        "with RUNNER(Path(sys.argv[1])) as runner:\n"
        f"    frame = numpy.zeros({small_frames[0].shape}, numpy.uint8)\n"
        "    runner.run(frame); runner.profile(frame, warmup=0, runs=1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


# What is refused


def test_infer_frame_of_another_size_or_type_is_refused(folder: Path, small_frames: list[Frame]) -> None:
    frame = small_frames[0]
    with RUNNER(folder) as runner:
        with pytest.raises(DatasetError, match="uint8 RGB frames of 160x224"):
            runner.infer(frame[:, :-1])
        with pytest.raises(DatasetError, match=r"takes uint8 of shape \(160, 224, 3\), given int8"):
            runner.run(frame.astype(np.int8))


@pytest.mark.parametrize(
    ("engine", "error", "message"),
    [
        ("none", TargetUnavailable, r"engine 'none'; torch .* here has .*Install a CPU build"),
        ("onednn", ArtifactError, r"'onednn', which rounds otherwise than 'qnnpack'"),
    ],
)
def test_open_artifact_for_an_engine_that_is_not_there_or_another_is_refused(
    engine: str, error: type[Exception], message: str, spoilt: Path
) -> None:
    forms = load_artifact(spoilt)[0].forms | {"engine": engine}
    with pytest.raises(error, match=message):
        RUNNER(change_artifact(spoilt, forms=forms)).open()


@pytest.mark.parametrize("part", [0, 4, 1000, -1000], ids=["empty", "head", "short", "tail"])
def test_open_file_cut_off_raises_artifact_error(part: int, spoilt: Path) -> None:
    data = (spoilt / FILE_NAMES["int8"]).read_bytes()
    with pytest.raises(ArtifactError, match=r"no TorchScript that torch .* reads: .*export again"):
        RUNNER(replace_file(spoilt, data[:part])).open()


def test_open_file_changed_after_export_raises_artifact_error(spoilt: Path) -> None:
    path = spoilt / FILE_NAMES["int8"]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match="changed after export"):
        RUNNER(spoilt)


class Other(torch.nn.Module):
    """A model of one output, without parts."""

    def forward(self, frame: Tensor) -> Tensor:
        """Return the frame's sum."""
        return frame.sum()


class OtherParts(torch.nn.Module):
    """A model of parts, others than a detector's."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Other()

    def forward(self, frame: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the frame's sum four times."""
        found = self.part(frame)
        return found, found, found, found


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Other(), r"another model's file: it has aten::sum beside its parts"),
        (OtherParts(), r"tensors of the artifact are not in it, first preprocess"),
    ],
)
def test_open_file_of_another_model_raises_artifact_error(
    model: torch.nn.Module, message: str, spoilt: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=message):
        RUNNER(replace_file(spoilt, saved(model, tmp_path / "other.pt"))).open()


def test_run_file_of_other_detections_raises_artifact_error(spoilt: Path, small_frames: list[Frame]) -> None:
    artifact: Artifact = load_artifact(spoilt)[0]
    change_artifact(spoilt, detections=artifact.detections + 1)
    with (
        RUNNER(spoilt) as runner,
        pytest.raises(ArtifactError, match=r"another model's file: it gives boxes"),
    ):
        runner.run(small_frames[0])


OWN_OPERATOR = """
import sys, warnings, torch
warnings.simplefilter("ignore")
library = torch.library.Library("qexport_elsewhere", "DEF")
library.define("own(Tensor x) -> Tensor")
library.impl("own", lambda x: x, "CPU")
traced = torch.jit.trace(lambda x: torch.ops.qexport_elsewhere.own(x), torch.ones(1))
torch.jit.save(traced, sys.argv[1])
"""


def test_open_file_with_an_operator_that_is_not_loaded_names_its_library(
    spoilt: Path, tmp_path: Path
) -> None:
    subprocess.run([sys.executable, "-c", OWN_OPERATOR, tmp_path / "own.pt"], check=True, timeout=120)
    data = (tmp_path / "own.pt").read_bytes()
    with pytest.raises(
        TargetUnavailable, match=r"has operator qexport_elsewhere::own, which is not in this process: import"
    ):
        RUNNER(replace_file(spoilt, data)).open()


def test_file_loaded_without_torchvision_is_refused_by_torch_and_its_absence_is_named(
    folder: Path, tmp_path: Path
) -> None:
    """In a process where torchvision cannot be imported."""
    absent = tmp_path / "torchvision"
    absent.mkdir()
    (absent / "__init__.py").write_text("raise ImportError('made unavailable')\n")
    code = (
        "import sys; from pathlib import Path; from qexport.errors import TargetUnavailable\n"
        "from qexport.runtimes.qnnpack import RUNNER\n"
        "try: RUNNER(Path(sys.argv[1])).open()\n"
        "except TargetUnavailable as error: print(error.exit_code, error)\n"
        "import torch\n"
        f"try: torch.jit.load(str(Path(sys.argv[1]) / {FILE_NAMES['int8']!r}))\n"
        "except RuntimeError as error: print('Unknown builtin op: torchvision::' in str(error))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, folder],
        capture_output=True, text=True, timeout=120, check=False,
        env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    assert lines[0].startswith("3 torchvision does not load here: made unavailable")
    assert "pip install torchvision" in lines[0]
    assert lines[1] == "True"
