"""A linear layer: a matrix product with the transposed weights, and the bias."""

from __future__ import annotations

from qexport.plugins.torch2trt.data_types import live, operand, reshaped
from qexport.plugins.torch2trt.interface import ConversionContext, argument, give
from qexport.runtimes.tensorrt_library import load_library

FUNCTIONS = ("torch.nn.functional.linear",)


def convert(context: ConversionContext) -> None:
    """Add the layers."""
    trt = load_library().trt
    x, weight, bias = (
        argument(context, 0, "input"),
        argument(context, 1, "weight"),
        argument(context, 2, "bias"),
    )
    result = context.method_return
    rows = reshaped(context, live(context, x), (x.numel() // x.shape[-1], x.shape[-1]))
    tensor = context.network.add_matrix_multiply(
        rows, trt.MatrixOperation.NONE, live(context, weight), trt.MatrixOperation.TRANSPOSE
    ).get_output(0)
    if bias is not None:
        added = operand(context, bias, result.dtype, 2)
        tensor = context.network.add_elementwise(tensor, added, trt.ElementWiseOperation.SUM).get_output(0)
    give(context, reshaped(context, tensor, result.shape))
