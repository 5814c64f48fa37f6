"""Softmax over one axis."""

from __future__ import annotations

from qexport.errors import UnsupportedOperator
from qexport.plugins.torch2trt.data_types import operand
from qexport.plugins.torch2trt.dotted import forms
from qexport.plugins.torch2trt.interface import ConversionContext, argument, give

FUNCTIONS = forms("softmax")


def convert(context: ConversionContext) -> None:
    """Add the layer."""
    x, axis, result = argument(context, 0, "input"), argument(context, 1, "dim"), context.method_return
    if axis is None:
        raise UnsupportedOperator("softmax without dim: say over which axis.")
    layer = context.network.add_softmax(operand(context, x, result.dtype, result.dim()))
    layer.axes = 1 << int(axis) % result.dim()
    give(context, layer.get_output(0))
