"""Fake-quantizers, per tensor and per channel, as Q/DQ: what TensorRT makes int8 kernels of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qexport.errors import UnsupportedOperator
from qexport.plugins.torch2trt.data_types import live
from qexport.plugins.torch2trt.interface import TRT_TENSOR, ConversionContext, argument, constant, give
from qexport.plugins.torch2trt.registration import Convert
from qexport.runtimes.tensorrt_library import load_library

_LOWEST, _HIGHEST = -128, 127


def per_tensor(context: ConversionContext) -> None:
    """Add Q/DQ with one scale."""
    scale = torch.as_tensor(argument(context, 1, "scale"), dtype=torch.float32).reshape(())
    zero_point = torch.as_tensor(argument(context, 2, "zero_point")).reshape(1)
    codes = _codes(zero_point, argument(context, 3, "quant_min"), argument(context, 4, "quant_max"))
    _quantize(context, scale, codes, axis=None)


def per_channel(context: ConversionContext) -> None:
    """Add Q/DQ with a scale per channel."""
    scale, zero_point = argument(context, 1, "scale"), argument(context, 2, "zero_point")
    codes = _codes(zero_point, argument(context, 4, "quant_min"), argument(context, 5, "quant_max"))
    axis = int(argument(context, 3, "axis")) % context.method_return.dim()
    _quantize(context, scale.detach().cpu().to(torch.float32), codes, axis=axis)


def _codes(zero_point: torch.Tensor, lowest: int, highest: int) -> tuple[int, int]:
    """Return the codes that are used, counted from the zero point, which TensorRT has at 0.

    Raises:
        UnsupportedOperator: they do not fit int8.
    """
    zero_points = {int(value) for value in zero_point}
    if len(zero_points) == 1:
        (zero,) = zero_points
        shifted = lowest - zero, highest - zero
        if shifted[0] >= _LOWEST and shifted[1] <= _HIGHEST:
            return shifted
    raise UnsupportedOperator(
        f"fake-quantizer with codes {lowest}..{highest} and zero point {sorted(zero_points)}: TensorRT quantizes "
        "to int8 around zero. Use symmetric quantization with zero point 0 and codes within -128..127."
    )


def _quantize(
    context: ConversionContext, scale: torch.Tensor, codes: tuple[int, int], *, axis: int | None
) -> None:
    trt, network = load_library().trt, context.network
    x: torch.Tensor = argument(context, 0, "input")
    if codes == (_LOWEST, _HIGHEST):
        tensor = live(context, x)
    elif hasattr(x, TRT_TENSOR):
        tensor = _clipped(context, live(context, x), scale, codes)
    else:
        tensor = constant(context, _clipped_constant(x, scale, codes, axis).numpy())
    step = constant(context, scale.numpy())
    quantize = (
        network.add_quantize(tensor, step, trt.int8)
        if _takes_type(trt)
        else network.add_quantize(tensor, step)
    )
    codes_tensor = quantize.get_output(0)
    dequantize = (
        network.add_dequantize(codes_tensor, step, trt.float32)
        if _takes_type(trt)
        else network.add_dequantize(codes_tensor, step)
    )
    if axis is not None:
        quantize.axis = dequantize.axis = axis
    give(context, dequantize.get_output(0))


def _takes_type(trt: Any) -> bool:
    """Tell whether the layers are told their output's type, as in strongly typed networks (TensorRT 10 on)."""
    return "STRONGLY_TYPED" in getattr(trt.NetworkDefinitionCreationFlag, "__members__", {})


def _clipped_constant(
    x: torch.Tensor, scale: torch.Tensor, codes: tuple[int, int], axis: int | None
) -> torch.Tensor:
    """Return a constant, int8 weights for instance, within what its codes stand for."""
    view = [1] * x.dim()
    if axis is not None:
        view[axis] = -1
    step = scale.reshape(view)
    return torch.minimum(torch.maximum(x.detach().cpu(), codes[0] * step), codes[1] * step)


def _clipped(context: ConversionContext, tensor: Any, scale: torch.Tensor, codes: tuple[int, int]) -> Any:
    if scale.dim():
        raise UnsupportedOperator(
            f"fake-quantizer per channel of activations with codes {codes[0]}..{codes[1]} from its zero point: "
            "TensorRT clips at -128..127 alone."
        )
    layer = context.network.add_activation(tensor, load_library().trt.ActivationType.CLIP)
    layer.alpha, layer.beta = codes[0] * float(scale), codes[1] * float(scale)
    return layer.get_output(0)


CONVERTERS: Mapping[str, Convert] = {
    "torch.fake_quantize_per_tensor_affine": per_tensor,
    "torch.fake_quantize_per_channel_affine": per_channel,
}
"""By dotted name of the torch function."""
