"""What a converter sees of torch2trt: the narrow interface that ours are written against.

torch2trt calls a converter once for every call of the torch function that it is registered for, after the
function itself has run. The converter adds layers to the network and hangs the TensorRT tensor that stands
for the function's result on that result, as its attribute `_trt`. Nothing else of torch2trt is used, so a
converter can be run, and tested, where only TensorRT is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

TRT_TENSOR = "_trt"
"""Attribute under which torch2trt keeps the `tensorrt.ITensor` that stands for a torch tensor."""


class ConversionContext(Protocol):
    """The part of `torch2trt.torch2trt.ConversionContext` that converters use."""

    network: Any
    """A `tensorrt.INetworkDefinition`, or torch2trt's wrapper around one."""
    method_args: Sequence[Any]
    """Positional arguments of the call."""
    method_kwargs: dict[str, Any]
    """Keyword arguments of the call."""
    method_return: Any
    """What the function returned: a tensor, or a tuple of tensors."""


def argument(ctx: ConversionContext, position: int, name: str, default: Any = None) -> Any:
    """Return an argument of the call, however it was given."""
    if name in ctx.method_kwargs:
        return ctx.method_kwargs[name]
    return ctx.method_args[position] if len(ctx.method_args) > position else default


def trt_tensor(ctx: ConversionContext, value: torch.Tensor) -> Any:
    """Return the `tensorrt.ITensor` of a tensor; one that no converter made becomes a constant."""
    if not hasattr(value, TRT_TENSOR):
        setattr(value, TRT_TENSOR, constant(ctx, value.detach().cpu().numpy()))
    return getattr(value, TRT_TENSOR)


def constant(ctx: ConversionContext, array: NDArray[np.generic]) -> Any:
    """Return a constant; TensorRT reads the memory while it builds, so the network keeps the array."""
    layer = ctx.network.add_constant(array.shape, np.ascontiguousarray(array).reshape(array.shape))
    return layer.get_output(0)


def give(ctx: ConversionContext, *tensors: Any) -> None:
    """Say which TensorRT tensors stand for the function's result, or for the members of its tuple."""
    results = [ctx.method_return] if isinstance(ctx.method_return, torch.Tensor) else list(ctx.method_return)
    for result, tensor in zip(results, tensors, strict=True):
        setattr(result, TRT_TENSOR, tensor)
