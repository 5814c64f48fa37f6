"""Choosing between two tensors: `where`, and `masked_fill` in place too."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qexport.errors import UnsupportedOperator
from qexport.plugins.torch2trt.data_types import Value, operand
from qexport.plugins.torch2trt.dotted import forms
from qexport.plugins.torch2trt.interface import ConversionContext, argument, give
from qexport.plugins.torch2trt.registration import Convert


def where(context: ConversionContext) -> None:
    """Take the second argument where the first is true, else the third."""
    if not isinstance(context.method_return, torch.Tensor):
        raise UnsupportedOperator("where with a condition alone: its result has no fixed shape. Use a mask.")
    _choose(
        context,
        argument(context, 0, "condition"),
        argument(context, 1, "input"),
        argument(context, 2, "other"),
    )


def where_method(context: ConversionContext) -> None:
    """`x.where(condition, other)`."""
    _choose(
        context,
        argument(context, 1, "condition"),
        argument(context, 0, "self"),
        argument(context, 2, "other"),
    )


def masked_fill(context: ConversionContext) -> None:
    """Put a number where the mask is true."""
    _choose(
        context, argument(context, 1, "mask"), argument(context, 2, "value"), argument(context, 0, "input")
    )


def _choose(context: ConversionContext, condition: torch.Tensor, chosen: Value, other: Value) -> None:
    result = context.method_return
    give(
        context,
        context.network.add_select(
            operand(context, condition, torch.bool, result.dim()),
            operand(context, chosen, result.dtype, result.dim()),
            operand(context, other, result.dtype, result.dim()),
        ).get_output(0),
    )


CONVERTERS: Mapping[str, Convert] = {
    "torch.where": where,
    "torch.Tensor.where": where_method,
    **dict.fromkeys(forms("masked_fill"), masked_fill),
}
"""By dotted name of the torch function."""
