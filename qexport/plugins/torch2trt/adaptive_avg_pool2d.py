"""`torch.nn.functional.adaptive_avg_pool2d` for torch2trt, in at most 6 layers (4 where the output is 1 x 1).

torch2trt's own converter takes kernel = stride = input // output, which is another operator unless the sizes
divide, makes a window that TensorRT refuses from 317 x 317 on, and does not know None.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qexport.errors import UnsupportedOperator
from qexport.plugins.adaptive_avg_pool import (
    MOST_LAYERS,
    TENSORRT,
    Matrix,
    Pair,
    Pool,
    Reduce,
    plan,
    resolve_output_size,
)
from qexport.plugins.torch2trt.interface import ConversionContext, argument, constant, give, trt_tensor
from qexport.runtimes.tensorrt_library import load_library

FUNCTIONS = ("torch.nn.functional.adaptive_avg_pool2d",)
_DTYPES = {"FLOAT": np.float32, "HALF": np.float16}


def convert(context: ConversionContext) -> None:
    """Add the layers of the cheapest exact form.

    Raises:
        UnsupportedOperator: rows and columns are not fixed, or the map is neither float32 nor float16.
    """
    given = argument(context, 0, "input")
    tensor = trt_tensor(context, given)
    size = fixed_size(tensor, "adaptive_avg_pool2d")
    asked = resolve_output_size(argument(context, 1, "output_size"), size)
    single = len(tensor.shape) == 3
    # Pools take 4 axes only, so (C, H, W) needs two reshapes more.
    spare = MOST_LAYERS - 2 if single else MOST_LAYERS
    maps = max(1, given.shape[:-2].numel())
    pools = plan(size, asked, costs=TENSORRT, maps=maps, layers=spare)
    expands = single and any(isinstance(step, Pool) for step in pools.steps)
    if expands:
        tensor = reshaped(context, tensor, (1, *tensor.shape))
    size = pools.input_size
    for step in pools.steps:
        if isinstance(step, Pool):
            tensor = _average(context, tensor, step)
        elif isinstance(step, Reduce):
            tensor = _reduced(context, tensor, step)
        else:
            tensor = _multiplied(context, tensor, step, size)
        size = step.output_size(size)
    if expands:
        tensor = reshaped(context, tensor, tuple(tensor.shape)[1:])
    give(context, tensor)


def fixed_size(tensor: Any, function: str) -> Pair:
    """Return rows and columns of a map.

    Raises:
        UnsupportedOperator: they are not fixed, or it is no map of 3 or 4 axes.
    """
    shape = tuple(tensor.shape)
    if len(shape) not in (3, 4) or min(shape[-2:]) < 1:
        raise UnsupportedOperator(
            f"{function} of a tensor of shape {shape}: its windows follow from rows and columns, which have to be "
            "fixed numbers of a (N, C, H, W) or (C, H, W) map. Convert with inputs of one size."
        )
    return int(shape[-2]), int(shape[-1])


def reshaped(context: ConversionContext, tensor: Any, shape: tuple[int, ...]) -> Any:
    """Return the tensor in another shape; 0 keeps an axis, -1 takes what is left."""
    layer = context.network.add_shuffle(tensor)
    layer.reshape_dims = shape
    return layer.get_output(0)


def _average(context: ConversionContext, tensor: Any, step: Pool) -> Any:
    trt = load_library().trt
    layer = context.network.add_pooling_nd(tensor, trt.PoolingType.AVERAGE, step.kernel)
    layer.stride_nd, layer.padding_nd = step.stride, step.padding
    layer.average_count_excludes_padding = True
    return layer.get_output(0)


def _reduced(context: ConversionContext, tensor: Any, step: Reduce) -> Any:
    trt = load_library().trt
    axes = sum(1 << len(tensor.shape) + axis for axis in step.negative_axes)
    return context.network.add_reduce(tensor, trt.ReduceOperation.AVG, axes, True).get_output(0)


def _multiplied(context: ConversionContext, tensor: Any, step: Matrix, size: Pair) -> Any:
    trt = load_library().trt
    if tensor.dtype.name not in _DTYPES:
        raise UnsupportedOperator(
            f"adaptive_avg_pool2d from {size} to another size is a product with a constant of float32 or float16, "
            f"the map is {tensor.dtype.name}. Keep the layer in one of the two."
        )
    axes = len(tensor.shape)
    lead = (0,) * (axes - 3)
    part = step.inputs // step.groups
    if step.groups > 1:
        shape = (-1, part, size[1]) if step.axis == 0 else (0, size[0] * step.groups, part)
        tensor = reshaped(context, tensor, (*lead, *shape))
    weights = step.weights() if step.axis == 0 else step.weights().T
    matrix = constant(
        context, weights.astype(_DTYPES[tensor.dtype.name]).reshape((1,) * (axes - 2) + weights.shape)
    )
    sides = (matrix, tensor) if step.axis == 0 else (tensor, matrix)
    plain = trt.MatrixOperation.NONE
    tensor = context.network.add_matrix_multiply(sides[0], plain, sides[1], plain).get_output(0)
    if step.groups > 1:
        rows, columns = step.output_size(size)
        shape = (-1, rows, columns) if step.axis == 0 else (0, rows, columns)
        tensor = reshaped(context, tensor, (*lead, *shape))
    return tensor
