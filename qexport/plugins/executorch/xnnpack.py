"""Write what XNNPACK computes, in its own terms: channels last, at most five tensors side by side, steps of one.

Values are float32, or int8 codes with a scale. Operators that only move values keep the scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from qexport.plugins.executorch.steps import Node, Steps, Value

MOST_SIDE_BY_SIDE = 5
Limits = tuple[float | None, float | None]


class SegmentBuilder:
    """Adds nodes of XNNPACK; each method returns the result."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self._numbers: dict[float, Value] = {}

    def convert(self, value: Value, scale: float | None) -> Value:
        """Return int8 codes of real values, or real values of codes where no scale is given."""
        return self.steps.node("convert", [value], value.shape, scale=scale)

    def binary(
        self,
        kind: str,
        first: Value,
        second: Value,
        *,
        scale: float | None = None,
        limits: Limits | None = None,
    ) -> Value:
        """Return `add`, `subtract`, `multiply`, `divide`, `minimum` or `maximum` of two tensors, between limits."""
        shape = np.broadcast_shapes(first.shape, second.shape)
        return self.steps.node(kind, [first, second], shape, scale=scale, **_given(limits))

    def unary(self, kind: str, value: Value) -> Value:
        """Return a function of each element, of real values."""
        return self.steps.node(kind, [value], value.shape)

    def leaky_relu(self, value: Value, slope: float) -> Value:
        """Return real values, those below zero times a slope."""
        return self.steps.node("leaky relu", [value], value.shape, slope=slope)

    def clamp(self, value: Value, limits: Limits) -> Value:
        """Return values between limits."""
        return self.steps.node("clamp", [value], value.shape, scale=value.scale, limits=list(limits))

    def number(self, number: float) -> Value:
        """Return a number as a tensor of one element."""
        if number not in self._numbers:
            self._numbers[number] = self.steps.constant(torch.tensor([number], dtype=torch.float32))
        return self._numbers[number]

    # Layers

    def convolution(
        self,
        value: Value,
        weights: Sequence[Value],
        *,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
        channels: int,
        scale: float | None = None,
        limits: Limits | None = None,
    ) -> Value:
        """Return a convolution of a (N, H, W, C) map.

        Args:
            value: the map.
            weights: filters and bias; of integers, then the scales of both. Filters are (O, H, W, C / groups), of a
                depthwise convolution (1, H, W, O).
            stride: rows and columns.
            padding: on each side.
            dilation: rows and columns.
            groups: of channels.
            channels: of the result.
            scale: of the result's codes.
            limits: of the result.
        """
        filters = weights[0].shape
        depthwise = groups > 1 and groups == value.shape[3]
        kernel = filters[1:3]
        rows, columns = (
            (size + 2 * pad - step * (reach - 1) - 1) // stride_ + 1
            for size, pad, step, reach, stride_ in zip(
                value.shape[1:3], padding, dilation, kernel, stride, strict=True
            )
        )
        return self.steps.node(
            "convolution",
            [value, *weights],
            (value.shape[0], rows, columns, channels),
            scale=scale,
            kernel=list(kernel),
            stride=list(stride),
            padding=list(padding),
            dilation=list(dilation),
            groups=groups,
            group_input=value.shape[3] // groups,
            group_output=channels // groups,
            depthwise=depthwise,
            **_given(limits),
        )

    def linear(
        self,
        value: Value,
        weights: Sequence[Value],
        *,
        scale: float | None = None,
        limits: Limits | None = None,
    ) -> Value:
        """Return a linear layer; weights as for `convolution`, (O, I)."""
        shape = (*value.shape[:-1], weights[0].shape[0])
        return self.steps.node("linear", [value, *weights], shape, scale=scale, **_given(limits))

    def max_pool(
        self, value: Value, window: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
    ) -> Value:
        """Return the largest of each window of a (N, H, W, C) map; beyond the border is less than everything."""
        return self._pool("max pool", value, window, stride, padding)

    def average_pool(self, value: Value, window: tuple[int, int], stride: tuple[int, int]) -> Value:
        """Return the average of each window of a (N, H, W, C) map of real values."""
        return self._pool("average pool", value, window, stride, (0, 0))

    def mean(self, value: Value, scale: float | None = None) -> Value:
        """Return the mean of each channel of a (N, H, W, C) map, (N, 1, 1, C)."""
        return self.steps.node("mean", [value], (value.shape[0], 1, 1, value.shape[3]), scale=scale)

    def bilinear(self, value: Value, rows: int, columns: int) -> Value:
        """Return a (N, H, W, C) map in another size, bilinear between the centres of pixels."""
        return self.steps.node("bilinear", [value], (value.shape[0], rows, columns, value.shape[3]))

    # Shapes

    def reshape(self, value: Value, shape: Sequence[int]) -> Value:
        """Return the elements in another shape."""
        if tuple(shape) == value.shape:
            return value
        assert math.prod(shape) == value.size, f"{value.shape} to {tuple(shape)}"
        maker = value.maker
        if isinstance(maker, Node) and maker.kind == "reshape" and maker.region.part == self.steps.part:
            return self.reshape(maker.inputs[0], shape)  # XNNPACK itself makes one of two
        return self.steps.node("reshape", [value], shape, scale=value.scale)

    def transpose(self, value: Value, order: Sequence[int]) -> Value:
        """Return the axes in another order; nothing moves where only axes of length 1 change places."""
        shape = [value.shape[axis] for axis in order]
        moved = [axis for axis in order if value.shape[axis] != 1]
        if moved == sorted(moved):
            return self.reshape(value, shape)
        return self.steps.node("transpose", [value], shape, scale=value.scale, order=list(order))

    def cut(self, value: Value, axis: int, start: int, end: int) -> Value:
        """Return a range of an axis."""
        if (start, end) == (0, value.shape[axis]):
            return value
        shape, offsets = list(value.shape), [0] * len(value.shape)
        shape[axis], offsets[axis] = end - start, start
        return self.steps.node("slice", [value], shape, scale=value.scale, offsets=offsets)

    def concatenate(self, values: Sequence[Value], axis: int) -> Value:
        """Return tensors one after another along an axis."""
        held = list(values)
        while len(held) > 1:
            held = [
                self._side_by_side(held[first : first + MOST_SIDE_BY_SIDE], axis)
                for first in range(0, len(held), MOST_SIDE_BY_SIDE)
            ]
        return held[0]

    def pad(self, value: Value, before: Sequence[int], after: Sequence[int]) -> Value:
        """Return a larger tensor, of zeros beyond."""
        if not any(before) and not any(after):
            return value
        shape = [b + size + a for b, size, a in zip(before, value.shape, after, strict=True)]
        return self.steps.node(
            "pad", [value], shape, scale=value.scale, before=list(before), after=list(after)
        )

    def every(self, value: Value, axis: int, step: int) -> Value:
        """Return the first of each `step` entries of an axis: XNNPACK slices by ones."""
        length = value.shape[axis]
        rest = -length % step
        after = [0] * len(value.shape)
        after[axis] = rest
        padded = self.pad(value, [0] * len(after), after)
        outer, inner = math.prod(value.shape[:axis]), math.prod(value.shape[axis + 1 :])
        groups = (length + rest) // step
        first = self.cut(self.reshape(padded, [outer * groups, step, inner]), 1, 0, 1)
        return self.reshape(first, [*value.shape[:axis], groups, *value.shape[axis + 1 :]])

    def repeated(self, value: Value, axis: int, times: int) -> Value:
        """Return each entry of an axis several times: XNNPACK has no nearest upsampling."""
        if times == 1:
            return value
        outer, inner = math.prod(value.shape[: axis + 1]), math.prod(value.shape[axis + 1 :])
        one = self.reshape(value, [outer, 1, inner])
        several = self.concatenate([one] * times, 1)
        shape = list(value.shape)
        shape[axis] *= times
        return self.reshape(several, shape)

    def _side_by_side(self, values: Sequence[Value], axis: int) -> Value:
        if len(values) == 1:
            return values[0]
        shape = list(values[0].shape)
        shape[axis] = sum(value.shape[axis] for value in values)
        return self.steps.node("concatenate", values, shape, scale=values[0].scale, axis=axis)

    def _pool(
        self,
        kind: str,
        value: Value,
        window: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Value:
        rows, columns = (
            (size + 2 * pad - reach) // step + 1
            for size, pad, reach, step in zip(value.shape[1:3], padding, window, stride, strict=True)
        )
        return self.steps.node(
            kind,
            [value],
            (value.shape[0], rows, columns, value.shape[3]),
            scale=value.scale,
            window=list(window),
            stride=list(stride),
            padding=list(padding),
        )


def _given(limits: Limits | None) -> dict[str, list[float | None]]:
    return {} if limits is None else {"limits": list(limits)}
