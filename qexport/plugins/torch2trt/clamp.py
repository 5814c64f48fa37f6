"""Clamping between numbers or tensors, in place too."""

from __future__ import annotations

from collections.abc import Mapping

from qexport.plugins.torch2trt.data_types import Value, operand
from qexport.plugins.torch2trt.dotted import forms
from qexport.plugins.torch2trt.interface import ConversionContext, argument, give
from qexport.plugins.torch2trt.registration import Convert
from qexport.runtimes.tensorrt_library import load_library


def clamp(context: ConversionContext) -> None:
    """Bound from both sides, or from the one that is given."""
    _bound(context, argument(context, 1, "min"), argument(context, 2, "max"))


def clamp_min(context: ConversionContext) -> None:
    """Bound from below."""
    _bound(context, argument(context, 1, "min"), None)


def clamp_max(context: ConversionContext) -> None:
    """Bound from above."""
    _bound(context, None, argument(context, 1, "max"))


def _bound(context: ConversionContext, low: Value | None, high: Value | None) -> None:
    operations, result = load_library().trt.ElementWiseOperation, context.method_return
    tensor = operand(context, argument(context, 0, "input"), result.dtype, result.dim())
    # The upper bound last: it wins where it is the lower of the two, as in torch.
    for bound, operation in ((low, operations.MAX), (high, operations.MIN)):
        if bound is not None:
            limit = operand(context, bound, result.dtype, result.dim())
            tensor = context.network.add_elementwise(tensor, limit, operation).get_output(0)
    give(context, tensor)


CONVERTERS: Mapping[str, Convert] = {
    **dict.fromkeys(forms("clamp", "clip"), clamp),
    **dict.fromkeys(forms("clamp_min"), clamp_min),
    **dict.fromkeys(forms("clamp_max"), clamp_max),
}
"""By dotted name of the torch function."""
