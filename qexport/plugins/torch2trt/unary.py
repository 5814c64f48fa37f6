"""Functions of one tensor that are one unary layer each."""

from __future__ import annotations

from collections.abc import Mapping

from qexport.errors import UnsupportedOperator
from qexport.plugins.torch2trt.data_types import operand
from qexport.plugins.torch2trt.dotted import forms
from qexport.plugins.torch2trt.interface import ConversionContext, argument, give
from qexport.plugins.torch2trt.registration import Convert, bind
from qexport.runtimes.tensorrt_library import load_library

_OPERATIONS = {
    "exp": ("EXP",),
    "log": ("LOG",),
    "sqrt": ("SQRT",),
    "rsqrt": ("SQRT", "RECIP"),
    "reciprocal": ("RECIP",),
    "abs": ("ABS",),
    "neg": ("NEG",),
    "negative": ("NEG",),
    "floor": ("FLOOR",),
    "ceil": ("CEIL",),
    "round": ("ROUND",),  # to even, as torch's
    "sign": ("SIGN",),
    "sin": ("SIN",),
    "cos": ("COS",),
    "erf": ("ERF",),
}


def _apply(context: ConversionContext, operations: tuple[str, ...]) -> None:
    value, result = argument(context, 0, "input"), context.method_return
    if argument(context, 1, "decimals", 0) != 0:
        raise UnsupportedOperator("round with decimals: multiply before and divide after.")
    trt = load_library().trt
    tensor = operand(context, value, result.dtype, result.dim())
    for operation in operations:
        layer = context.network.add_unary(tensor, getattr(trt.UnaryOperation, operation))
        tensor = layer.get_output(0)
    give(context, tensor)


CONVERTERS: Mapping[str, Convert] = {
    **{
        name: convert
        for short, operations in _OPERATIONS.items()
        for name, convert in bind(_apply, operations, *forms(short)).items()
    },
    **bind(_apply, ("NEG",), "torch.Tensor.__neg__"),
    **bind(_apply, ("ABS",), "torch.Tensor.__abs__"),
}
"""By dotted name of the torch function."""
