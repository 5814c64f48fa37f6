"""Average pooling in two dimensions."""

from __future__ import annotations

from qexport.errors import UnsupportedOperator
from qexport.plugins.torch2trt.conv2d import pair
from qexport.plugins.torch2trt.data_types import live
from qexport.plugins.torch2trt.interface import ConversionContext, argument, give
from qexport.runtimes.tensorrt_library import load_library

FUNCTIONS = ("torch.nn.functional.avg_pool2d",)


def convert(context: ConversionContext) -> None:
    """Add the layer.

    Raises:
        UnsupportedOperator: windows that hang over the edge, or a divisor of one's own.
    """
    trt = load_library().trt
    window = pair(argument(context, 1, "kernel_size"))
    padding = pair(argument(context, 3, "padding", 0))
    if argument(context, 4, "ceil_mode", False) or argument(context, 6, "divisor_override") is not None:
        raise UnsupportedOperator(
            "avg_pool2d with ceil_mode or divisor_override: TensorRT counts a window's pixels otherwise. "
            "Pad before, and pool without."
        )
    x = argument(context, 0, "input")
    layer = context.network.add_pooling_nd(live(context, x), trt.PoolingType.AVERAGE, window)
    layer.stride_nd, layer.padding_nd = pair(argument(context, 2, "stride") or window), padding
    layer.average_count_excludes_padding = not argument(context, 5, "count_include_pad", True)
    give(context, layer.get_output(0))
