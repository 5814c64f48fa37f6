"""The operations that plugin-free forms are written in, whatever they are written into: ONNX nodes, TensorRT layers.

A form is a function of an `Operations` and of values, which are opaque to it; so RoIAlign by GridSample, NMS by
its fixed point and the image are each defined once. Shapes are static. Values are float32 unless said otherwise,
and broadcast as numpy's do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike

V = TypeVar("V")
Dtype = type[np.generic]


@dataclass(frozen=True, slots=True)
class Shared(Generic[V]):
    """Integers that several operations take, stored once where a back end stores them."""

    numbers: tuple[int, ...]
    stored: V | None = None


class Operations(Protocol[V]):
    """What a back end can do."""

    def constant(self, value: ArrayLike, dtype: Dtype) -> V:
        """Return a constant; int64 may be held in fewer bits."""
        ...

    def integers(self, *numbers: int) -> Shared[V]:
        """Return integers for several operations to take."""
        ...

    def add(self, first: V, second: V) -> V:
        """Return the sum."""
        ...

    def sub(self, first: V, second: V) -> V:
        """Return the difference."""
        ...

    def mul(self, first: V, second: V) -> V:
        """Return the product."""
        ...

    def div(self, first: V, second: V) -> V:
        """Return the quotient."""
        ...

    def minimum(self, first: V, second: V) -> V:
        """Return the smaller of each pair."""
        ...

    def maximum(self, first: V, second: V) -> V:
        """Return the larger of each pair."""
        ...

    def clip(self, value: V, low: float, high: float) -> V:
        """Return the value, at least `low` and at most `high`."""
        ...

    def floor(self, value: V) -> V:
        """Return the largest integer that is not above."""
        ...

    def log(self, value: V) -> V:
        """Return the natural logarithm, minus infinity of zero."""
        ...

    def sqrt(self, value: V) -> V:
        """Return the square root."""
        ...

    def absolute(self, value: V) -> V:
        """Return the magnitude."""
        ...

    def equal(self, first: V, second: V) -> V:
        """Return where they are equal, bool."""
        ...

    def greater(self, first: V, second: V) -> V:
        """Return where the first is greater, bool; false where one is no number."""
        ...

    def less_or_equal(self, first: V, second: V) -> V:
        """Return where the first is not greater, bool; false where one is no number."""
        ...

    def logical_and(self, first: V, second: V) -> V:
        """Return where both hold, bool."""
        ...

    def logical_or(self, first: V, second: V) -> V:
        """Return where one holds, bool."""
        ...

    def logical_not(self, value: V) -> V:
        """Return where it does not hold, bool."""
        ...

    def cast(self, value: V, dtype: Dtype) -> V:
        """Return the value in another type; int64 may become int32."""
        ...

    def gather(self, value: V, index: V, axis: int | None = None) -> V:
        """Return entries of an axis, of the first where none is named; a scalar index drops the axis."""
        ...

    def slice(
        self,
        value: V,
        starts: Sequence[int] | Shared[V],
        ends: Sequence[int] | Shared[V],
        axes: Sequence[int] | Shared[V],
    ) -> V:
        """Return a range of each of the axes; an end may lie beyond."""
        ...

    def concat(self, values: Sequence[V], axis: int) -> V:
        """Return the values one after another along an axis."""
        ...

    def reshape(self, value: V, shape: Sequence[int] | Shared[V]) -> V:
        """Return the elements in another shape, of which one size may be -1."""
        ...

    def unsqueeze(self, value: V, axes: Sequence[int] | Shared[V]) -> V:
        """Return the value with axes of length 1, counted in the result."""
        ...

    def squeeze(self, value: V, axes: Sequence[int] | Shared[V]) -> V:
        """Return the value without axes of length 1."""
        ...

    def transpose(self, value: V, order: Sequence[int]) -> V:
        """Return the axes in another order."""
        ...

    def expand(self, value: V, shape: Sequence[int] | Shared[V]) -> V:
        """Return the value repeated along its axes of length 1."""
        ...

    def pad(self, value: V, counts: Sequence[int] | Shared[V], *, edge: bool = False) -> V:
        """Return a larger tensor.

        Args:
            value: what to pad.
            counts: how many before each axis, then how many after each.
            edge: whether to repeat the last entry; else zeros.
        """
        ...

    def reduce_mean(self, value: V, axes: Sequence[int] | Shared[V]) -> V:
        """Return the mean over axes, which stay as length 1."""
        ...

    def largest(self, value: V) -> V:
        """Return the largest element, a scalar."""
        ...

    def matmul(self, first: V, second: V) -> V:
        """Return the matrix product of the last two axes."""
        ...

    def average_pool(self, value: V, window: Sequence[int], stride: Sequence[int]) -> V:
        """Return the average of each window of a (N, C, H, W) map."""
        ...

    def grid_sample(self, value: V, grid: V) -> V:
        """Return bilinear samples of a (N, C, H, W) map.

        Args:
            value: the map.
            grid: (N, rows, columns, 2), x and y, -1 at the first column or row and 1 at the last; beyond, the border is
                read.
        """
        ...

    def repeat(self, start: V, turn: Callable[[Operations[V], V], tuple[V, V]], most: int, *, name: str) -> V:
        """Return what a value becomes when a turn is taken again and again.

        Args:
            start: the value before the first turn.
            turn: given operations to write its own with and the value, returns whether to go on, a bool scalar, and
                the value after, of the same shape.
            most: number of turns at most.
            name: of the loop.
        """
        ...
