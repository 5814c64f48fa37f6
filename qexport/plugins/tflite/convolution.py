"""Convolutions: CONV_2D and DEPTHWISE_CONV_2D, in integers and in float."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray
from torch.fx import Node

from qexport.errors import UnsupportedOperator
from qexport.plugins.tflite.activations import ACTIVATIONS
from qexport.plugins.tflite.builder import TfliteBuilder
from qexport.plugins.tflite.held import Held, as_map
from qexport.plugins.tflite.lowering import Lowering
from qexport.plugins.tflite.writer import Value
from qexport.quantization.graph import argument_node, scale_of, site_of


def integer(lowering: Lowering, node: Node, activation: str, scale: float) -> Held | None:
    """Write a convolution of int8 codes; None where its weight or its activation is not one of the kernel's."""
    quantized = lowering.weight(argument_node(node, 1))
    quantizer = lowering.quantizer_behind(node.args[0])
    if quantized is None or quantizer is None or activation not in ACTIVATIONS:
        return None
    source = lowering.codes(quantizer)
    lowering.go_to(node)
    codes, scales = quantized
    steps = scales.double() * scale_of(quantizer)
    bias = _bias(lowering, node, codes.shape[0])
    whole = np.round(bias / steps.numpy()).astype(np.int32)
    filters, axis = _filters(node, codes.numpy(), source)
    return _write(
        lowering.build,
        node,
        as_map(lowering.build, source),
        lowering.build.weights(filters, scales.tolist(), axis),
        lowering.writer.constant(whole, name="bias", scales=steps.tolist()),
        activation,
        scale,
    )


def real(lowering: Lowering, node: Node) -> Held:
    """Write a convolution in float32."""
    weight = lowering.values(node.args[1])
    source = lowering.real(argument_node(node))
    filters, _ = _filters(node, weight.numpy(), source)
    bias = _bias(lowering, node, weight.shape[0]).astype(np.float32)
    return _write(
        lowering.build,
        node,
        as_map(lowering.build, source),
        lowering.float_weight(filters),
        lowering.writer.constant(bias, name="bias"),
        "",
        None,
    )


def _bias(lowering: Lowering, node: Node, channels: int) -> NDArray[np.float64]:
    if len(node.args) < 3 or node.args[2] is None:
        return np.zeros(channels)
    return lowering.constant(node.args[2]).double().numpy()


def _padding(node: Node, reach: Sequence[int]) -> tuple[int, int]:
    """Return rows and columns on each side; of `same`, the ones before, which is what the kernel's SAME means."""
    if len(node.args) > 4 and isinstance(node.args[4], str):
        return ((reach[0] - 1) // 2, (reach[1] - 1) // 2) if node.args[4] == "same" else (0, 0)
    return _pair(node, 4, 0)


def _pair(node: Node, index: int, default: int) -> tuple[int, int]:
    value: Any = node.args[index] if len(node.args) > index else default
    sizes = [int(number) for number in value] if isinstance(value, Sequence) else [int(value)]
    return (sizes[0], sizes[-1])


def _groups(node: Node) -> int:
    return int(str(node.args[6])) if len(node.args) > 6 else 1


def _filters(node: Node, weight: NDArray[np.generic], source: Held) -> tuple[NDArray[np.generic], int]:
    """Return the weight as the kernel takes it, and the axis of its output channels: 3 for a depthwise one.

    Raises:
        UnsupportedOperator: more than one group, and fewer than one a channel.
    """
    groups = _groups(node)
    if groups == 1:
        return np.ascontiguousarray(weight.transpose(0, 2, 3, 1)), 0
    if weight.shape[1] == 1 and groups == source.shape[1]:
        return np.ascontiguousarray(weight.transpose(1, 2, 3, 0)), 3
    raise UnsupportedOperator(
        f"convolution {site_of(node).path} has {groups} groups: TFLite has one group, or one a channel. Replace it in "
        "the model."
    )


def _write(
    build: TfliteBuilder,
    node: Node,
    source: Value,
    filters: Value,
    bias: Value,
    activation: str,
    scale: float | None,
) -> Held:
    depthwise = _groups(node) > 1
    kernel, stride = filters.shape[1:3], _pair(node, 3, 1)
    dilation = _pair(node, 5, 1)
    out = tuple(node.meta["val"].shape)
    shape = (out[0], out[2], out[3], out[1])
    reach = tuple((size - 1) * step + 1 for size, step in zip(kernel, dilation, strict=True))
    padding = _padding(node, reach)
    same = node.args[4:5] == ("same",) or _is_same(source.shape[1:3], reach, stride, padding)
    if not same and any(padding):
        rows, columns = padding
        source = build.pad(source, [0, rows, columns, 0, 0, rows, columns, 0])
    settings: dict[str, object] = {
        "padding": schema.Padding.SAME if same else schema.Padding.VALID,
        "strideH": stride[0],
        "strideW": stride[1],
        "dilationHFactor": dilation[0],
        "dilationWFactor": dilation[1],
        "fusedActivationFunction": ACTIVATIONS[activation],
    }
    if depthwise:
        settings["depthMultiplier"] = out[1] // source.shape[3]
    integers = scale is not None
    made = build.op(
        "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D",
        [source, filters, bias],
        shape,
        "int8" if integers else "float32",
        scale=scale,
        options="DepthwiseConv2DOptions" if depthwise else "Conv2DOptions",
        version=3 if integers else 1,
        settings=settings,
    )
    return Held.map(made)


def _is_same(
    size: Sequence[int], reach: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> bool:
    """Tell whether TFLite's SAME pads as asked: it pads what is missing, the odd one at the end."""
    for length, window, step, asked in zip(size, reach, stride, padding, strict=True):
        missing = max((-(-length // step) - 1) * step + window - length, 0)
        asked_rows = (length + 2 * asked - window) // step + 1
        if missing != 2 * asked or asked_rows != -(-length // step):
            return False
    return True
