"""Data types: torch's as TensorRT's, and casts between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qexport.errors import UnsupportedOperator
from qexport.plugins.torch2trt.interface import TRT_TENSOR, ConversionContext, constant
from qexport.runtimes.tensorrt_library import load_library

_NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.bool: "bool",
}
Value = torch.Tensor | bool | int | float
"""What torch's arithmetic takes."""


def tensorrt_type(dtype: torch.dtype) -> Any:
    """Return TensorRT's data type; int64 is int32 before TensorRT 10, which has no wider one.

    Raises:
        UnsupportedOperator: TensorRT has no such type.
    """
    trt, name = load_library().trt, _NAMES.get(dtype, "")
    if hasattr(trt, name):
        return getattr(trt, name)
    if dtype == torch.int64:
        return trt.int32
    raise UnsupportedOperator(
        f"TensorRT {trt.__version__} has no data type for {dtype}; cast the tensor before."
    )


def held_type(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which constants are given to TensorRT: int32 where it has no int64."""
    trt = load_library().trt
    return torch.int32 if dtype == torch.int64 and not hasattr(trt, "int64") else dtype


def cast(context: ConversionContext, tensor: Any, dtype: torch.dtype) -> Any:
    """Return a TensorRT tensor in another data type; the tensor itself where it has it already."""
    wanted = tensorrt_type(dtype)
    if tensor.dtype == wanted:
        return tensor
    if hasattr(context.network, "add_cast"):
        return context.network.add_cast(tensor, wanted).get_output(0)
    layer = context.network.add_identity(tensor)  # TensorRT before 8.5
    layer.set_output_type(0, wanted)
    return layer.get_output(0)


def reshaped(context: ConversionContext, tensor: Any, shape: Sequence[int]) -> Any:
    """Return a TensorRT tensor in another shape; the tensor itself where it has it already."""
    if tuple(tensor.shape) == tuple(shape):
        return tensor
    layer = context.network.add_shuffle(tensor)
    layer.reshape_dims = tuple(int(size) for size in shape)
    return layer.get_output(0)


def operand(context: ConversionContext, value: Value, dtype: torch.dtype, dimensions: int) -> Any:
    """Return an operand of elementwise arithmetic: cast, with axes of size 1 in front.

    Args:
        context: of the call.
        value: a tensor or a number.
        dtype: the type that torch computes in.
        dimensions: of the result.
    """
    if not isinstance(value, torch.Tensor):
        array = torch.tensor(value, dtype=held_type(dtype)).reshape([1] * dimensions)
        return constant(context, array.numpy())
    if not hasattr(value, TRT_TENSOR):
        held = value.detach().cpu().to(held_type(dtype))
        return constant(context, held.reshape([1] * (dimensions - held.dim()) + list(held.shape)).numpy())
    tensor = cast(context, getattr(value, TRT_TENSOR), dtype)
    # The shape it had before the call: a function in place may have changed the torch tensor's.
    shape = tuple(tensor.shape)
    return reshaped(context, tensor, (1,) * (dimensions - len(shape)) + shape)


def live(context: ConversionContext, value: torch.Tensor) -> Any:
    """Return the TensorRT tensor of a tensor in the tensor's own type; a constant where it is one."""
    return operand(context, value, value.dtype, 0)
