"""torch.cat and torch.stack."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qexport.plugins.torch2trt.data_types import operand, reshaped
from qexport.plugins.torch2trt.interface import ConversionContext, argument, give
from qexport.plugins.torch2trt.registration import Convert


def join(context: ConversionContext) -> None:
    """Join tensors along an axis that they have."""
    tensors: list[torch.Tensor] = list(argument(context, 0, "tensors"))
    result = context.method_return
    axis = int(argument(context, 1, "dim", 0)) % result.dim()
    parts = [operand(context, tensor, result.dtype, tensor.dim()) for tensor in tensors if tensor.numel()]
    layer = context.network.add_concatenation(parts)
    layer.axis = axis
    give(context, layer.get_output(0))


def stack(context: ConversionContext) -> None:
    """Join tensors along a new axis."""
    tensors: list[torch.Tensor] = list(argument(context, 0, "tensors"))
    result = context.method_return
    axis = int(argument(context, 1, "dim", 0)) % result.dim()
    shape = [1 if index == axis else size for index, size in enumerate(result.shape)]
    parts = [
        reshaped(context, operand(context, tensor, result.dtype, tensor.dim()), shape) for tensor in tensors
    ]
    layer = context.network.add_concatenation(parts)
    layer.axis = axis
    give(context, layer.get_output(0))


CONVERTERS: Mapping[str, Convert] = {
    "torch.cat": join,
    "torch.concat": join,
    "torch.concatenate": join,
    "torch.stack": stack,
}
"""By dotted name of the torch function."""
