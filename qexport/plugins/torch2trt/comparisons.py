"""Comparisons and logic. TensorRT has equal, greater and less; the others are made of them, exact also for NaN."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qexport.errors import UnsupportedOperator
from qexport.plugins.torch2trt.data_types import operand
from qexport.plugins.torch2trt.dotted import forms
from qexport.plugins.torch2trt.interface import ConversionContext, argument, give
from qexport.plugins.torch2trt.registration import Convert, bind
from qexport.runtimes.tensorrt_library import load_library


def _elementwise(context: ConversionContext, operation: str, left: Any, right: Any) -> Any:
    kind = getattr(load_library().trt.ElementWiseOperation, operation)
    return context.network.add_elementwise(left, right, kind).get_output(0)


def _not(context: ConversionContext, tensor: Any) -> Any:
    return context.network.add_unary(tensor, load_library().trt.UnaryOperation.NOT).get_output(0)


def _compare(context: ConversionContext, operations: tuple[str, ...]) -> None:
    left, right = argument(context, 0, "input"), argument(context, 1, "other")
    compared = torch.result_type(left, right)
    # TensorRT compares numbers only.
    dtype = torch.int32 if compared == torch.bool else compared
    dimensions = context.method_return.dim()
    sides = [operand(context, value, dtype, dimensions) for value in (left, right)]
    if operations == ("NOT_EQUAL",):
        give(context, _not(context, _elementwise(context, "EQUAL", *sides)))
        return
    found = [_elementwise(context, operation, *sides) for operation in operations]
    give(context, found[0] if len(found) == 1 else _elementwise(context, "OR", *found))


def _combine(context: ConversionContext, operation: str) -> None:
    values = argument(context, 0, "input"), argument(context, 1, "other")
    if context.method_return.dtype != torch.bool:
        raise UnsupportedOperator("bitwise arithmetic of integers: TensorRT has it for bool alone.")
    sides = [operand(context, value, torch.bool, context.method_return.dim()) for value in values]
    give(context, _elementwise(context, operation, *sides))


def _invert(context: ConversionContext, operation: str) -> None:
    value = argument(context, 0, "input")
    if context.method_return.dtype != torch.bool:
        raise UnsupportedOperator(f"{operation} of integers: TensorRT has it for bool alone.")
    give(context, _not(context, operand(context, value, torch.bool, value.dim())))


def _methods(*names: str) -> tuple[str, ...]:
    return tuple(f"torch.Tensor.__{name}__" for name in names)


CONVERTERS: Mapping[str, Convert] = {
    **bind(_compare, ("EQUAL",), *forms("eq"), *_methods("eq")),
    **bind(_compare, ("NOT_EQUAL",), *forms("ne", "not_equal"), *_methods("ne")),
    **bind(_compare, ("GREATER",), *forms("gt", "greater"), *_methods("gt")),
    **bind(_compare, ("GREATER", "EQUAL"), *forms("ge", "greater_equal"), *_methods("ge")),
    **bind(_compare, ("LESS",), *forms("lt", "less"), *_methods("lt")),
    **bind(_compare, ("LESS", "EQUAL"), *forms("le", "less_equal"), *_methods("le")),
    **bind(_combine, "AND", *forms("logical_and", "bitwise_and"), *_methods("and", "iand", "rand")),
    **bind(_combine, "OR", *forms("logical_or", "bitwise_or"), *_methods("or", "ior", "ror")),
    **bind(_combine, "XOR", *forms("logical_xor", "bitwise_xor"), *_methods("xor", "ixor", "rxor")),
    **bind(_invert, "not", *forms("logical_not", "bitwise_not"), *_methods("invert")),
}
"""By dotted name of the torch function."""
