from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnx import NodeProto, helper
from torch import Tensor, nn

from qexport.artifact import describe_file, load_artifact, save_artifact
from qexport.benchmarks import eager_profile
from qexport.benchmarks.eager_profile import ModuleClock, assign_rows, image_of, torch_threads
from qexport.benchmarks.latency import (
    accounted_share,
    count_steps,
    interleave,
    measure_latency,
    summarise,
)
from qexport.benchmarks.latency_rows import PathCost, build_rows, kind_of_path, sum_by_path
from qexport.benchmarks.machine import describe_machine, processor_name, temperature_c
from qexport.calibration.calibrator import calibrate
from qexport.detectors.demo.scenes import draw_scene
from qexport.detectors.load import LoadedDetector, load_detector
from qexport.detectors.static import make_static
from qexport.errors import QexportError
from qexport.exporters import onnx as onnx_exporter
from qexport.layers import Kind, Layer, stage_of
from qexport.quantization.inspection import inspect_layers
from qexport.quantization.reference import quantize
from qexport.results import LatencyProfile
from qexport.runtimes import onnx_kernels
from qexport.runtimes.onnx import OnnxRunner
from qexport.runtimes.runner import KernelTime, ProfiledRun
from qexport.target_options import TargetOptions

WARMUP, RUNS = 1, 3


def _layer(order: int, path: str, kind: Kind) -> Layer:
    return Layer(
        order=order,
        path=path,
        call=0,
        op="",
        kind=kind,
        stage=stage_of(path),
        shape=(1,),
        parameters=0,
        macs=0,
        quantized=True,
        reason="",
    )


# Statistics and turns


def test_summarise_known_times_gives_their_statistics() -> None:
    stats = summarise([float(number) for number in range(1, 102)])
    assert (stats.runs, stats.mean_ms, stats.min_ms) == (101, 51.0, 1.0)
    assert (stats.p50_ms, stats.p90_ms, stats.p99_ms) == (51.0, 91.0, 100.0)
    assert stats.std_ms == pytest.approx(29.1547, abs=1e-4)


def test_interleave_three_contenders_rotates_the_first_of_each_round() -> None:
    order: list[str] = []
    rounds: list[int] = []

    def runs_as(name: str) -> Callable[[], object]:
        return lambda: order.append(name)

    contenders = {name: runs_as(name) for name in "abc"}
    times = interleave(contenders, warmup=1, runs=3, on_run=lambda: rounds.append(len(order)))
    assert "".join(order) == "abcbcacababc"
    assert rounds == [3, 6, 9, 12]
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}


# Kernels to module paths


def _node(name: str, inputs: list[str], outputs: list[str], op: str = "") -> NodeProto:
    return helper.make_node(op or name.partition("/")[2].partition("_")[0], inputs, outputs, name=name)


def test_assign_paths_renamed_and_inserted_nodes_find_their_module() -> None:
    original = [
        _node("body.conv1/Conv", ["x", "w"], ["c"]),
        _node("rpn.head.conv.0.0@3/Conv", ["c", "w2"], ["d"]),
        _node("rpn.proposals/Gather_13", ["d"], ["e"]),
    ]
    optimized = [
        _node("Transpose", ["x"], ["x_nhwc"], "Transpose"),
        _node("body.conv1/Conv_token_102", ["x_nhwc", "w"], ["c"], "QLinearConv"),
        _node("ReorderOutput_token_5", ["c"], ["c1"], "ReorderOutput"),
        _node("Transpose_token_7", ["c1"], ["c2"], "Transpose"),
        _node("rpn.head.conv.0.0@3/Conv/output_nchwc", ["c2", "w2"], ["d"], "Conv"),
        _node("rpn.proposals/Gather_13/GatherSliceToSplitFusion", ["d"], ["s", "t"], "Split"),
        _node("Squeeze_token_36", ["t"], ["e"], "Squeeze"),
        _node("Lost", ["nobody"], ["unused"], "Identity"),
    ]
    assert onnx_kernels.assign_paths(original, optimized) == {
        "Transpose": "body.conv1",  # its input is the graph's, so it is its consumer's
        "body.conv1/Conv_token_102": "body.conv1",
        "ReorderOutput_token_5": "body.conv1",
        "Transpose_token_7": "body.conv1",
        "rpn.head.conv.0.0@3/Conv/output_nchwc": "rpn.head.conv.0.0",
        "rpn.proposals/Gather_13/GatherSliceToSplitFusion": "rpn.proposals",
        "Squeeze_token_36": "rpn.proposals",
        "Lost": onnx_kernels.NOWHERE,
    }


def test_assign_paths_fused_activation_goes_to_the_layer_it_follows() -> None:
    original = [
        _node("conv/Conv", ["x", "w"], ["c"]),
        _node("relu/Relu", ["c"], ["r"]),
        _node("fc/Gemm", ["r", "w2"], ["f"]),
        _node("head/Relu", ["f"], ["out"]),
    ]
    fused = [
        _node("relu/Relu/output_nchwc", ["x", "w"], ["r"], "Conv"),
        _node("fused fc/Gemm", ["r", "w2"], ["out"], "FusedGemm"),
    ]
    assert list(onnx_kernels.assign_paths(original, fused).values()) == ["conv", "fc"]


@pytest.mark.parametrize(
    ("rows", "expected"), [(None, "relu"), (["conv", "relu"], "relu"), (["conv"], "conv")]
)
def test_assign_paths_activation_of_its_own_follows_the_artifact_rows(
    rows: list[str] | None, expected: str
) -> None:
    nodes = [_node("conv/Conv", ["x", "w"], ["c"]), _node("relu/Relu", ["c"], ["r"])]
    assert onnx_kernels.assign_paths(nodes, nodes, rows)["relu/Relu"] == expected


def test_sum_by_path_several_calls_and_runs_gives_the_median_of_sums() -> None:
    owners = {"a@0/Conv": "a", "a@1/Conv": "a", "a/T": "a", "b/Add": "b"}

    def run(first: float, second: float) -> ProfiledRun:
        kernels = (
            KernelTime("a@0/Conv", "QLinearConv", first),
            KernelTime("a@1/Conv", "QLinearConv", second),
            KernelTime("a/T", "Transpose", 1.0),
            KernelTime("b/Add", "QLinearAdd", 0.5),
        )
        return ProfiledRun(10.0, kernels)

    runs = [run(1.0, 2.0), run(3.0, 4.0), run(100.0, 100.0)]
    costs = sum_by_path(runs, owners)
    assert costs["a"].median_ms == 8.0
    assert costs["a"].kernels == pytest.approx({"QLinearConv": 70.0, "Transpose": 1.0})
    assert costs["b"].median_ms == 0.5
    assert accounted_share(runs[:2], between_ms=0.0) == pytest.approx((0.45 + 0.85) / 2)
    assert accounted_share(runs[:1], between_ms=0.25) == pytest.approx(4.5 / 9)
    assert accounted_share(runs[1:2], between_ms=1.0) == 1.0


@pytest.mark.parametrize(
    ("path", "kernels", "expected"),
    [
        ("backbone.body.conv1", {"Transpose": 9.0, "QLinearConv": 1.0}, "convolution"),
        ("backbone.fpn", {"Resize": 2.0, "QLinearAdd": 1.0, "Transpose": 5.0}, "resize"),
        ("rpn.proposals", {"TopK": 1.0, "NonMaxSuppression": 2.0}, "nms"),
        ("rpn.proposals", {"Cast": 1.0, "Squeeze": 1.0, "TopK": 1.5}, "reformat"),
        ("roi_heads.box_roi_pool", {"QLinearMatMul": 9.0}, "roi_align"),
        ("nothing.known", {}, "other"),
    ],
)
def test_kind_of_path_layer_then_costliest_kernel_decides(
    path: str, kernels: dict[str, float], expected: Kind
) -> None:
    layers = [
        _layer(0, "backbone.body.conv1", "convolution"),
        _layer(1, "backbone.fpn", "resize"),
        _layer(2, "backbone.fpn", "elementwise"),
    ]
    assert kind_of_path(path, stage_of(path), kernels, layers, onnx_kernels.kind_of_kernel) == expected


def test_build_rows_path_of_a_baseline_alone_has_a_row_without_a_reduction() -> None:
    paths = {"backbone.body.conv1": PathCost(2.0, {"QLinearConv": 2.0})}
    layers = [_layer(0, "backbone.body.conv1", "convolution")]
    rows = build_rows(
        paths,
        layers,
        onnx_kernels.kind_of_kernel,
        eager={"backbone.body.conv1": 8.0, "detector": 0.3},
        fp32=None,
    )
    assert [(row.order, row.path, row.reduction_percent) for row in rows] == [
        (0, "backbone.body.conv1", 75.0),
        (1, "detector", None),
    ]
    assert (rows[1].artifact_ms, rows[1].eager_ms, rows[1].kernels) == (0.0, 0.3, ())
    assert rows[0].fp32_ms is None


def test_time_between_kernels_this_runtime_is_far_below_a_millisecond() -> None:
    assert 0.0 < onnx_kernels.time_between_kernels_ms(1) < 0.5


# Eager modules


class _Block(nn.Module):
    """A residual block as torchvision writes it: one in-place ReLU for two places, an in-place add."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)  # type: ignore[no-any-return]


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transform = nn.Identity()
        self.body = nn.Sequential(_Block(), _Block())
        self.head = nn.Sequential(nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.transform(x)))  # type: ignore[no-any-return]


NET_ROWS = (
    "preprocess",
    *(f"body.{block}{part}" for block in (0, 1) for part in (".conv1", ".conv2", "")),
    "head.0",
)


def test_assign_rows_fused_modules_go_to_the_layer_that_made_their_input() -> None:
    net = _Net().eval()
    row_of = assign_rows(net, lambda: net(torch.ones(1, 4, 2, 2)), NET_ROWS)
    for block in ("body.0", "body.1"):
        assert row_of[f"{block}.bn1", 0] == f"{block}.conv1"
        assert row_of[f"{block}.relu", 0] == f"{block}.conv1"
        assert row_of[f"{block}.bn2", 0] == f"{block}.conv2"
        assert row_of[f"{block}.relu", 1] == block  # after the add, which is the block's own code
        assert row_of[block, 0] == block
    assert row_of["body", 0] == "body.1"
    assert row_of["head.1", 0] == row_of["head.2", 0] == row_of["head", 0] == "head.0"
    assert row_of["transform", 0] == "preprocess"
    assert row_of["", 0] == "detector"


class _Forgetful(nn.Module):
    """Drops what its convolution makes, so that the next tensor may lie at the same address."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(1, 1, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(50):
            self.conv(x)
            x = self.relu(torch.ones(1, 1, 1, 1))
        return x


def test_assign_rows_tensor_at_the_address_of_another_is_not_taken_for_it() -> None:
    net = nn.Sequential(_Forgetful())
    row_of = assign_rows(net, lambda: net(torch.ones(1, 1, 1, 1)), ("0", "0.conv"))
    assert {row for (path, _), row in row_of.items() if path == "0.relu"} == {"0"}


class _Clock:
    """Time that passes only where a module says so, in seconds."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class _Taking(nn.Module):
    """Takes `before`, then its children's time, then `after`."""

    def __init__(self, clock: _Clock, before: float, after: float, *children: nn.Module) -> None:
        super().__init__()
        self.clock, self.before, self.after = clock, before, after
        self.inner = nn.ModuleList(children)

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += self.before
        for child in self.inner:
            x = child(child(x))
        self.clock.now += self.after
        return x


def test_module_clock_nested_modules_gives_own_times_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock()
    monkeypatch.setattr(eager_profile, "perf_counter", clock)
    leaf, other = _Taking(clock, 1, 2), _Taking(clock, 10, 0)
    net = _Taking(clock, 100, 200, _Taking(clock, 0, 1000, leaf, other))
    with ModuleClock(net) as timed:
        first = timed.time(lambda: net(torch.ones(1)))
        second = timed.time(lambda: net(torch.ones(1)))
    own_s = {call: own_ms / 1000 for call, own_ms in first.items()}
    assert own_s == {
        **{("inner.0.inner.0", call): 3.0 for call in range(4)},
        **{("inner.0.inner.1", call): 10.0 for call in range(4)},
        **{("inner.0", call): 1000.0 for call in range(2)},
        ("", 0): 300.0,
    }
    assert second == first
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_module_clock_calls_are_those_that_have_rows() -> None:
    net = _Net().eval()
    image = torch.ones(1, 4, 8, 8)
    with ModuleClock(net) as clock:
        own = clock.time(lambda: net(image))
    assert own.keys() == assign_rows(net, lambda: net(image), NET_ROWS).keys()
    assert ("body.0.relu", 1) in own


def test_module_clock_module_that_fails_leaves_no_hooks() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(RuntimeError), ModuleClock(net) as clock:
        clock.time(lambda: net(torch.ones(3, 3)))
    assert not net[0]._forward_hooks


def test_image_of_frame_is_channels_first_in_0_to_1() -> None:
    frame = np.zeros((2, 3, 3), dtype=np.uint8)
    frame[1, 2] = (255, 51, 0)
    image = image_of(frame)
    assert image.shape == (3, 2, 3)
    assert image[:, 1, 2].tolist() == pytest.approx([1.0, 0.2, 0.0])


def test_torch_threads_error_inside_restores_the_number() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="inside"), torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ValueError("inside")
    assert torch.get_num_threads() == before


# The machine


def test_describe_machine_this_host_names_processor_and_versions() -> None:
    machine = describe_machine()
    assert machine.measured_on == "host"
    assert machine.processor
    assert machine.cores >= 1
    assert machine.versions["torch"] == torch.__version__.partition("+")[0]
    assert "python" in machine.versions


def test_processor_name_arm_board_is_its_model() -> None:
    assert processor_name({"processor": "0", "Model": "Raspberry Pi 4 Model B"}) == "Raspberry Pi 4 Model B"


def test_temperature_c_zones_gives_the_hottest_that_can_be_read(tmp_path: Path) -> None:
    assert temperature_c(tmp_path) is None
    for number, text in enumerate(("41200\n", "56000\n", "broken\n")):
        zone = tmp_path / f"thermal_zone{number}"
        zone.mkdir()
        (zone / "temp").write_text(text)
    assert temperature_c(tmp_path) == 56.0


# A detector, whole


@dataclass(frozen=True, slots=True)
class Measured:
    profile: LatencyProfile
    steps: int
    folder: Path
    detector: LoadedDetector
    layers: tuple[Layer, ...]
    frame: NDArray[np.uint8]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("latency") / "onnx"
    detector = load_detector("demo", None)
    frame = draw_scene(7, 0, 0).pixels
    static = make_static(detector.module, frame_px=(frame.shape[0], frame.shape[1]))
    encodings = calibrate(static, [frame])
    onnx_exporter.export(
        quantize(static, encodings), encodings, folder, labels=detector.labels, options=TargetOptions()
    )
    layers = inspect_layers(static)
    frame.setflags(write=False)  # as a frame from a decoder may be
    steps: list[None] = []
    profile = measure_latency(
        artifact=folder,
        runner=OnnxRunner,
        detector=detector,
        frame=frame,
        layers=layers,
        warmup=WARMUP,
        runs=RUNS,
        threads=1,
        min_accounted=0.0,
        on_run=lambda: steps.append(None),
    )
    return Measured(profile, len(steps), folder, detector, layers, frame)


def test_measure_latency_demo_detector_has_every_contender_and_step(measured: Measured) -> None:
    profile = measured.profile
    artifact, _ = load_artifact(measured.folder)
    assert set(profile.whole) == {"artifact", "fp32", "eager"}
    assert all(stats.runs == RUNS for stats in profile.whole.values())
    assert profile.fps == 1000 / profile.whole["artifact"].p50_ms
    assert profile.artifact_sha256 == artifact.sha256
    assert measured.steps == count_steps(artifact, measured.folder, eager=True, warmup=WARMUP, runs=RUNS)
    assert 0.0 < profile.accounted_share <= 1.0
    assert [(gate.name, gate.passed) for gate in profile.gates] == [("latency accounted", True)]


def test_measure_latency_demo_detector_gives_each_module_one_row(measured: Measured) -> None:
    rows = {row.path: row for row in measured.profile.layers}
    modules = {path for path, _ in measured.detector.module.named_modules()}
    replaced = {"preprocess", "rpn.proposals", "roi_heads.detections", "detector"}
    assert len(rows) == len(measured.profile.layers)
    assert rows.keys() - modules <= replaced
    weighted = {layer.path for layer in measured.layers if layer.kind in ("convolution", "linear")}
    assert weighted
    for path in weighted:
        row = rows[path]
        assert row.kind in ("convolution", "linear")
        assert row.eager_ms and row.fp32_ms  # nothing of the baselines went to another row
    # What is fused in the artifact has no row in the baselines either.
    fused = {path for path in rows if rows[path].artifact_ms == 0.0}
    assert fused <= {"detector"}
    kinds = [type(measured.detector.module.get_submodule(path)) for path in rows.keys() & modules]
    assert nn.BatchNorm2d not in kinds
    assert nn.ReLU not in kinds


def test_measure_latency_without_detector_has_no_eager_figures(measured: Measured) -> None:
    profile = measure_latency(
        artifact=measured.folder,
        runner=OnnxRunner,
        detector=None,
        frame=measured.frame,
        layers=measured.layers,
        warmup=0,
        runs=1,
        threads=2,
        min_accounted=1.01,
    )
    assert set(profile.whole) == {"artifact", "fp32"}
    assert all(row.eager_ms is None and row.reduction_percent is None for row in profile.layers)
    assert not profile.gates[0].passed
    assert profile.threads == 2


def test_measure_latency_artifact_without_fp32_measures_the_rest(measured: Measured, tmp_path: Path) -> None:
    artifact, folder = load_artifact(measured.folder)
    name = artifact.file("int8").name
    (tmp_path / name).write_bytes((folder / name).read_bytes())
    alone = type(artifact)(
        **{field: getattr(artifact, field) for field in artifact.__struct_fields__ if field != "files"},
        files=(describe_file(tmp_path, name, "int8"),),
    )
    save_artifact(alone, tmp_path)
    profile = measure_latency(
        artifact=tmp_path,
        runner=OnnxRunner,
        detector=None,
        frame=measured.frame,
        layers=measured.layers,
        warmup=0,
        runs=1,
        threads=1,
        min_accounted=0.0,
    )
    assert set(profile.whole) == {"artifact"}
    assert all(row.fp32_ms is None for row in profile.layers)


def test_measure_latency_no_runs_raises_error_that_says_what_works(tmp_path: Path) -> None:
    with pytest.raises(QexportError, match="expected at least 1 run"):
        measure_latency(
            artifact=tmp_path,
            runner=OnnxRunner,
            detector=None,
            frame=np.zeros((1, 1, 3), np.uint8),
            layers=(),
            warmup=0,
            runs=0,
            threads=1,
            min_accounted=0.9,
        )
