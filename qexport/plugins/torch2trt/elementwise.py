"""Arithmetic of two tensors, or of a tensor and a number, with torch's promotion of types."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qexport.errors import UnsupportedOperator
from qexport.plugins.torch2trt.data_types import Value, operand
from qexport.plugins.torch2trt.dotted import forms
from qexport.plugins.torch2trt.interface import ConversionContext, argument, give
from qexport.plugins.torch2trt.registration import Convert, bind
from qexport.runtimes.tensorrt_library import load_library


def _operate(context: ConversionContext, operation: str, left: Value, right: Value) -> None:
    result = context.method_return
    sides = [operand(context, value, result.dtype, result.dim()) for value in (left, right)]
    kind = getattr(load_library().trt.ElementWiseOperation, operation)
    give(context, context.network.add_elementwise(*sides, kind).get_output(0))


def _operands(context: ConversionContext) -> tuple[Value, Value]:
    return argument(context, 0, "input"), argument(context, 1, "other")


def _scaled(context: ConversionContext, value: Value) -> Value:
    """Return `alpha * value`; torch.add and torch.sub take an alpha, which detectors never use."""
    alpha: float = argument(context, 2, "alpha", 1)
    if alpha == 1:
        return value
    if isinstance(value, torch.Tensor):
        raise UnsupportedOperator(
            f"alpha={alpha} of an addition: multiply by it before, and add without alpha."
        )
    return value * alpha


def _plain(context: ConversionContext, operation: str) -> None:
    _operate(context, operation, *_operands(context))


def _sum(context: ConversionContext, operation: str) -> None:
    left, right = _operands(context)
    _operate(context, operation, left, _scaled(context, right))


def _reversed(context: ConversionContext, operation: str) -> None:
    left, right = _operands(context)
    _operate(context, operation, right, left)


def _divide(context: ConversionContext, operation: str) -> None:
    rounding = argument(context, 2, "rounding_mode")
    integers = not context.method_return.is_floating_point()
    if rounding == "floor":
        operation = "FLOOR_DIV"
    elif rounding is not None and not integers:
        raise UnsupportedOperator(
            f"div with rounding_mode={rounding!r} of floats: TensorRT rounds down alone."
        )
    _operate(context, operation, *_operands(context))


def _methods(*names: str) -> tuple[str, ...]:
    return tuple(f"torch.Tensor.__{name}__" for name in names)


CONVERTERS: Mapping[str, Convert] = {
    **bind(_sum, "SUM", *forms("add"), *_methods("add", "iadd", "radd")),
    **bind(_sum, "SUB", *forms("sub", "subtract"), *_methods("sub", "isub")),
    **bind(_reversed, "SUB", *forms("rsub"), *_methods("rsub")),
    **bind(_plain, "PROD", *forms("mul", "multiply"), *_methods("mul", "imul", "rmul")),
    **bind(_divide, "DIV", *forms("div", "divide", "true_divide"), *_methods("truediv", "itruediv")),
    **bind(_reversed, "DIV", *_methods("rtruediv")),
    **bind(_plain, "FLOOR_DIV", *forms("floor_divide"), *_methods("floordiv", "ifloordiv")),
    **bind(_plain, "POW", *forms("pow"), *_methods("pow", "ipow")),
    **bind(_plain, "MAX", *forms("maximum")),
    **bind(_plain, "MIN", *forms("minimum")),
}
"""By dotted name of the torch function."""
