"""Element-wise operators: of int8 codes, of layers in float, and box arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qexport.plugins.executorch.activations import limits_of
from qexport.plugins.executorch.held import Held, as_held, as_plain
from qexport.plugins.executorch.lowering import Integer, Lowering, Real
from qexport.plugins.executorch.steps import Value
from qexport.plugins.executorch.xnnpack import Limits, SegmentBuilder
from qexport.quantization.graph import argument_node

Compute = Callable[..., Tensor]


def integer(kind: str) -> Integer:
    """Return what writes an operator of two tensors of int8 codes."""

    def write(lowering: Lowering, node: Node, limits: Limits | None, scale: float) -> Held | None:
        quantizers = [lowering.quantizer_behind(source) for source in node.args[:2]]
        if None in quantizers:
            return None
        first, second = (lowering.codes(quantizer) for quantizer in quantizers if quantizer is not None)
        lowering.go_to(node)
        large, small = (first, second) if first.value.size >= second.value.size else (second, first)
        small = as_held(lowering.xnnpack, small, large)
        large = as_held(lowering.xnnpack, large, small)
        made = lowering.xnnpack.binary(kind, large.value, small.value, scale=scale, limits=limits)
        return large.with_value(made)

    return write


def binary(kind: str, compute: Compute) -> Real:
    """Return what writes an operator of two tensors, or of a tensor and a number.

    Args:
        kind: XNNPACK's node; empty where it has none.
        compute: ExecuTorch's kernel.
    """

    def write(lowering: Lowering, node: Node) -> Held:
        first, second = node.args[:2]
        if not isinstance(first, Node):
            held = lowering.real(argument_node(node, 1))
            return held.with_value(lowering.kernels.call(_swapped(compute), held.value, first))
        held = lowering.real(first)
        in_xnnpack = bool(kind) and lowering.in_xnnpack(node) and held.value.dtype == "float32"
        if not isinstance(second, Node):
            if not in_xnnpack:
                return held.with_value(lowering.kernels.call(compute, held.value, second))
            number = lowering.xnnpack.number(float(str(second)))
            return held.with_value(lowering.xnnpack.binary(kind, held.value, number))
        other = lowering.real(second)
        if held.layout == other.layout == "map" and len(held.shape) == len(other.shape):
            values = held.value, other.value
            layout = Held.map
        else:
            values = as_plain(lowering.xnnpack, held), as_plain(lowering.xnnpack, other)
            layout = Held.plain
        if in_xnnpack and other.value.dtype == "float32":
            return layout(lowering.xnnpack.binary(kind, *values))
        return layout(lowering.kernels.call(compute, *values))

    return write


def _swapped(compute: Compute) -> Compute:
    turned: dict[Compute, Compute] = {torch.sub: _subtracted_from, torch.div: _divided_into}
    return turned.get(compute, compute)


def _subtracted_from(value: Tensor, number: float) -> Tensor:
    return number - value


def _divided_into(value: Tensor, number: float) -> Tensor:
    return number / value


def unary(compute: Compute, in_xnnpack: Callable[[SegmentBuilder, Value], Value]) -> Real:
    """Return what writes a function of each element.

    Args:
        compute: ExecuTorch's kernel, for box arithmetic.
        in_xnnpack: writes it for a layer.
    """

    def write(lowering: Lowering, node: Node) -> Held:
        held = lowering.real(argument_node(node))
        if lowering.in_xnnpack(node):
            return held.with_value(in_xnnpack(lowering.xnnpack, held.value))
        return held.with_value(lowering.kernels.call(compute, held.value))

    return write


def node_of(kind: str) -> Callable[[SegmentBuilder, Value], Value]:
    """Return what writes a node of one input."""

    def write(xnnpack: SegmentBuilder, value: Value) -> Value:
        return xnnpack.unary(kind, value)

    return write


def clamp(lowering: Lowering, node: Node) -> Held:
    """Write values between two numbers."""
    held, limits = lowering.real(argument_node(node)), limits_of(node)
    if lowering.in_xnnpack(node):
        return held.with_value(lowering.xnnpack.clamp(held.value, limits))
    return held.with_value(lowering.kernels.call(torch.clamp, held.value, *limits))


def hardsigmoid(xnnpack: SegmentBuilder, value: Value) -> Value:
    """Return min(max(x / 6 + 1 / 2, 0), 1)."""
    sixth = xnnpack.binary("multiply", value, xnnpack.number(1 / 6))
    return xnnpack.binary("add", sixth, xnnpack.number(0.5), limits=(0.0, 1.0))


def silu(xnnpack: SegmentBuilder, value: Value) -> Value:
    """Return x times its sigmoid."""
    return xnnpack.binary("multiply", value, xnnpack.unary("sigmoid", value))


def leaky_relu(lowering: Lowering, node: Node) -> Held:
    """Write values, those below zero times a slope."""
    held = lowering.real(argument_node(node))
    slope = float(str(node.args[1])) if len(node.args) > 1 else 0.01
    return held.with_value(lowering.xnnpack.leaky_relu(held.value, slope))


def where(lowering: Lowering, node: Node) -> Held:
    """Write a tensor where a condition holds, else a tensor or a number."""
    condition, first = (
        as_plain(lowering.xnnpack, lowering.real(argument_node(node, place))) for place in (0, 1)
    )
    other: Any = node.args[2]
    second = as_plain(lowering.xnnpack, lowering.real(other)) if isinstance(other, Node) else other
    return Held.plain(lowering.kernels.call(torch.where, condition, first, second))


def total(lowering: Lowering, node: Node) -> Held:
    """Write the sum over axes, over all where none is named; how many hold, of bools."""
    value = as_plain(lowering.xnnpack, lowering.real(argument_node(node)))
    axes, keep = axes_of(node, len(value.shape))
    return Held.plain(lowering.kernels.call(torch.sum, value, list(axes), keep))


def softmax(lowering: Lowering, node: Node) -> Held:
    """Write the softmax over an axis."""
    value = as_plain(lowering.xnnpack, lowering.real(argument_node(node)))
    return Held.plain(lowering.kernels.call(torch.softmax, value, int(str(node.args[1]))))


def axes_of(node: Node, rank: int) -> tuple[tuple[int, ...], bool]:
    """Return the axes that a sum or a mean is taken over, and whether they stay as length 1."""
    given: Any = node.args[1] if len(node.args) > 1 else None
    axes = [given] if isinstance(given, int) else given
    keep = bool(node.args[2]) if len(node.args) > 2 else False
    return tuple(sorted(int(axis) % rank for axis in axes or range(rank))), keep
