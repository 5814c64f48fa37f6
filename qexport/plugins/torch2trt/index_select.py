"""Rows chosen by their numbers: `index_select`, and elements chosen one by one: `gather`."""

from __future__ import annotations

from collections.abc import Mapping

from qexport.plugins.torch2trt.data_types import live
from qexport.plugins.torch2trt.dotted import forms
from qexport.plugins.torch2trt.interface import ConversionContext, argument, give
from qexport.plugins.torch2trt.registration import Convert
from qexport.runtimes.tensorrt_library import load_library


def index_select(context: ConversionContext) -> None:
    """Take rows of an axis."""
    x, chosen = argument(context, 0, "input"), argument(context, 2, "index")
    axis = int(argument(context, 1, "dim")) % x.dim()
    give(context, context.network.add_gather(live(context, x), live(context, chosen), axis).get_output(0))


def gather(context: ConversionContext) -> None:
    """Take one element of an axis for every element of the index."""
    x, chosen = argument(context, 0, "input"), argument(context, 2, "index")
    mode = load_library().trt.GatherMode.ELEMENT
    layer = context.network.add_gather_v2(live(context, x), live(context, chosen), mode)
    layer.axis = int(argument(context, 1, "dim")) % x.dim()
    give(context, layer.get_output(0))


CONVERTERS: Mapping[str, Convert] = {
    **dict.fromkeys(forms("index_select"), index_select),
    **dict.fromkeys(forms("gather"), gather),
}
"""By dotted name of the torch function."""
