"""What leaves the values as they are: copies, casts, broadcasts, and dropout outside training."""

from __future__ import annotations

from collections.abc import Mapping

from qexport.errors import UnsupportedOperator
from qexport.plugins.torch2trt.data_types import cast, live, operand
from qexport.plugins.torch2trt.dotted import forms
from qexport.plugins.torch2trt.interface import ConversionContext, argument, give
from qexport.plugins.torch2trt.registration import Convert


def copy(context: ConversionContext) -> None:
    """Give the tensor itself, in the result's data type."""
    x = argument(context, 0, "input")
    give(context, cast(context, live(context, x), context.method_return.dtype))


def dropout(context: ConversionContext) -> None:
    """Give the tensor itself.

    Raises:
        UnsupportedOperator: in training.
    """
    if argument(context, 2, "training", True):
        raise UnsupportedOperator("dropout in training: call eval() on the model.")
    give(context, live(context, argument(context, 0, "input")))


def expand(context: ConversionContext) -> None:
    """Repeat axes of size 1."""
    result, x = context.method_return, argument(context, 0, "input")
    tensor = operand(context, x, x.dtype, result.dim())
    if tuple(tensor.shape) == tuple(result.shape):
        give(context, tensor)
        return
    step = tuple(int(own == size) for own, size in zip(tuple(tensor.shape), result.shape, strict=True))
    start = (0,) * result.dim()
    give(context, context.network.add_slice(tensor, start, tuple(result.shape), step).get_output(0))


_CASTS = ("to", "type", "type_as", "float", "half", "int", "long", "bool")
CONVERTERS: Mapping[str, Convert] = {
    **dict.fromkeys((f"torch.Tensor.{name}" for name in _CASTS), copy),
    **dict.fromkeys(forms("clone", "detach", "contiguous"), copy),
    **dict.fromkeys(forms("dropout"), dropout),
    **dict.fromkeys(forms("expand", "expand_as", "broadcast_to"), expand),
}
"""By dotted name of the torch function."""
