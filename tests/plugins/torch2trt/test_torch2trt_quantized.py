"""Fake-quantizers as Q/DQ, and exported graphs as torch calls."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name
from torch import Tensor, nn
from torch.ao.quantization.fake_quantize import FakeQuantize
from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver
from torch2trt_networks import assert_converts, convert_model

from qexport.detectors.static import StaticDetector
from qexport.encodings import Encodings
from qexport.errors import UnsupportedOperator
from qexport.plugins.torch2trt.dotted import exists
from qexport.plugins.torch2trt.functions import TORCH_NAMES, TorchCalls
from qexport.quantization.graph import export_graph
from qexport.quantization.reference import QuantizedDetector, quantize
from qexport.runtimes.tensorrt_library import load_library

SCALE = 1 / 16
"""A power of two: dividing by it and multiplying by its inverse are the same."""
X = torch.linspace(-9, 9, 480).reshape(1, 4, 12, 10)
WEIGHT = torch.linspace(-2, 2, 72).reshape(2, 4, 3, 3)
SCALES = torch.tensor([2.0, 1.0]) / 64
ZEROS = torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("zero_point", "lowest", "highest", "kinds"),
    [
        (0, -128, 127, ["QUANTIZE", "DEQUANTIZE"]),
        (128, 0, 255, ["QUANTIZE", "DEQUANTIZE"]),
        (0, -127, 127, ["ACTIVATION", "QUANTIZE", "DEQUANTIZE"]),
        (0, 0, 127, ["ACTIVATION", "QUANTIZE", "DEQUANTIZE"]),
        (10, 0, 127, ["ACTIVATION", "QUANTIZE", "DEQUANTIZE"]),
    ],
)
def test_fake_quantize_per_tensor_converted_gives_the_same_codes(
    zero_point: int, lowest: int, highest: int, kinds: list[str]
) -> None:
    def model(x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, SCALE, zero_point, lowest, highest)

    assert assert_converts(model, X).kinds == kinds


def test_fake_quantize_with_scale_as_tensor_converted_gives_the_same_codes() -> None:
    scale, zero_point = torch.tensor([SCALE]), torch.tensor([0], dtype=torch.int32)
    assert_converts(lambda x: torch.fake_quantize_per_tensor_affine(x, scale, zero_point, -128, 127), X)


@pytest.mark.parametrize(("zero_point", "lowest", "highest"), [(3, -128, 127), (0, 0, 255), (128, 0, 256)])
def test_fake_quantize_of_codes_that_tensorrt_has_not_raises_error(
    zero_point: int, lowest: int, highest: int
) -> None:
    with pytest.raises(UnsupportedOperator, match="around zero"):
        convert_model(
            lambda x: torch.fake_quantize_per_tensor_affine(x, SCALE, zero_point, lowest, highest), X
        )


def test_fake_quantize_per_channel_of_weights_converted_feeds_the_convolution() -> None:
    def model(x: Tensor) -> Tensor:
        weight = torch.fake_quantize_per_channel_affine(WEIGHT, SCALES, ZEROS, 0, -127, 127)
        return F.conv2d(x, weight)

    converted = assert_converts(model, X, tolerance=1e-4)
    assert converted.kinds == ["QUANTIZE", "DEQUANTIZE", "CONVOLUTION"]
    quantize_layer, convolution = (
        next(layer for layer in converted.network.described.layers if layer.kind == kind)
        for kind in ("QUANTIZE", "CONVOLUTION")
    )
    assert quantize_layer.attributes["axis"] == 0
    assert convolution.inputs[1]


def test_fake_quantize_per_channel_of_activations_converted_gives_the_same_codes() -> None:
    scales, zeros = torch.tensor([1, 2, 4, 8]) / 64, torch.zeros(4, dtype=torch.int32)
    assert_converts(lambda x: torch.fake_quantize_per_channel_affine(x, scales, zeros, 1, -128, 127), X)


def test_fake_quantize_per_channel_that_would_have_to_clip_raises_error() -> None:
    with pytest.raises(UnsupportedOperator, match="per channel"):
        convert_model(
            lambda x: torch.fake_quantize_per_channel_affine(x, SCALES, ZEROS, 0, -7, 7),
            torch.rand(2, 3),
        )


def test_fake_quantize_modules_of_pytorch_are_converted() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            symmetric = {"dtype": torch.qint8, "quant_min": -128, "quant_max": 127}
            self.given = FakeQuantize(MinMaxObserver, **symmetric, qscheme=torch.per_tensor_symmetric)
            self.weights = FakeQuantize(
                PerChannelMinMaxObserver, **symmetric, qscheme=torch.per_channel_symmetric, ch_axis=0
            )
            self.linear = nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.given(x), self.weights(self.linear.weight), self.linear.bias)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Model()
    model(X)
    for module in (model.given, model.weights):
        module.disable_observer()
    # A code may be one off where a value stands between two: scales are no powers of two.
    step = float(model.given.scale) * float(model.linear.weight.detach().abs().max())
    converted = assert_converts(model.eval(), X, tolerance=2 * step)
    assert converted.kinds[:4] == ["QUANTIZE", "DEQUANTIZE", "QUANTIZE", "DEQUANTIZE"]


def test_quantized_convolution_and_linear_built_compute_in_int8() -> None:
    trt = load_library().trt
    messages: list[str] = []

    class Log(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: object, message: str) -> None:
            messages.append(message)

    def model(x: Tensor) -> Tensor:
        weight = torch.fake_quantize_per_channel_affine(WEIGHT, SCALES, ZEROS, 0, -127, 127)
        x = torch.fake_quantize_per_tensor_affine(x, SCALE, 0, -128, 127)
        x = torch.fake_quantize_per_tensor_affine(F.conv2d(x, weight).relu(), 0.5, 0, -128, 127)
        x = torch.fake_quantize_per_tensor_affine(x.flatten(1), 0.5, 0, -128, 127)
        rows = torch.linspace(-2, 2, 2 * 160).reshape(2, 160)
        return F.linear(x, torch.fake_quantize_per_channel_affine(rows, SCALES, ZEROS, 0, -127, 127))

    network = convert_model(model, X).conversion.network
    builder = trt.Builder(Log())
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    assert builder.build_serialized_network(network, config) is not None
    (listing,) = [message for message in messages if message.startswith("Layers:")]
    kernels = [line for line in listing.splitlines() if "conv2d" in line or "linear" in line]
    weighted = [line for line in kernels if "LayerType: correlation" in line or "LayerType: gemm" in line]
    assert len(weighted) == 2
    assert all("Datatype: Int8" in line.partition("Outputs:")[0] for line in weighted)


def test_every_name_of_an_aten_operator_is_a_torch_function() -> None:
    assert [name for name in TORCH_NAMES.values() if not exists(name)] == []


EXPORTED: dict[str, Callable[[Tensor], Tensor]] = {
    **{
        mode: lambda x, mode=mode: F.interpolate(x, scale_factor=2, mode=mode)
        for mode in ("nearest", "nearest-exact", "bilinear", "bicubic")
    },
    "corners": lambda x: F.interpolate(x, (7, 9), mode="bilinear", align_corners=True),
    "slices": lambda x: x[:, 1:3, ::2, -4:],
    "number": lambda x: x[0, -1] + 1,
    "casts": lambda x: x.to(torch.int32).to(torch.float32) * (x > 0),
    "pool": lambda x: F.max_pool2d(F.avg_pool2d(x, 2), 2, 1, 1),
    "views": lambda x: x.flatten(2).transpose(1, 2).contiguous().view(-1, 4).unsqueeze(0).squeeze(0),
    "pieces": lambda x: (
        torch.cat(x.split(2, 1)[::-1], 1) + torch.stack(x.unbind(1), 1).mean((2, 3), keepdim=True)
    ),
    "activations": lambda x: F.silu(F.hardswish(x)) + F.hardsigmoid(x) * F.relu6(x) - F.leaky_relu(x, 0.1),
    "choices": lambda x: torch.where(x > 1, x.clamp(0, 3), x.abs().sqrt().exp().log()),
    "logic": lambda x: ((x > 0) & (x < 2) | ~(x >= -1)).to(torch.float32).sum(-1),
    "norm": lambda x: F.batch_norm(x, torch.ones(4), torch.full((4,), 2.0)),
    "expand": lambda x: x[:, :1].expand(1, 4, 12, 10) + F.pad(x, (1, 0), value=2.0)[..., :-1],
}


@pytest.mark.parametrize("name", EXPORTED)
def test_exported_graph_called_as_torch_functions_is_the_model(name: str) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return EXPORTED[name](x)

    exported = torch.export.export(Model(), (X,)).run_decompositions({}).module(check_guards=False)
    calls = TorchCalls(exported)
    assert torch.equal(calls(X), EXPORTED[name](X))
    assert_converts(calls, X, tolerance=1e-4)


def test_exported_operator_without_a_name_raises_error_that_says_where() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.logcumsumexp(x, 1)

    exported = torch.export.export(Model(), (X,)).run_decompositions({}).module(check_guards=False)
    with pytest.raises(UnsupportedOperator, match=r"aten\.logcumsumexp\.default.*functions\.py"):
        TorchCalls(exported)(X)


def test_quantized_detector_called_as_torch_functions_is_bit_identical(
    demo_quantized: QuantizedDetector, demo_frames: list[np.ndarray]
) -> None:
    calls = TorchCalls(demo_quantized.graph)
    for frame in demo_frames:
        expected = demo_quantized.graph(torch.from_numpy(frame))
        for reference, actual in zip(expected, calls(torch.from_numpy(frame)), strict=True):
            assert torch.equal(actual, reference)


def test_quantized_detector_converted_gives_the_same_detections(
    demo_quantized: QuantizedDetector, demo_frames: list[np.ndarray]
) -> None:
    frames = [torch.from_numpy(frame) for frame in demo_frames]
    seen = []
    calls = TorchCalls(demo_quantized.graph, after_node=lambda node, result: seen.append(node.name))
    converted = convert_model(calls, frames[0], outputs=4)
    assert seen == [node.name for node in demo_quantized.graph.graph.nodes]
    for frame in frames:
        expected = demo_quantized.graph(frame)
        for reference, actual in zip(expected, converted.run(frame), strict=True):
            torch.testing.assert_close(actual, reference, rtol=0, atol=1e-3)


def test_float_detector_converted_gives_the_same_detections(
    small_static: StaticDetector, small_encodings: Encodings, small_frames: list[np.ndarray]
) -> None:
    graph = quantize(small_static, small_encodings).float_graph
    frame = torch.from_numpy(small_frames[2])
    expected, converted = graph(frame), convert_model(TorchCalls(graph), frame, outputs=4)
    assert int(expected[3]) > 0
    for reference, actual in zip(expected, converted.run(frame), strict=True):
        torch.testing.assert_close(actual, reference, rtol=0, atol=1e-2)


def test_place_of_a_node_is_its_module_and_call(small_static: StaticDetector) -> None:
    places: dict[str, str] = {}
    calls = TorchCalls(
        export_graph(small_static), after_node=lambda node, _: places.setdefault(node.name, calls.place)
    )
    calls(small_static.example_input())
    assert places["conv2d"] == "backbone.0"
    assert "rpn.head.cls_logits" in places.values()
