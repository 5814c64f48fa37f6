"""Each ONNX form of an operator against torchvision's own, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor

from qexport.detectors import operators
from qexport.plugins.onnx import nms, normalised_image, roi_align
from qexport.plugins.onnx.global_average_pool import use_global_average_pool
from qexport.plugins.onnx.integer_kernels import move_activations_after_quantizers, shift_to_uint8
from qexport.plugins.onnx.integer_roi_align import lower_to_integer
from qexport.plugins.onnx.placeholders import DOMAIN, NMS_MASK, NORMALISED_IMAGE, ROI_ALIGN
from qexport.runtimes.onnx_session import make_session

Array = NDArray[Any]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STRIDES = (4, 8, 16, 32)


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


@dataclass(frozen=True, slots=True)
class RoiCase:
    """Feature maps of pyramid levels, and boxes of many sizes on the image."""

    levels: int
    channels: int
    boxes: Tensor
    image_px: tuple[int, int] = (160, 224)
    scales_of_levels: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    sampling_ratio: int = 2
    output_size: tuple[int, int] = (7, 7)
    canonical_scale: int = 56

    def features(self) -> list[Tensor]:
        """Return random maps, (1, C, H / stride, W / stride)."""
        random = torch.Generator().manual_seed(self.levels + self.channels)
        height, width = self.image_px
        return [
            torch.randn(1, self.channels, height // stride, width // stride, generator=random) * scale
            for stride, scale in zip(STRIDES[: self.levels], self.scales_of_levels, strict=False)
        ]

    @property
    def scales(self) -> list[float]:
        return [1 / stride for stride in STRIDES[: self.levels]]

    def torchvision(self, features: list[Tensor]) -> Tensor:
        result: Tensor = operators.multiscale_roi_align(
            features,
            self.boxes,
            self.scales,
            list(self.output_size),
            self.sampling_ratio,
            self.canonical_scale,
            4,
        )
        return result

    def placeholder(self, graph: Graph, features: Sequence[ir.Value]) -> ir.Node:
        boxes = graph.input(self.boxes.numpy())
        attributes = {
            "scales": self.scales,
            "output_size": list(self.output_size),
            "sampling_ratio": self.sampling_ratio,
            "canonical_scale": self.canonical_scale,
            "canonical_level": 4,
        }
        shape = (len(self.boxes), self.channels, *self.output_size)
        return graph.op(ROI_ALIGN, [boxes, *features], attributes, shape=shape, domain=DOMAIN)


def random_boxes(count: int, image_px: tuple[int, int] = (160, 224)) -> Tensor:
    """Return boxes from tiny to huge inside the image, (N, 4)."""
    random = torch.Generator().manual_seed(count)
    height, width = image_px
    size = torch.exp(torch.rand(count, 2, generator=random) * 5.5)
    centre = torch.rand(count, 2, generator=random) * torch.tensor([width, height])
    boxes = torch.cat([centre - size / 2, centre + size / 2], 1)
    return operators_clip(boxes, image_px)


def operators_clip(boxes: Tensor, image_px: tuple[int, int]) -> Tensor:
    height, width = image_px
    limit = torch.tensor([width, height, width, height], dtype=torch.float32)
    return torch.minimum(boxes.clamp(min=0), limit)


BORDER_BOXES = torch.tensor(
    [
        [0, 0, 224, 160],  # all of the image
        [0, 0, 0, 0],  # what pads the proposals
        [224, 160, 224, 160],
        [223.5, 0, 224, 160],  # less than a cell wide, at the right border
        [0, 159.2, 224, 160],  # less than a cell high, at the lower border
        [0, 157.5, 56, 159.9],
        [220.1, 155.2, 224, 160],
        [0, 0, 224, 1],
        [0, 0, 3, 160],
        [100.25, 80.5, 100.25, 120],
        [191.9, 127.9, 224, 160],
        [16, 16, 32, 32],
    ],
    dtype=torch.float32,
)
ROI_CASES = {
    "four levels": RoiCase(4, 8, random_boxes(60)),
    "three levels, odd channels": RoiCase(3, 13, random_boxes(40)),
    "two levels": RoiCase(2, 5, random_boxes(30)),
    "one level, one channel": RoiCase(1, 1, random_boxes(30)),
    "border boxes": RoiCase(4, 6, BORDER_BOXES),
    "border boxes, two levels": RoiCase(2, 6, BORDER_BOXES),
    "border boxes, one level": RoiCase(1, 6, BORDER_BOXES),
    "levels of different scale": RoiCase(4, 8, random_boxes(60), scales_of_levels=(0.2, 1.0, 3.0, 8.0)),
    "coarse level small": RoiCase(4, 8, random_boxes(60), scales_of_levels=(8.0, 3.0, 1.0, 0.2)),
    "a level that no box is large enough for, of huge scale": RoiCase(
        4, 8, random_boxes(60), scales_of_levels=(1.0, 1.0, 1.0, 60.0), canonical_scale=112
    ),
    "one sample a bin": RoiCase(3, 4, torch.cat([random_boxes(20), BORDER_BOXES]), sampling_ratio=1),
    "three samples a bin, oblong": RoiCase(
        3, 4, torch.cat([random_boxes(20), BORDER_BOXES]), sampling_ratio=3, output_size=(3, 5)
    ),
    "one box": RoiCase(4, 4, random_boxes(60)[:1]),
    "many boxes in several products": RoiCase(4, 64, random_boxes(300)),
}
ADAPTIVE = RoiCase(4, 4, torch.cat([random_boxes(20), BORDER_BOXES]), sampling_ratio=-1)


@pytest.mark.parametrize("case", [*ROI_CASES.values(), ADAPTIVE], ids=[*ROI_CASES, "adaptive samples"])
def test_roi_align_atlas_equals_torchvision(case: RoiCase) -> None:
    features = case.features()
    graph = Graph()
    node = case.placeholder(graph, [graph.input(feature.numpy()) for feature in features])
    graph.output(node.outputs[0])
    roi_align.lower_to_atlas(node)
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
    node = case.placeholder(graph, dequantized)
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
    node = ADAPTIVE.placeholder(graph, dequantized)
    assert lower_to_integer(graph.model) == []
    assert node in list(graph.model.graph)


def random_nms(groups: int, number: int, *, valid: float, size: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes, (G, N, 4), scores, which are all different, and which of them are valid."""
    random = torch.Generator().manual_seed(groups * number)
    corner = torch.rand(groups, number, 2, generator=random) * 200
    extent = torch.rand(groups, number, 2, generator=random) * size + 1
    scores = (torch.randperm(groups * number, generator=random).reshape(groups, number) + 1) / (
        groups * number
    )
    return (
        torch.cat([corner, corner + extent], 2),
        scores,
        torch.rand(groups, number, generator=random) < valid,
    )


NMS_CASES = {
    "crowded": random_nms(4, 300, valid=1.0, size=120),
    "sparse": random_nms(3, 100, valid=0.7, size=20),
    "one group": random_nms(1, 50, valid=0.9, size=80),
    "many groups of few": random_nms(90, 5, valid=0.5, size=100),
    "beyond a thousand": random_nms(5, 400, valid=0.9, size=100),  # torchvision takes another way there
    "none valid": random_nms(3, 20, valid=0.0, size=50),
}


@pytest.mark.parametrize("given", NMS_CASES.values(), ids=NMS_CASES.keys())
@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_nms_keeps_the_boxes_that_torchvision_keeps(
    given: tuple[Tensor, Tensor, Tensor], threshold: float
) -> None:
    assert_nms_equal(*given, threshold)


def test_nms_keeps_a_valid_box_whose_score_is_zero() -> None:
    boxes, scores, valid = random_nms(2, 8, valid=1.0, size=3)
    assert_nms_equal(boxes, torch.zeros_like(scores), valid, 0.5)


def test_nms_of_equal_boxes_keeps_the_first_of_equal_scores() -> None:
    boxes = torch.tensor([10.0, 10.0, 30.0, 30.0]).expand(2, 6, 4)
    assert_nms_equal(boxes, torch.full((2, 6), 0.5), torch.ones(2, 6, dtype=torch.bool), 0.5)


def assert_nms_equal(boxes: Tensor, scores: Tensor, valid: Tensor, threshold: float) -> None:
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
    nms.lower(node)
    expected = operators.batched_nms_mask(boxes, scores, valid, threshold)
    np.testing.assert_array_equal(graph.run(), expected.numpy())


IMAGE_CASES: dict[str, tuple[tuple[int, int], tuple[int, int], tuple[int, int]]] = {
    "unresized": ((96, 128), (96, 128), (96, 128)),
    "padded": ((90, 120), (90, 120), (96, 128)),
    "halved": ((96, 128), (48, 64), (64, 64)),
    "quartered": ((96, 128), (24, 32), (32, 32)),
    "by three": ((96, 129), (32, 43), (32, 64)),
    "halved along one axis": ((96, 128), (48, 128), (64, 128)),
    "doubled": ((32, 48), (64, 96), (64, 96)),
    "odd ratios": ((77, 101), (48, 63), (64, 64)),
    "upscaled": ((33, 47), (64, 91), (64, 96)),
    "large": ((480, 640), (800, 1066), (800, 1088)),
    "wide": ((270, 1920), (187, 1333), (192, 1344)),
}


@pytest.mark.parametrize("name", IMAGE_CASES)
def test_normalised_image_of_noise_equals_torchvisions_transform(name: str) -> None:
    random = torch.Generator().manual_seed(1)
    frame = torch.randint(0, 256, (*IMAGE_CASES[name][0], 3), dtype=torch.uint8, generator=random)
    assert image_difference(name, frame) <= 2e-6


def image_difference(name: str, frame: Tensor) -> float:
    """Return the largest difference from torchvision's image, in units of the normalised image."""
    _, resized, padded = IMAGE_CASES[name]
    graph = Graph()
    attributes = {"mean": MEAN, "std": STD, "resized": resized, "padded": padded}
    node = graph.op(
        NORMALISED_IMAGE, [graph.input(frame.numpy())], attributes, shape=(1, 3, *padded), domain=DOMAIN
    )
    graph.output(node.outputs[0])
    normalised_image.lower(node)
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
