from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from torch import nn

from qexport.benchmarks.eager_profile import infer_eager
from qexport.benchmarks.latency import summarise
from qexport.benchmarks.machine import describe_machine
from qexport.benchmarks.peers import Peer, export_torchvision, quantize_recipe, ratio_of_medians
from qexport.cross_results import CrossPair, CrossReport, CrossSum
from qexport.detectors.demo.scenes import HEIGHT, WIDTH, draw_scene
from qexport.detectors.load import load_detector
from qexport.errors import ExportError
from qexport.layers import Kind, stage_of
from qexport.results import Gate, LayerLatency


@dataclass(frozen=True, slots=True)
class Exported:
    detector: nn.Module
    float_model: Path
    quantized: Path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("peers")
    detector = load_detector("demo", None).module
    float_model = export_torchvision(detector, (HEIGHT, WIDTH), folder / "torchvision.onnx")
    frames = (draw_scene(5, 0, index).pixels for index in range(2))
    return Exported(detector, float_model, quantize_recipe(float_model, frames, folder / "quantized.onnx"))


def test_ratio_of_medians_known_times_gives_ratio_within_its_interval() -> None:
    generator = np.random.default_rng(1)
    actual = generator.normal(10.0, 0.5, 40)
    ratio = ratio_of_medians(list(3 * actual + generator.normal(0, 0.1, 40)), list(actual))
    assert ratio.value == pytest.approx(3.0, rel=0.02)
    assert ratio.low < ratio.value < ratio.high
    assert ratio.high - ratio.low < 0.1  # what the two have in common, the spread of a round, cancels out


def test_ratio_of_medians_same_times_is_one_without_spread() -> None:
    ratio = ratio_of_medians([1.0, 5.0, 3.0], [1.0, 5.0, 3.0])
    assert (ratio.value, ratio.low, ratio.high) == (1.0, 1.0, 1.0)


def test_export_torchvision_demo_detector_detects_as_eager_does(exported: Exported) -> None:
    frame = draw_scene(5, 1, 0).pixels
    found = Peer(exported.float_model, threads=1).infer(frame)
    eager = infer_eager(exported.detector, frame)
    assert len(found) > 0
    assert np.array_equal(found.labels, eager["labels"].numpy())
    np.testing.assert_allclose(found.boxes, eager["boxes"].numpy(), atol=0.01)
    np.testing.assert_allclose(found.scores, eager["scores"].numpy(), atol=1e-4)


def test_quantize_recipe_demo_detector_has_every_convolution_between_quantizers(exported: Exported) -> None:
    nodes = onnx.load(exported.quantized).graph.node
    maker = {output: node for node in nodes for output in node.output}
    weighted = [node for node in nodes if node.op_type in ("Conv", "Gemm")]
    assert len(weighted) == sum(
        node.op_type in ("Conv", "Gemm") for node in onnx.load(exported.float_model).graph.node
    )
    for node in weighted:
        assert [maker[value].op_type for value in node.input[:2]] == ["DequantizeLinear"] * 2
    assert len(Peer(exported.quantized, threads=1).infer(draw_scene(5, 1, 0).pixels)) > 0


def test_export_torchvision_detector_that_fails_raises_export_error(tmp_path: Path) -> None:
    class Broken(nn.Module):
        def forward(self, images: object) -> object:
            raise RuntimeError("no such layer")

    with pytest.raises(ExportError, match="no such layer"):
        export_torchvision(Broken(), (8, 8), tmp_path / "broken.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def bench_report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "tools")
    return importlib.import_module("bench_report")


def _row(order: int, path: str, kind: Kind, artifact_ms: float) -> LayerLatency:
    return LayerLatency(
        order=order,
        path=path,
        stage=stage_of(path),
        kind=kind,
        kernels=("QLinearConv",),
        artifact_ms=artifact_ms,
        eager_ms=4 * artifact_ms,
    )


def _crossed() -> CrossReport:
    """Two targets of which 2 of a million values of convolutions differ, and 50 of adds."""
    convolutions = CrossSum(values=5_000_000, differing=10, max_step=1)
    adds = CrossSum(values=1_000_000, differing=50, max_step=1)
    pair = CrossPair(
        first="onnx",
        second="tflite",
        layers=(),
        kinds={"convolution": convolutions, "elementwise": adds},
        promised=CrossSum(values=6_000_000, differing=60, max_step=1),
        parts_at="backbone.body.conv1",
    )
    return CrossReport(encodings_sha256="0" * 64, images=8, split="test", targets=(), pairs=(pair,), gates=())


def test_bench_page_shows_ratios_largest_rows_and_parity(bench_report: ModuleType) -> None:
    times = {
        name: [base * spread for spread in (0.9, 1.0, 1.1)]
        for name, base in zip(
            ("eager", "torchvision ONNX", "quantize_static", "qexport"), (40.0, 30.0, 20.0, 10.0), strict=True
        )
    }
    ours = times[bench_report.OURS]
    turns = bench_report.Turns(
        threads=2,
        stats={name: summarise(values) for name, values in times.items()},
        faster_than_eager={
            name: ratio_of_medians(times[bench_report.EAGER], values) for name, values in times.items()
        },
        ours_faster_than={name: ratio_of_medians(values, ours) for name, values in times.items()},
        times_ms=times,
        profiles={
            "qexport": bench_report.Profiled(
                layers=(
                    _row(0, "backbone.body.conv1", "convolution", 6.0),
                    _row(1, "rpn.proposals", "nms", 0.5),
                    _row(2, "roi_heads.box_roi_pool", "roi_align", 2.5),
                    _row(3, "roi_heads.box_head.fc6", "linear", 1.0),
                ),
                other_kernels_ms={"Gather": 2.0, "TopK": 0.2},
                accounted_share=0.955,
            )
        },
    )
    bench = bench_report.Bench(
        detector="resnet18-fpn, demo",
        frame_px=(240, 320),
        dataset="scenes",
        frames=8,
        artifact_sha256="0" * 64,
        parity=(
            Gate(
                name="layer parity", passed=False, measured="6 steps", limit="at most 1 step", subject="onnx"
            ),
        ),
        machine=describe_machine(),
        turns=(turns,),
        sizes=(
            bench_report.Size(name="quantize_static", bytes=29_000_000),
            bench_report.Size(name="qexport onnx", bytes=28_900_000, fp32_bytes=113_600_000),
        ),
        crossed=_crossed(),
        accuracy=None,
    )
    page = bench_report.as_markdown(bench)
    assert "8 frames of 320x240" in page
    assert "Parity: 0 of 1 gates ok; FAILED: onnx layer parity (6 steps)." in page
    assert "## Latency, 2 threads" in page
    assert (
        "| quantize_static | 20.0 | 18.0 | 21.6 | 1.6 | 2.00 (2.00 to 2.00) | 2.00 (2.00 to 2.00) |" in page
    )
    assert "| trunk | 6.00 | 60.0 |" in page
    assert "Convolutions and linears: 7.0 ms, in eager 28.0 ms: 4.00 times faster." in page
    assert "Others above 3 %: `roi_heads.box_roi_pool` (roi_align) 2.50 ms, `rpn.proposals` (nms)" in page
    assert "Their kernels above 3 %: `Gather` 2.00 ms." in page
    assert "95.5 % of a profiled run" in page
    assert "| quantize_static | 29.0 |  |  |" in page
    assert "| qexport onnx | 28.9 | 113.6 | 1/3.93 |" in page
    assert "| onnx, tflite | 2.00 |  | 50.00 |  | 10.00 | 1 |" in page
