"""Everything that changes the shape and not the order of the values."""

from __future__ import annotations

from qexport.plugins.torch2trt.data_types import live, reshaped
from qexport.plugins.torch2trt.dotted import forms
from qexport.plugins.torch2trt.interface import ConversionContext, argument, give

FUNCTIONS = forms("reshape", "reshape_as", "view", "view_as", "flatten", "unflatten", "squeeze", "unsqueeze")


def convert(context: ConversionContext) -> None:
    """Add a shuffle layer to the shape that torch found; the sizes are fixed with the frame's."""
    x = argument(context, 0, "input")
    give(context, reshaped(context, live(context, x), context.method_return.shape))
