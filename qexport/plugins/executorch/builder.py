"""Write what ExecuTorch's own kernels compute: the back end of `Operations`. Integers are int64, as they want."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from qexport.errors import UnsupportedOperator
from qexport.plugins.executorch.steps import Steps, Value, dtype_of
from qexport.plugins.operations import Dtype, Operations, Shared

TURNS = 6
"""Of a loop that are written out, before the loop itself: chains of suppressions on real images are this long."""


class KernelBuilder:
    """Adds calls of ExecuTorch's kernels; each method returns the result."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def call(self, compute: Callable[..., Any], *arguments: Any, scale: float | None = None) -> Value:
        """Return the one result of an operator; int8 codes of it have that scale."""
        return self.steps.kernel(compute, *arguments, scale=scale)[0]

    # Constants

    def constant(self, value: ArrayLike, dtype: Dtype) -> Value:
        """Return a constant."""
        return self.steps.constant(torch.from_numpy(np.array(value, dtype)))

    def integers(self, *numbers: int) -> Shared[Value]:
        """Return integers for several operations to take."""
        return Shared(numbers)

    # Arithmetic

    def add(self, first: Value, second: Value) -> Value:
        """Return the sum."""
        return self.call(torch.add, first, second)

    def sub(self, first: Value, second: Value) -> Value:
        """Return the difference."""
        return self.call(torch.sub, first, second)

    def mul(self, first: Value, second: Value) -> Value:
        """Return the product."""
        return self.call(torch.mul, first, second)

    def div(self, first: Value, second: Value) -> Value:
        """Return the quotient."""
        return self.call(torch.div, first, second)

    def minimum(self, first: Value, second: Value) -> Value:
        """Return the smaller of each pair."""
        return self.call(torch.minimum, first, second)

    def maximum(self, first: Value, second: Value) -> Value:
        """Return the larger of each pair."""
        return self.call(torch.maximum, first, second)

    def clip(self, value: Value, low: float, high: float) -> Value:
        """Return the value, at least `low` and at most `high`."""
        return self.call(torch.clamp, value, low, high)

    def floor(self, value: Value) -> Value:
        """Return the largest integer that is not above."""
        return self.call(torch.floor, value)

    def log(self, value: Value) -> Value:
        """Return the natural logarithm, minus infinity of zero."""
        return self.call(torch.log, value)

    def sqrt(self, value: Value) -> Value:
        """Return the square root."""
        return self.call(torch.sqrt, value)

    def absolute(self, value: Value) -> Value:
        """Return the magnitude."""
        return self.call(torch.abs, value)

    # Comparisons

    def equal(self, first: Value, second: Value) -> Value:
        """Return where they are equal, bool."""
        return self.call(torch.eq, first, second)

    def greater(self, first: Value, second: Value) -> Value:
        """Return where the first is greater, bool; false where one is no number."""
        return self.call(torch.gt, first, second)

    def less_or_equal(self, first: Value, second: Value) -> Value:
        """Return where the first is not greater, bool; false where one is no number."""
        return self.call(torch.le, first, second)

    def logical_and(self, first: Value, second: Value) -> Value:
        """Return where both hold, bool."""
        return self.call(torch.logical_and, first, second)

    def logical_or(self, first: Value, second: Value) -> Value:
        """Return where one holds, bool."""
        return self.call(torch.logical_or, first, second)

    def logical_not(self, value: Value) -> Value:
        """Return where it does not hold, bool."""
        return self.call(torch.logical_not, value)

    # Shapes

    def cast(self, value: Value, dtype: Dtype) -> Value:
        """Return the value in another type."""
        wanted = torch.from_numpy(np.empty(0, dtype)).dtype
        if value.dtype == dtype_of(torch.empty(0, dtype=wanted)):
            return value
        return self.call(_converted, value, wanted)

    def gather(self, value: Value, index: Value, axis: int | None = None) -> Value:
        """Return entries of an axis, of the first where none is named; a scalar index drops the axis."""
        at = (axis or 0) % len(value.shape)
        flat = self.reshape(index, [-1]) if len(index.shape) != 1 else index
        taken = self.call(torch.index_select, value, at, flat, scale=value.scale)
        return self.reshape(taken, [*value.shape[:at], *index.shape, *value.shape[at + 1 :]])

    def slice(
        self,
        value: Value,
        starts: Sequence[int] | Shared[Value],
        ends: Sequence[int] | Shared[Value],
        axes: Sequence[int] | Shared[Value],
        steps: Sequence[int] | None = None,
    ) -> Value:
        """Return a range of each of the axes; an end may lie beyond."""
        given = _numbers(axes)
        ranges = zip(given, _numbers(starts), _numbers(ends), steps or [1] * len(given), strict=True)
        for axis, start, end, step in ranges:
            length = value.shape[axis]
            first, last, _ = slice(start, end).indices(length)
            if (first, last, step) != (0, length, 1):
                cut = torch.ops.aten.slice.Tensor
                value = self.call(cut, value, axis % len(value.shape), first, last, step, scale=value.scale)
        return value

    def select(self, value: Value, axis: int, index: int) -> Value:
        """Return one entry of an axis, which is dropped."""
        return self.call(torch.select, value, axis, index, scale=value.scale)

    def concat(self, values: Sequence[Value], axis: int) -> Value:
        """Return the values one after another along an axis."""
        return self.call(torch.cat, list(values), axis, scale=values[0].scale)

    def stack(self, values: Sequence[Value], axis: int) -> Value:
        """Return the values side by side along a new axis."""
        return self.call(torch.stack, list(values), axis, scale=values[0].scale)

    def reshape(
        self, value: Value, shape: Sequence[int] | Shared[Value], *, scale: float | None = None
    ) -> Value:
        """Return the elements in another shape, of which one size may be -1; int8 codes may be given another scale."""
        sizes = list(_numbers(shape))
        own = value.scale if scale is None else scale
        if tuple(sizes) == value.shape and own == value.scale:
            return value
        return self.call(torch.reshape, value, sizes, scale=own)

    def unsqueeze(self, value: Value, axes: Sequence[int] | Shared[Value]) -> Value:
        """Return the value with axes of length 1, counted in the result."""
        shape = list(value.shape)
        rank = len(shape) + len(_numbers(axes))
        for axis in sorted(number % rank for number in _numbers(axes)):
            shape.insert(axis, 1)
        return self.reshape(value, shape)

    def squeeze(self, value: Value, axes: Sequence[int] | Shared[Value]) -> Value:
        """Return the value without axes of length 1."""
        dropped = {axis % len(value.shape) for axis in _numbers(axes)}
        return self.reshape(value, [size for axis, size in enumerate(value.shape) if axis not in dropped])

    def transpose(self, value: Value, order: Sequence[int]) -> Value:
        """Return the axes in another order; nothing moves where only axes of length 1 change places."""
        moved = [axis for axis in order if value.shape[axis] != 1]
        if moved == sorted(moved):
            return self.reshape(value, [value.shape[axis] for axis in order])
        return self.call(torch.ops.aten.permute_copy.default, value, list(order), scale=value.scale)

    def expand(self, value: Value, shape: Sequence[int] | Shared[Value]) -> Value:
        """Return the value repeated along its axes of length 1."""
        sizes = list(_numbers(shape))
        if tuple(sizes) == value.shape:
            return value
        return self.call(torch.ops.aten.expand_copy.default, value, sizes, scale=value.scale)

    def pad(
        self,
        value: Value,
        counts: Sequence[int] | Shared[Value],
        *,
        edge: bool = False,
        number: float = 0.0,
    ) -> Value:
        """Return a larger tensor, of one number beyond."""
        if edge:
            raise UnsupportedOperator("a padding with the last entry is not written for ExecuTorch.")
        given, rank = _numbers(counts), len(value.shape)
        if not any(given):
            return value
        pairs = [given[axis + side * rank] for axis in reversed(range(rank)) for side in (0, 1)]
        return self.call(torch.constant_pad_nd, value, pairs, number, scale=value.scale)

    # Reductions and products

    def reduce_mean(self, value: Value, axes: Sequence[int] | Shared[Value]) -> Value:
        """Return the mean over axes, which stay as length 1."""
        return self.call(torch.mean, value, list(_numbers(axes)), True)

    def largest(self, value: Value) -> Value:
        """Return the largest element, a scalar."""
        return self.call(torch.amax, value, list(range(len(value.shape))))

    def matmul(self, first: Value, second: Value) -> Value:
        """Return the matrix product of the last two axes."""
        return self.call(torch.bmm, first, second)

    def average_pool(self, value: Value, window: Sequence[int], stride: Sequence[int]) -> Value:
        """Return the average of each window of a (N, C, H, W) map."""
        return self.call(torch.nn.functional.avg_pool2d, value, list(window), list(stride))

    def grid_sample(self, value: Value, grid: Value) -> Value:
        """Refuse: rows are gathered here, which took a tenth of the time."""
        del value, grid
        raise UnsupportedOperator("a map sampled at given positions is not written for ExecuTorch.")

    def repeat(
        self,
        start: Value,
        turn: Callable[[Operations[Value], Value], tuple[Value, Value]],
        most: int,
        *,
        name: str,
    ) -> Value:
        """Refuse: what a turn reads from outside would have to be named (ranking.py has its loop)."""
        del start, turn, most, name
        raise UnsupportedOperator("a loop over any turn is not written for ExecuTorch.")


def _converted(value: torch.Tensor, wanted: torch.dtype) -> torch.Tensor:
    return value.to(wanted)


def _numbers(given: Sequence[int] | Shared[Value]) -> tuple[int, ...]:
    return given.numbers if isinstance(given, Shared) else tuple(int(number) for number in given)
