"""Softmax over one axis, and its logarithm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qexport.errors import UnsupportedOperator
from qexport.plugins.torch2trt.data_types import operand
from qexport.plugins.torch2trt.dotted import forms
from qexport.plugins.torch2trt.interface import ConversionContext, argument, give
from qexport.plugins.torch2trt.registration import Convert
from qexport.runtimes.tensorrt_library import load_library


def softmax(context: ConversionContext) -> None:
    """Add the layer."""
    give(context, _softmax(context))


def log_softmax(context: ConversionContext) -> None:
    """Add softmax and logarithm; a probability that float32 cannot hold has the logarithm -inf."""
    logarithm = load_library().trt.UnaryOperation.LOG
    give(context, context.network.add_unary(_softmax(context), logarithm).get_output(0))


def _softmax(context: ConversionContext) -> Any:
    x, axis, result = argument(context, 0, "input"), argument(context, 1, "dim"), context.method_return
    if axis is None:
        raise UnsupportedOperator("softmax without dim: say over which axis.")
    layer = context.network.add_softmax(operand(context, x, result.dtype, result.dim()))
    layer.axes = 1 << int(axis) % result.dim()
    return layer.get_output(0)


CONVERTERS: Mapping[str, Convert] = {
    **dict.fromkeys(forms("softmax"), softmax),
    **dict.fromkeys(forms("log_softmax"), log_softmax),
}
"""By dotted name of the torch function."""
