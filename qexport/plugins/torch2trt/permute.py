"""Everything that changes the order of the axes."""

from __future__ import annotations

from collections.abc import Mapping

from qexport.plugins.torch2trt.data_types import live
from qexport.plugins.torch2trt.dotted import forms
from qexport.plugins.torch2trt.interface import ConversionContext, argument, give
from qexport.plugins.torch2trt.registration import Convert


def permute(context: ConversionContext) -> None:
    """Give the axes in the order that is asked for, as numbers or as a list of them."""
    given = context.method_kwargs.get("dims", context.method_args[1:])
    axes = given[0] if len(given) == 1 and not isinstance(given[0], int) else given
    _transpose(context, [int(axis) for axis in axes])


def swap(context: ConversionContext) -> None:
    """Exchange two axes."""
    axes = list(range(context.method_return.dim()))
    first = int(argument(context, 1, "dim0", argument(context, 1, "axis0", 0)))
    second = int(argument(context, 2, "dim1", argument(context, 2, "axis1", 1)))
    axes[first], axes[second] = axes[second], axes[first]
    _transpose(context, axes)


def reverse_two(context: ConversionContext) -> None:
    """Exchange the axes of a matrix; a vector stays."""
    _transpose(context, list(reversed(range(context.method_return.dim()))))


def _transpose(context: ConversionContext, axes: list[int]) -> None:
    layer = context.network.add_shuffle(live(context, argument(context, 0, "input")))
    layer.first_transpose = tuple(axis % len(axes) for axis in axes)
    give(context, layer.get_output(0))


CONVERTERS: Mapping[str, Convert] = {
    **dict.fromkeys(forms("permute"), permute),
    **dict.fromkeys(forms("transpose", "swapaxes"), swap),
    **dict.fromkeys(forms("t"), reverse_two),
}
"""By dotted name of the torch function."""
