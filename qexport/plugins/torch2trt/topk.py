"""The largest or smallest values of an axis, and where they stand."""

from __future__ import annotations

from qexport.errors import UnsupportedOperator
from qexport.plugins.torch2trt.data_types import cast, live, reshaped
from qexport.plugins.torch2trt.dotted import forms
from qexport.plugins.torch2trt.interface import ConversionContext, argument, give
from qexport.runtimes.tensorrt_library import load_library

FUNCTIONS = forms("topk")
MOST = 3840
"""TensorRT's builder refuses more."""


def convert(context: ConversionContext) -> None:
    """Add the layer; sorted, whatever is asked for.

    Of equal values TensorRT, like torch, promises no order.

    Raises:
        UnsupportedOperator: more than TensorRT can give.
    """
    x, count = argument(context, 0, "input"), int(argument(context, 1, "k"))
    if count > MOST:
        raise UnsupportedOperator(
            f"topk of {count} values: TensorRT's most is {MOST}. Take fewer, or split the axis and merge."
        )
    trt, values = load_library().trt, context.method_return[0]
    axis = int(argument(context, 2, "dim", -1)) % x.dim()
    largest = argument(context, 3, "largest", True)
    # The layer takes two axes or more.
    flat = x.dim() == 1
    tensor = reshaped(context, live(context, x), (1, *x.shape) if flat else tuple(x.shape))
    kind = trt.TopKOperation.MAX if largest else trt.TopKOperation.MIN
    layer = context.network.add_topk(tensor, kind, count, 1 << (axis + flat))
    found = (reshaped(context, layer.get_output(output), values.shape) for output in range(2))
    best, where = found
    give(context, best, cast(context, where, context.method_return[1].dtype))
