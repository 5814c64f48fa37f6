"""Each ONNX form of an operator against torchvision's own, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass
from operator_cases import (
    ADAPTIVE,
    IMAGE_CASES,
    MEAN,
    NMS_CASES,
    ROI_CASES,
    STD,
    RoiCase,
    random_nms,
)
from torch import Tensor

from qexport.detectors import operators
from qexport.errors import UnsupportedOperator
from qexport.plugins.onnx import loop_nms, nms, normalised_image, roi_align
from qexport.plugins.onnx.global_average_pool import use_global_average_pool
from qexport.plugins.onnx.integer_kernels import move_activations_after_quantizers, shift_to_uint8
from qexport.plugins.onnx.integer_roi_align import lower_to_integer
from qexport.plugins.onnx.placeholders import DOMAIN, NMS_MASK, NORMALISED_IMAGE, ROI_ALIGN
from qexport.runtimes.onnx_session import make_session

Array = NDArray[Any]


class Graph:
    """A graph of one placeholder, and of what a test puts around it."""

    def __init__(self) -> None:
        self.model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 18, DOMAIN: 1}), ir_version=10)
        self.feeds: dict[str, Array] = {}

    def input(self, array: Array) -> ir.Value:
        """Add an input that is fed with `array`."""
        name = f"input_{len(self.feeds)}"
        kind = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        value = ir.Value(name=name, type=kind, shape=ir.Shape(array.shape))
        self.model.graph.inputs.append(value)
        self.feeds[name] = array
        return value

    def constant(self, array: Array, name: str) -> ir.Value:
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        self.model.graph.register_initializer(value)
        return value

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        attributes: Mapping[str, Any],
        *,
        shape: Sequence[int],
        dtype: ir.DataType = ir.DataType.FLOAT,
        domain: str = "",
    ) -> ir.Node:
        node = ir.node(op_type, list(inputs), dict(attributes), domain=domain)
        node.outputs[0].name = f"value_{len(list(self.model.graph))}"
        node.outputs[0].dtype, node.outputs[0].shape = dtype, ir.Shape(shape)
        self.model.graph.append(node)
        return node

    def output(self, value: ir.Value) -> None:
        self.model.graph.outputs.append(value)

    def run(self) -> Array:
        """Run in ONNX Runtime; return the output."""
        RemoveUnusedNodesPass()(self.model)  # the placeholder that an integer form stands for
        proto = ir.serde.serialize_model(self.model)
        result: Array = make_session(proto.SerializeToString()).run(None, self.feeds)[0]
        return result


def roi_placeholder(case: RoiCase, graph: Graph, features: Sequence[ir.Value]) -> ir.Node:
    boxes = graph.input(case.boxes.numpy())
    attributes = {
        "scales": case.scales,
        "output_size": list(case.output_size),
        "sampling_ratio": case.sampling_ratio,
        "canonical_scale": case.canonical_scale,
        "canonical_level": 4,
    }
    shape = (len(case.boxes), case.channels, *case.output_size)
    return graph.op(ROI_ALIGN, [boxes, *features], attributes, shape=shape, domain=DOMAIN)


@pytest.mark.parametrize("case", [*ROI_CASES.values(), ADAPTIVE], ids=[*ROI_CASES, "adaptive samples"])
def test_roi_align_atlas_equals_torchvision(case: RoiCase) -> None:
    assert_roi_align_equal(case, roi_align.lower_to_atlas)


@pytest.mark.parametrize("case", ROI_CASES.values(), ids=ROI_CASES.keys())
def test_roi_align_grid_equals_torchvision(case: RoiCase) -> None:
    assert_roi_align_equal(case, roi_align.lower_to_grid)


def test_roi_align_grid_of_adaptive_samples_is_refused() -> None:
    with pytest.raises(
        UnsupportedOperator, match="sampling_ratio -1 takes as many samples as a box is large"
    ):
        assert_roi_align_equal(ADAPTIVE, roi_align.lower_to_grid)


def assert_roi_align_equal(case: RoiCase, lower: Callable[[ir.Node], None]) -> None:
    features = case.features()
    graph = Graph()
    node = roi_placeholder(case, graph, [graph.input(feature.numpy()) for feature in features])
    graph.output(node.outputs[0])
    lower(node)
    np.testing.assert_allclose(graph.run(), case.torchvision(features).numpy(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", ROI_CASES.values(), ids=ROI_CASES.keys())
def test_roi_align_int8_gather_is_within_a_step_of_torchvision(case: RoiCase) -> None:
    steps, actual = int8_difference(case)
    assert int(np.abs(actual).max()) > 60  # the whole range is used: a step means something
    assert int(steps.max()) <= 1


def int8_difference(case: RoiCase) -> tuple[Array, Array]:
    """Return by how many steps the integer form differs from torchvision's, quantized after; and its codes."""
    graph = Graph()
    real, dequantized = [], []
    for level, feature in enumerate(case.features()):
        scale = float(feature.abs().max()) / 127
        codes = torch.clamp(torch.round(feature / scale), -128, 127)
        real.append(codes * scale)
        given = [
            graph.input((codes + 128).to(torch.uint8).numpy()),
            graph.constant(np.float32(scale), f"scale_{level}"),
            graph.constant(np.uint8(128), f"zero_{level}"),
        ]
        dequantized.append(graph.op("DequantizeLinear", given, {}, shape=feature.shape).outputs[0])
    node = roi_placeholder(case, graph, dequantized)
    pooled = case.torchvision(real)
    scale = float(pooled.abs().max()) / 127
    given = [
        node.outputs[0],
        graph.constant(np.float32(scale), "scale_out"),
        graph.constant(np.uint8(128), "zero_out"),
    ]
    quantizer = graph.op("QuantizeLinear", given, {}, shape=pooled.shape, dtype=ir.DataType.UINT8)
    graph.output(quantizer.outputs[0])
    assert len(lower_to_integer(graph.model)) == 1
    expected = torch.clamp(torch.round(pooled / scale), -128, 127).numpy().astype(np.int16)
    actual = graph.run().astype(np.int16) - 128
    assert actual.shape == expected.shape
    return np.abs(actual - expected), actual


def test_roi_align_int8_gather_of_adaptive_samples_is_refused_and_left() -> None:
    graph = Graph()
    dequantized = []
    for level, feature in enumerate(ADAPTIVE.features()):
        given = [
            graph.input(np.zeros(feature.shape, np.uint8)),
            graph.constant(np.float32(1), f"scale_{level}"),
            graph.constant(np.uint8(128), f"zero_{level}"),
        ]
        dequantized.append(graph.op("DequantizeLinear", given, {}, shape=feature.shape).outputs[0])
    node = roi_placeholder(ADAPTIVE, graph, dequantized)
    assert lower_to_integer(graph.model) == []
    assert node in list(graph.model.graph)


NMS_FORMS = pytest.mark.parametrize("lower", [nms.lower, loop_nms.lower], ids=["NonMaxSuppression", "loop"])


@pytest.mark.parametrize("given", NMS_CASES.values(), ids=NMS_CASES.keys())
@pytest.mark.parametrize("threshold", [0.3, 0.7])
@NMS_FORMS
def test_nms_keeps_the_boxes_that_torchvision_keeps(
    lower: Callable[[ir.Node], None], given: tuple[Tensor, Tensor, Tensor], threshold: float
) -> None:
    assert_nms_equal(lower, *given, threshold)


@NMS_FORMS
def test_nms_keeps_a_valid_box_whose_score_is_zero(lower: Callable[[ir.Node], None]) -> None:
    boxes, scores, valid = random_nms(2, 8, valid=1.0, size=3)
    assert_nms_equal(lower, boxes, torch.zeros_like(scores), valid, 0.5)


@NMS_FORMS
def test_nms_of_equal_boxes_keeps_the_first_of_equal_scores(lower: Callable[[ir.Node], None]) -> None:
    boxes = torch.tensor([10.0, 10.0, 30.0, 30.0]).expand(2, 6, 4)
    assert_nms_equal(lower, boxes, torch.full((2, 6), 0.5), torch.ones(2, 6, dtype=torch.bool), 0.5)


def assert_nms_equal(
    lower: Callable[[ir.Node], None], boxes: Tensor, scores: Tensor, valid: Tensor, threshold: float
) -> None:
    graph = Graph()
    inputs = [graph.input(np.ascontiguousarray(tensor.numpy())) for tensor in (boxes, scores, valid)]
    node = graph.op(
        NMS_MASK,
        inputs,
        {"iou_threshold": threshold},
        shape=scores.shape,
        dtype=ir.DataType.BOOL,
        domain=DOMAIN,
    )
    graph.output(node.outputs[0])
    lower(node)
    expected = operators.batched_nms_mask(boxes, scores, valid, threshold)
    np.testing.assert_array_equal(graph.run(), expected.numpy())


@pytest.mark.parametrize("integers_move", [True, False])
@pytest.mark.parametrize("name", IMAGE_CASES)
def test_normalised_image_of_noise_equals_torchvisions_transform(name: str, integers_move: bool) -> None:
    random = torch.Generator().manual_seed(1)
    frame = torch.randint(0, 256, (*IMAGE_CASES[name][0], 3), dtype=torch.uint8, generator=random)
    assert image_difference(name, frame, integers_move=integers_move) <= 2e-6


def image_difference(name: str, frame: Tensor, *, integers_move: bool) -> float:
    """Return the largest difference from torchvision's image, in units of the normalised image."""
    _, resized, padded = IMAGE_CASES[name]
    graph = Graph()
    attributes = {"mean": MEAN, "std": STD, "resized": resized, "padded": padded}
    node = graph.op(
        NORMALISED_IMAGE, [graph.input(frame.numpy())], attributes, shape=(1, 3, *padded), domain=DOMAIN
    )
    graph.output(node.outputs[0])
    normalised_image.lower(node, integers_move=integers_move)
    expected = operators.normalised_image(frame, list(MEAN), list(STD), list(resized), list(padded))
    return float(np.abs(graph.run() - expected.numpy()).max())


@pytest.mark.parametrize("keepdims", [True, False])
def test_global_average_pool_replaces_the_mean_over_height_and_width_alone(keepdims: bool) -> None:
    array = np.random.default_rng(0).standard_normal((1, 5, 6, 7)).astype(np.float32)
    graph = Graph()
    axes = graph.constant(np.array([-1, -2], np.int64), "axes")
    shape = (1, 5, 1, 1) if keepdims else (1, 5)
    node = graph.op("ReduceMean", [graph.input(array), axes], {"keepdims": int(keepdims)}, shape=shape)
    graph.output(node.outputs[0])
    use_global_average_pool(graph.model)
    assert [node.op_type for node in graph.model.graph] == ["GlobalAveragePool" if keepdims else "ReduceMean"]
    np.testing.assert_allclose(graph.run(), array.mean((2, 3), keepdims=keepdims), atol=1e-6)


@pytest.mark.parametrize("upper", [None, 6.0], ids=["Relu", "Clip"])
def test_activation_moved_after_a_quantizer_gives_the_same_integers(upper: float | None) -> None:
    array = np.random.default_rng(1).standard_normal((4, 100)).astype(np.float32) * 6
    graph = Graph()
    given = graph.input(array)
    if upper is None:
        clipped = graph.op("Relu", [given], {}, shape=array.shape)
    else:
        bounds = [graph.constant(np.float32(bound), f"bound_{bound}") for bound in (0.0, upper)]
        clipped = graph.op("Clip", [given, *bounds], {}, shape=array.shape)
    params = [graph.constant(np.float32(0.05), "scale"), graph.constant(np.int8(0), "zero")]
    quantizer = graph.op(
        "QuantizeLinear", [clipped.outputs[0], *params], {}, shape=array.shape, dtype=ir.DataType.INT8
    )
    back = graph.op("DequantizeLinear", [quantizer.outputs[0], *params], {}, shape=array.shape)
    graph.output(back.outputs[0])
    before = graph.run()
    move_activations_after_quantizers(graph.model)
    shift_to_uint8(graph.model)
    kinds = [node.op_type for node in graph.model.graph]
    assert kinds == ["QuantizeLinear", "Clip", "DequantizeLinear"]
    assert before.max() > 4
    np.testing.assert_array_equal(graph.run(), before)
