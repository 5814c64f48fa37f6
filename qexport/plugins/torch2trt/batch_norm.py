"""Batch norm with fixed statistics, and torchvision's FrozenBatchNorm2d, as one scale layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qexport.errors import UnsupportedOperator
from qexport.plugins.torch2trt.data_types import live, reshaped
from qexport.plugins.torch2trt.interface import ConversionContext, argument, give
from qexport.plugins.torch2trt.registration import Convert
from qexport.runtimes.tensorrt_library import load_library


def batch_norm(context: ConversionContext) -> None:
    """Convert `torch.nn.functional.batch_norm`.

    Raises:
        UnsupportedOperator: in training, where the statistics are those of the batch.
    """
    mean, variance = argument(context, 1, "running_mean"), argument(context, 2, "running_var")
    if argument(context, 5, "training", False) or mean is None or variance is None:
        raise UnsupportedOperator("batch_norm in training: call eval() on the model.")
    weight, bias = argument(context, 3, "weight"), argument(context, 4, "bias")
    _scale(
        context,
        argument(context, 0, "input"),
        mean,
        variance,
        weight,
        bias,
        argument(context, 7, "eps", 1e-5),
    )


def frozen_batch_norm(context: ConversionContext) -> None:
    """Convert `torchvision.ops.FrozenBatchNorm2d`, whose statistics are its own."""
    module: Any = argument(context, 0, "self")
    _scale(
        context,
        argument(context, 1, "x"),
        module.running_mean,
        module.running_var,
        module.weight,
        module.bias,
        module.eps,
    )


def _scale(
    context: ConversionContext,
    x: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> None:
    trt = load_library().trt
    scale = (variance + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    # The layer takes four axes or more.
    shape = (*x.shape, *[1] * (4 - x.dim()))
    layer = context.network.add_scale_nd(
        reshaped(context, live(context, x), shape),
        trt.ScaleMode.CHANNEL,
        shift.detach().cpu().to(torch.float32).numpy(),
        scale.detach().cpu().to(torch.float32).numpy(),
        trt.Weights(),
        1,
    )
    give(context, reshaped(context, layer.get_output(0), x.shape))


CONVERTERS: Mapping[str, Convert] = {
    "torch.nn.functional.batch_norm": batch_norm,
    "torchvision.ops.misc.FrozenBatchNorm2d.forward": frozen_batch_norm,
}
"""By dotted name of the torch function."""
