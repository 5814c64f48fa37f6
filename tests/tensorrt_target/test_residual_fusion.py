"""Which convolution takes a residual add into its kernel: the later one, where nobody else reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import fx, nn

from qexport.plugins.tensorrt.residual_fusion import fused_residuals
from qexport.quantization.graph import is_quantize, op_name
from qexport.quantization.reference import QuantizedDetector, without_quantizers

if TYPE_CHECKING:
    from qexport.detectors.static import StaticDetector

ATEN, QUANTIZED = torch.ops.aten, torch.ops.quantized_decomposed
STEP = 0.1


def scheme(step: float) -> tuple[object, ...]:
    return step, 0, -127, 127, torch.int8


class Graph:
    """Writes a quantized graph node by node."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.root.register_buffer("weight", torch.ones(1, 1, 1, 1))
        self.root.register_buffer("codes", torch.ones(1, 1, 1, 1, dtype=torch.int8))
        self.keys: dict[str, fx.Node] = {}
        self.given = self.quantized("image", self.graph.placeholder("image"))

    def quantized(self, key: str, value: fx.Node, *, step: float = STEP) -> fx.Node:
        quantize, dequantize = QUANTIZED.quantize_per_tensor, QUANTIZED.dequantize_per_tensor
        self.keys[key] = self.graph.call_function(quantize.default, (value, *scheme(step)))
        return self.graph.call_function(dequantize.default, (self.keys[key], *scheme(step)))

    def conv(self, value: fx.Node, *, in_float: bool = False) -> fx.Node:
        weight = self.graph.get_attr("weight" if in_float else "codes")
        if not in_float:
            weight = self.graph.call_function(
                QUANTIZED.dequantize_per_tensor.default, (weight, *scheme(STEP))
            )
        return self.graph.call_function(ATEN.conv2d.default, (value, weight))

    def add(self, one: fx.Node, other: fx.Node) -> fx.Node:
        return self.graph.call_function(ATEN.add.Tensor, (one, other))

    def detector(self, static: StaticDetector, *outputs: fx.Node) -> QuantizedDetector:
        self.graph.output(outputs)
        module = fx.GraphModule(self.root, self.graph)
        return QuantizedDetector(static, module, module, self.keys)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_add_of_two_convolutions_is_taken_in_by_the_later_one(
    order: tuple[int, int], small_static: StaticDetector
) -> None:
    graph = Graph()
    branches = [graph.quantized(key, graph.conv(graph.given)) for key in ("early", "late")]
    added = graph.add(*(branches[place] for place in order))
    assert fused_residuals(graph.detector(small_static, added)) == ("late",)


def test_add_of_a_convolution_and_a_shortcut_is_taken_in_by_the_convolution(
    small_static: StaticDetector,
) -> None:
    graph = Graph()
    late = graph.quantized("conv", graph.conv(graph.given))
    assert fused_residuals(graph.detector(small_static, graph.add(graph.given, late))) == ("conv",)


def test_convolution_that_something_else_reads_too_keeps_its_quantizer(small_static: StaticDetector) -> None:
    graph = Graph()
    conv = graph.quantized("conv", graph.conv(graph.given))
    added = graph.add(conv, graph.given)
    assert fused_residuals(graph.detector(small_static, added, graph.conv(conv))) == ()


def test_convolution_whose_add_has_no_quantizer_before_it_has_none_to_lose(
    small_static: StaticDetector,
) -> None:
    graph = Graph()
    added = graph.add(graph.conv(graph.given), graph.given)
    assert fused_residuals(graph.detector(small_static, added)) == ()


def test_convolution_that_is_kept_float_takes_in_no_add(small_static: StaticDetector) -> None:
    graph = Graph()
    int8 = graph.quantized("int8", graph.conv(graph.given))
    in_float = graph.quantized("float", graph.conv(graph.given, in_float=True))
    assert fused_residuals(graph.detector(small_static, graph.add(int8, in_float))) == ("int8",)


def test_graph_without_the_quantizers_computes_the_sum_before_any_rounding(
    small_static: StaticDetector,
) -> None:
    graph = Graph()
    conv = graph.quantized("conv", graph.conv(graph.given), step=0.5)
    detector = graph.detector(small_static, graph.quantized("sum", graph.add(conv, graph.given)))
    before = [node.name for node in detector.graph.graph.nodes]
    placed = without_quantizers(detector, fused_residuals(detector))
    assert placed.quantize_nodes.keys() == {"image", "sum"}
    assert [node.name for node in detector.graph.graph.nodes] == before
    assert detector.quantize_nodes.keys() == {"image", "conv", "sum"}
    add = next(node for node in placed.graph.graph.nodes if op_name(node) == "add")
    assert op_name(add.args[0]) == "conv2d"
    assert sum(map(is_quantize, placed.graph.graph.nodes)) == 2
    (rounded,), (exact,) = (one.graph(torch.full((1, 1, 1, 1), 1.2)) for one in (detector, placed))
    assert float(rounded) == pytest.approx(1.2)  # the convolution's 0.12 is less than half of its step
    assert float(exact) == pytest.approx(1.3)  # 1.32
    assert without_quantizers(detector, ()) is detector


def test_residuals_of_the_demo_are_one_of_each_add(
    demo_quantized: QuantizedDetector,
) -> None:
    adds = [node for node in demo_quantized.graph.graph.nodes if op_name(node) == "add"]
    fused = fused_residuals(demo_quantized)
    order = [key for key in demo_quantized.quantize_nodes if key in fused]
    assert 5 < len(fused) <= len(adds)
    assert list(fused) == order
    assert "backbone.body.layer1.0.downsample.0@0/output:conv2d" in fused
    assert "backbone.body.layer1.0.conv2@0/output:conv2d" not in fused
