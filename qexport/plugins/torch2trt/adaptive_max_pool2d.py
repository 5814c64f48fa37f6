"""`torch.nn.functional.adaptive_max_pool2d` for torch2trt, exact for every size, in at most 10 layers.

Windows of one size at one distance are a strided pool. Others differ in length by one element, and a maximum may
look at an element twice: with `y` the maximum over every `length` neighbours, `length` that of the shortest window,
a window [first, end) is max(y[first], y[end - length]). So an irregular axis is a pool at stride 1, a gather of
those two for each window, and a pool of 2 at stride 2. A window of 100,000 elements, which TensorRT refuses, is
taken one axis after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexport.errors import ExportError, UnsupportedOperator
from qexport.plugins.adaptive_avg_pool import (
    WINDOW_LIMIT,
    Pair,
    Window,
    regular_window,
    resolve_output_size,
    window_bounds,
)
from qexport.plugins.torch2trt.adaptive_avg_pool2d import fixed_size, reshaped
from qexport.plugins.torch2trt.interface import ConversionContext, argument, constant, give, trt_tensor
from qexport.runtimes.tensorrt_library import load_library

FUNCTIONS = ("torch.nn.functional.adaptive_max_pool2d",)
MOST_LAYERS = 10
_SQUARE = 64
"""Elements of a window of stride 1 up to which both axes are pooled at once; above, two pools compare less."""


@dataclass(frozen=True, slots=True)
class _AxisForm:
    window: Window
    """Of the first pool."""
    picked: tuple[int, ...] = ()
    """Positions after that pool, two for each output; empty where it is the whole form."""


def convert(context: ConversionContext) -> None:
    """Add the pools, and the gathers of irregular axes.

    Raises:
        UnsupportedOperator: indices are asked for, or rows and columns are not fixed.
        ExportError: one axis of a window alone has 100,000 elements.
    """
    if argument(context, 2, "return_indices", False):
        raise UnsupportedOperator(
            "adaptive_max_pool2d with return_indices: TensorRT's pools give no indices. Call it without."
        )
    tensor = trt_tensor(context, argument(context, 0, "input"))
    size = fixed_size(tensor, "adaptive_max_pool2d")
    asked = resolve_output_size(argument(context, 1, "output_size"), size)
    if size == asked:
        give(context, tensor)
        return
    forms = [_form(inputs, outputs) for inputs, outputs in zip(size, asked, strict=True)]
    longest = max(form.window.kernel for form in forms)
    if longest >= WINDOW_LIMIT:
        raise ExportError(
            f"adaptive_max_pool2d from {size} to {asked} has a window of {longest} elements along one axis, TensorRT "
            f"takes fewer than {WINDOW_LIMIT}. Pool a smaller map, or to a larger output."
        )
    single = len(tensor.shape) == 3
    if single:
        tensor = reshaped(context, tensor, (1, *tensor.shape))
    tensor = _add(context, tensor, forms)
    if single:
        tensor = reshaped(context, tensor, tuple(tensor.shape)[1:])
    give(context, tensor)


def _form(inputs: int, outputs: int) -> _AxisForm:
    window = regular_window(inputs, outputs)
    if window is not None:
        return _AxisForm(window)
    bounds = window_bounds(inputs, outputs)
    length = min(end - first for first, end in bounds)
    return _AxisForm(Window(length, 1, 0), tuple(at for first, end in bounds for at in (first, end - length)))


def _add(context: ConversionContext, tensor: Any, forms: list[_AxisForm]) -> Any:
    rows, columns = (form.window for form in forms)
    volume = rows.kernel * columns.kernel
    overlapping = rows.stride < rows.kernel and columns.stride < columns.kernel
    if volume >= WINDOW_LIMIT or (overlapping and volume > _SQUARE):
        # Columns first: their elements lie together, and the rows have less to read after it.
        for axis in (1, 0):
            tensor = _pool(context, tensor, *_on(axis, forms[axis].window))
            tensor = _pick(
                context, tensor, [forms[0] if axis == 0 else None, forms[1] if axis == 1 else None]
            )
        return tensor
    tensor = _pool(
        context,
        tensor,
        (rows.kernel, columns.kernel),
        (rows.stride, columns.stride),
        (rows.padding, columns.padding),
    )
    return _pick(context, tensor, [*forms])


def _on(axis: int, window: Window) -> tuple[Pair, Pair, Pair]:
    def pair(value: int, other: int) -> Pair:
        return (value, other) if axis == 0 else (other, value)

    return pair(window.kernel, 1), pair(window.stride, 1), pair(window.padding, 0)


def _pick(context: ConversionContext, tensor: Any, forms: list[_AxisForm | None]) -> Any:
    """Return the larger of the two values of each window, along the axes that have such."""
    pairs = [1, 1]
    for axis, form in enumerate(forms):
        if form is not None and form.picked:
            index: NDArray[np.int32] = np.asarray(form.picked, np.int32)
            tensor = context.network.add_gather(tensor, constant(context, index), 2 + axis).get_output(0)
            pairs[axis] = 2
    both = (pairs[0], pairs[1])
    return tensor if both == (1, 1) else _pool(context, tensor, both, both, (0, 0))


def _pool(context: ConversionContext, tensor: Any, kernel: Pair, stride: Pair, padding: Pair) -> Any:
    if kernel == stride == (1, 1):
        return tensor
    trt = load_library().trt
    layer = context.network.add_pooling_nd(tensor, trt.PoolingType.MAX, kernel)
    layer.stride_nd, layer.padding_nd = stride, padding
    return layer.get_output(0)
