"""Linear layers: FULLY_CONNECTED, in integers and in float."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch.fx import Node

from qexport.plugins.tflite.activations import ACTIVATIONS
from qexport.plugins.tflite.held import Held, as_plain
from qexport.plugins.tflite.lowering import Lowering
from qexport.plugins.tflite.writer import Value
from qexport.quantization.graph import argument_node, scale_of


def integer(lowering: Lowering, node: Node, activation: str, scale: float) -> Held | None:
    """Write a linear layer of int8 codes; None where its weight or its activation is not one of the kernel's."""
    quantized = lowering.weight(argument_node(node, 1))
    quantizer = lowering.quantizer_behind(node.args[0])
    if quantized is None or quantizer is None or activation not in ACTIVATIONS:
        return None
    source = lowering.codes(quantizer)
    lowering.go_to(node)
    codes, scales = quantized
    steps = scales.double() * scale_of(quantizer)
    whole = np.round(_bias(lowering, node, codes.shape[0]) / steps.numpy()).astype(np.int32)
    given, columns = _rows(lowering, source)
    weight = lowering.build.weights(_ordered(codes.numpy(), columns), scales.tolist(), 0)
    bias = lowering.writer.constant(whole, name="bias", scales=steps.tolist())
    return _write(lowering, node, given, weight, bias, activation, scale)


def real(lowering: Lowering, node: Node) -> Held:
    """Write a linear layer in float32."""
    source = lowering.real(argument_node(node))
    given, columns = _rows(lowering, source)
    weight = lowering.values(node.args[1])
    stored = lowering.float_weight(_ordered(weight.numpy(), columns))
    bias = _bias(lowering, node, weight.shape[0]).astype(np.float32)
    return _write(lowering, node, given, stored, lowering.writer.constant(bias, name="bias"), "", None)


def _bias(lowering: Lowering, node: Node, rows: int) -> NDArray[np.float64]:
    if len(node.args) < 3 or node.args[2] is None:
        return np.zeros(rows)
    return lowering.constant(node.args[2]).double().numpy()


def _rows(lowering: Lowering, source: Held) -> tuple[Value, tuple[int, int, int] | None]:
    """Return the input, and of which map it was made where its columns stand channels last."""
    if source.layout == "flat map":
        return source.value, source.of
    return as_plain(lowering.build, source), None


def _ordered(weight: NDArray[np.generic], of: tuple[int, int, int] | None) -> NDArray[np.generic]:
    """Return the weight with its columns in the order of the input's."""
    if of is None:
        return weight
    rows = weight.shape[0]
    return np.ascontiguousarray(weight.reshape(rows, *of).transpose(0, 2, 3, 1).reshape(rows, -1))


def _write(
    lowering: Lowering,
    node: Node,
    source: Value,
    weight: Value,
    bias: Value,
    activation: str,
    scale: float | None,
) -> Held:
    integers = scale is not None
    rows = len(node.meta["val"].shape) > 2
    made = lowering.build.op(
        "FULLY_CONNECTED",
        [source, weight, bias],
        tuple(node.meta["val"].shape),
        "int8" if integers else "float32",
        scale=scale,
        options="FullyConnectedOptions",
        version=5 if rows else 4 if integers else 1,
        settings={"fusedActivationFunction": ACTIVATIONS[activation], "keepNumDims": rows},
    )
    return Held.plain(made)
