"""Convolution in two dimensions, with weights that are constants or that went through a fake-quantizer."""

from __future__ import annotations

import torch

from qexport.plugins.torch2trt.data_types import live
from qexport.plugins.torch2trt.dotted import forms
from qexport.plugins.torch2trt.interface import TRT_TENSOR, ConversionContext, argument, give
from qexport.runtimes.tensorrt_library import load_library

FUNCTIONS = forms("conv2d")


def convert(context: ConversionContext) -> None:
    """Add the convolution; weights from a quantizer are its second input, the form that TensorRT fuses."""
    trt = load_library().trt
    x, weight = argument(context, 0, "input"), argument(context, 1, "weight")
    bias: torch.Tensor | None = argument(context, 2, "bias")
    from_quantizer = hasattr(weight, TRT_TENSOR)
    layer = context.network.add_convolution_nd(
        live(context, x),
        int(weight.shape[0]),
        (int(weight.shape[2]), int(weight.shape[3])),
        trt.Weights() if from_quantizer else weight.detach().cpu().contiguous().numpy(),
        trt.Weights() if bias is None else bias.detach().cpu().contiguous().numpy(),
    )
    if from_quantizer:
        layer.set_input(1, getattr(weight, TRT_TENSOR))
    dilation = pair(argument(context, 5, "dilation", 1))
    before, after = _padding(argument(context, 4, "padding", 0), weight, dilation)
    layer.stride_nd, layer.dilation_nd = pair(argument(context, 3, "stride", 1)), dilation
    layer.pre_padding, layer.post_padding = before, after
    layer.num_groups = int(argument(context, 6, "groups", 1))
    give(context, layer.get_output(0))


def pair(value: int | tuple[int, ...] | list[int]) -> tuple[int, int]:
    """Return height and width of an argument that may be one number for both."""
    numbers = [value] if isinstance(value, int) else list(value)
    return int(numbers[0]), int(numbers[-1])


def _padding(
    value: str | int | tuple[int, ...] | list[int], weight: torch.Tensor, dilation: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the padding before and after; torch's `same` puts the odd pixel behind."""
    if isinstance(value, str):
        if value == "valid":
            return (0, 0), (0, 0)
        whole = [step * (int(size) - 1) for step, size in zip(dilation, weight.shape[2:], strict=True)]
        return (whole[0] // 2, whole[1] // 2), (whole[0] - whole[0] // 2, whole[1] - whole[1] // 2)
    return pair(value), pair(value)
