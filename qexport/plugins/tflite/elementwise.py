"""Element-wise operators: adds and products of integers, and float arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch.fx import Node

from qexport.errors import UnsupportedOperator
from qexport.plugins.tflite.activations import ACTIVATIONS, limits_of
from qexport.plugins.tflite.builder import TfliteBuilder
from qexport.plugins.tflite.held import Held, as_held, as_plain
from qexport.plugins.tflite.lowering import Integer, Lowering, Real
from qexport.plugins.tflite.writer import Value
from qexport.quantization.graph import argument_node, site_of

Binary = Callable[[TfliteBuilder, Value, Value], Value]
Unary = Callable[[TfliteBuilder, Value], Value]
_OPTIONS = {"ADD": "AddOptions", "MUL": "MulOptions"}


def integer(code: str) -> Integer:
    """Return what writes an operator of two tensors of int8 codes."""

    def write(lowering: Lowering, node: Node, activation: str, scale: float) -> Held | None:
        quantizers = [lowering.quantizer_behind(source) for source in node.args[:2]]
        if activation not in ACTIVATIONS or None in quantizers:
            return None
        first, second = (lowering.codes(quantizer) for quantizer in quantizers if quantizer is not None)
        lowering.go_to(node)
        large, small = (first, second) if _size(first) >= _size(second) else (second, first)
        small = as_held(lowering.build, small, large)
        large = as_held(lowering.build, large, small)
        made = lowering.build.op(
            code,
            [large.value, small.value],
            large.value.shape,
            "int8",
            scale=scale,
            options=_OPTIONS[code],
            version=2,
            settings={"fusedActivationFunction": ACTIVATIONS[activation]},
        )
        return Held(made, large.shape, large.layout, large.of)

    return write


def _size(held: Held) -> int:
    return int(np.prod(held.shape))


def binary(compute: Binary) -> Real:
    """Return what writes an operator of two tensors, or of a tensor and a number."""

    def write(lowering: Lowering, node: Node) -> Held:
        first, second = node.args[:2]
        if not isinstance(first, Node):
            held = lowering.real(second)  # type: ignore[arg-type]
            return _like(
                held, compute(lowering.build, lowering.build.scalar(_number(first), held.value), held.value)
            )
        held = lowering.real(first)
        if not isinstance(second, Node):
            return _like(
                held, compute(lowering.build, held.value, lowering.build.scalar(_number(second), held.value))
            )
        other = lowering.real(second)
        if held.layout == other.layout == "map" and len(held.shape) == len(other.shape):
            return Held.map(compute(lowering.build, held.value, other.value))
        values = _same_type(lowering.build, as_plain(lowering.build, held), as_plain(lowering.build, other))
        return Held.plain(compute(lowering.build, *values))

    return write


def unary(compute: Unary) -> Real:
    """Return what writes a function of each element."""

    def write(lowering: Lowering, node: Node) -> Held:
        held = lowering.real(argument_node(node))
        return _like(held, compute(lowering.build, held.value))

    return write


def clamp(lowering: Lowering, node: Node) -> Held:
    """Write values between two numbers."""
    held = lowering.real(argument_node(node))
    return _like(held, lowering.build.clip(held.value, *limits_of(node)))


def where(lowering: Lowering, node: Node) -> Held:
    """Write a tensor where a condition holds, else a tensor or a number."""
    build = lowering.build
    condition, first = (as_plain(build, lowering.real(argument_node(node, place))) for place in (0, 1))
    other = node.args[2]
    second = (
        as_plain(build, lowering.real(other))
        if isinstance(other, Node)
        else build.scalar(_number(other), first)
    )
    return Held.plain(build.where(condition, first, second))


def total(lowering: Lowering, node: Node) -> Held:
    """Write the sum over axes, over all where none is named; how many hold, of bools."""
    value = as_plain(lowering.build, lowering.real(argument_node(node)))
    if value.dtype == "bool":
        value = lowering.build.cast(value, np.int32)
    axes, keep = axes_of(node, len(value.shape))
    return Held.plain(lowering.build.reduce("SUM", value, axes, keep=keep))


def softmax(lowering: Lowering, node: Node) -> Held:
    """Write the softmax over the last axis.

    Raises:
        UnsupportedOperator: another axis.
    """
    rank = len(node.meta["val"].shape)
    if int(str(node.args[1])) % rank != rank - 1:
        raise UnsupportedOperator(f"softmax in {site_of(node).path}: TFLite takes it over the last axis.")
    return Held.plain(lowering.build.softmax(as_plain(lowering.build, lowering.real(argument_node(node)))))


def axes_of(node: Node, rank: int) -> tuple[tuple[int, ...], bool]:
    """Return the axes that a sum or a mean is taken over, and whether they stay as length 1."""
    given: Any = node.args[1] if len(node.args) > 1 else None
    axes = [given] if isinstance(given, int) else given
    keep = bool(node.args[2]) if len(node.args) > 2 else False
    return tuple(sorted(int(axis) % rank for axis in axes or range(rank))), keep


def hardsigmoid(build: TfliteBuilder, value: Value) -> Value:
    """Return min(max(x / 6 + 1 / 2, 0), 1)."""
    shifted = build.add(build.mul(value, build.scalar(1 / 6, value)), build.scalar(0.5, value))
    return build.clip(shifted, 0.0, 1.0)


def silu(build: TfliteBuilder, value: Value) -> Value:
    """Return x times its sigmoid."""
    return build.mul(value, build.unary("LOGISTIC", value))


def _like(held: Held, value: Value) -> Held:
    return Held(value, held.shape, held.layout, held.of)


def _number(value: object) -> float:
    return float(str(value))


def _same_type(build: TfliteBuilder, first: Value, second: Value) -> tuple[Value, Value]:
    """Return two values in one type: a product of numbers and bools is one of numbers."""
    if first.dtype == second.dtype:
        return first, second
    wanted = max((first.dtype, second.dtype), key=("bool", "int32", "float32").index)
    return build.cast(first, np.dtype(wanted).type), build.cast(second, np.dtype(wanted).type)
