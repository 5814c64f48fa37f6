"""Max-pooling in two dimensions."""

from __future__ import annotations

from qexport.errors import UnsupportedOperator
from qexport.plugins.torch2trt.conv2d import pair
from qexport.plugins.torch2trt.data_types import live
from qexport.plugins.torch2trt.dotted import forms
from qexport.plugins.torch2trt.interface import ConversionContext, argument, give
from qexport.runtimes.tensorrt_library import load_library

FUNCTIONS = forms("max_pool2d")


def convert(context: ConversionContext) -> None:
    """Add the layer.

    Raises:
        UnsupportedOperator: a dilation, which TensorRT's pooling has not.
    """
    trt = load_library().trt
    window = pair(argument(context, 1, "kernel_size"))
    dilation = pair(argument(context, 4, "dilation", 1))
    if dilation != (1, 1):
        raise UnsupportedOperator(
            f"max_pool2d with dilation {dilation}: TensorRT pools without; use dilation 1."
        )
    x = argument(context, 0, "input")
    layer = context.network.add_pooling_nd(live(context, x), trt.PoolingType.MAX, window)
    layer.stride_nd = pair(argument(context, 2, "stride") or window)
    layer.padding_nd = pair(argument(context, 3, "padding", 0))
    rounding = "EXPLICIT_ROUND_UP" if argument(context, 5, "ceil_mode", False) else "EXPLICIT_ROUND_DOWN"
    layer.padding_mode = getattr(trt.PaddingMode, rounding)
    give(context, layer.get_output(0))
