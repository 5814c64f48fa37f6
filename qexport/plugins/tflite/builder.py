"""Write TFLite operators: the back end of `Operations`, and what the lowerings of layers need besides.

Integers are int32 throughout. Maps that a lowering hands over are channels last, as every TFLite kernel takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from qexport.errors import UnsupportedOperator
from qexport.plugins.operations import Dtype, Operations, Shared
from qexport.plugins.tflite.arithmetic import ArithmeticBuilder
from qexport.plugins.tflite.writer import Value

TURNS = 16
"""Of a loop that is written out: the longest chain of suppressions that portable NMS follows."""


class TfliteBuilder(ArithmeticBuilder):
    """Adds operators to a model; each method returns its result."""

    # Shapes

    def cast(self, value: Value, dtype: Dtype) -> Value:
        """Return the value in another type; int64 becomes int32."""
        name = "int32" if np.dtype(dtype) == np.int64 else np.dtype(dtype).name
        if name == value.dtype:
            return value
        return self.op("CAST", [value], value.shape, name, options="CastOptions")

    def gather(self, value: Value, index: Value, axis: int | None = None) -> Value:
        """Return entries of an axis, of the first where none is named; a scalar index drops the axis."""
        at = (axis or 0) % len(value.shape)
        shape = (*value.shape[:at], *index.shape, *value.shape[at + 1 :])
        return self.op(
            "GATHER",
            [value, index],
            shape,
            value.dtype,
            scale=value.scale,
            options="GatherOptions",
            settings={"axis": at},
        )

    def slice(
        self,
        value: Value,
        starts: Sequence[int] | Shared[Value],
        ends: Sequence[int] | Shared[Value],
        axes: Sequence[int] | Shared[Value],
        steps: Sequence[int] | None = None,
    ) -> Value:
        """Return a range of each of the axes; an end may lie beyond."""
        begin, end, stride = [0] * len(value.shape), list(value.shape), [1] * len(value.shape)
        given = _numbers(axes)
        ranges = zip(given, _numbers(starts), _numbers(ends), steps or [1] * len(given), strict=True)
        for axis, first, last, step in ranges:
            begin[axis], end[axis], _ = slice(first, last).indices(value.shape[axis])
            stride[axis] = step
        shape = [max(0, -(-(e - b) // s)) for b, e, s in zip(begin, end, stride, strict=True)]
        if tuple(shape) == value.shape:
            return value
        taken = [self.writer.constant(np.asarray(each, np.int32)) for each in (begin, end, stride)]
        return self.op(
            "STRIDED_SLICE",
            [value, *taken],
            shape,
            value.dtype,
            scale=value.scale,
            options="StridedSliceOptions",
        )

    def select(self, value: Value, axis: int, index: int) -> Value:
        """Return one entry of an axis, which is dropped."""
        axis %= len(value.shape)
        index %= value.shape[axis]
        part = self.slice(value, [index], [index + 1], [axis])
        return self.reshape(part, [size for place, size in enumerate(part.shape) if place != axis])

    def concat(self, values: Sequence[Value], axis: int) -> Value:
        """Return the values one after another along an axis."""
        first = values[0]
        axis %= len(first.shape)
        shape = list(first.shape)
        shape[axis] = sum(value.shape[axis] for value in values)
        return self.op(
            "CONCATENATION",
            values,
            shape,
            first.dtype,
            scale=first.scale,
            options="ConcatenationOptions",
            settings={"axis": axis},
        )

    def reshape(
        self, value: Value, shape: Sequence[int] | Shared[Value], *, scale: float | None = None
    ) -> Value:
        """Return the elements in another shape, of which one size may be -1; int8 codes may be given another scale."""
        sizes = list(_numbers(shape))
        if -1 in sizes:
            known = int(np.prod([size for size in sizes if size != -1]))
            sizes[sizes.index(-1)] = int(np.prod(value.shape)) // max(known, 1)
        if tuple(sizes) == value.shape and scale is None:
            return value
        stored = self.writer.constant(np.asarray(sizes, np.int32))
        return self.op(
            "RESHAPE",
            [value, stored],
            sizes,
            value.dtype,
            scale=value.scale if scale is None else scale,
            options="ReshapeOptions",
            settings={"newShape": sizes},
        )

    def unsqueeze(self, value: Value, axes: Sequence[int] | Shared[Value]) -> Value:
        """Return the value with axes of length 1 put in."""
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
        """Return the axes in another order."""
        moved = [axis for axis in order if value.shape[axis] != 1]
        shape = [value.shape[axis] for axis in order]
        if moved == sorted(moved):  # only axes of length 1 change places
            return self.reshape(value, shape)
        stored = self.writer.constant(np.asarray(order, np.int32))
        return self.op(
            "TRANSPOSE", [value, stored], shape, value.dtype, scale=value.scale, options="TransposeOptions"
        )

    def expand(self, value: Value, shape: Sequence[int] | Shared[Value]) -> Value:
        """Return the value repeated along its axes of length 1."""
        sizes = list(_numbers(shape))
        if tuple(sizes) == value.shape:
            return value
        stored = self.writer.constant(np.asarray(sizes, np.int32))
        return self.op(
            "BROADCAST_TO", [value, stored], sizes, value.dtype, options="BroadcastToOptions", version=2
        )

    def stack(self, values: Sequence[Value], axis: int) -> Value:
        """Return the values side by side along a new axis."""
        rank = len(values[0].shape) + 1
        return self.concat([self.unsqueeze(value, [axis % rank]) for value in values], axis % rank)

    def pad(
        self,
        value: Value,
        counts: Sequence[int] | Shared[Value],
        *,
        edge: bool = False,
        number: float = 0.0,
    ) -> Value:
        """Return a larger tensor, of zeros beyond or of another number."""
        if edge:
            raise UnsupportedOperator("TFLite pads with numbers alone, not with the last entry.")
        given, rank = _numbers(counts), len(value.shape)
        before, after = given[:rank], given[rank:]
        if not any(given):
            return value
        shape = [b + size + a for b, size, a in zip(before, value.shape, after, strict=True)]
        stored = self.writer.constant(np.stack([before, after], 1).astype(np.int32))
        if number == 0:
            return self.op(
                "PAD", [value, stored], shape, value.dtype, scale=value.scale, options="PadOptions"
            )
        own = (value.scale,) if value.scale is not None else ()
        filler = self.writer.constant(np.asarray(number, value.dtype), scales=own)
        return self.op(
            "PADV2", [value, stored, filler], shape, value.dtype, scale=value.scale, options="PadV2Options"
        )

    # Reductions and products

    def reduce(self, code: str, value: Value, axes: Sequence[int], *, keep: bool) -> Value:
        """Return a reduction over axes."""
        over = {axis % len(value.shape) for axis in axes}
        kept = [1 if axis in over else size for axis, size in enumerate(value.shape)]
        shape = kept if keep else [size for axis, size in enumerate(value.shape) if axis not in over]
        stored = self.writer.constant(np.asarray(sorted(over), np.int32))
        return self.op(
            code, [value, stored], shape, value.dtype, options="ReducerOptions", settings={"keepDims": keep}
        )

    def reduce_mean(self, value: Value, axes: Sequence[int] | Shared[Value]) -> Value:
        """Return the mean over axes, which stay as length 1."""
        return self.reduce("MEAN", value, _numbers(axes), keep=True)

    def largest(self, value: Value) -> Value:
        """Return the largest element, a scalar."""
        return self.reduce("REDUCE_MAX", value, range(len(value.shape)), keep=False)

    def matmul(self, first: Value, second: Value) -> Value:
        """Return the matrix product of the last two axes."""
        batch = np.broadcast_shapes(first.shape[:-2], second.shape[:-2])
        shape = (*batch, first.shape[-2], second.shape[-1])
        return self.op("BATCH_MATMUL", [first, second], shape, first.dtype, options="BatchMatMulOptions")

    def softmax(self, value: Value) -> Value:
        """Return the softmax over the last axis, of operators that compute the same bits on x86 and Arm.

        XNNPACK's own SOFTMAX does not, nor does its LOGISTIC: the last bit of a score would depend on the processor.
        """
        powers = self.exp(self.sub(value, self.reduce("REDUCE_MAX", value, [-1], keep=True)))
        total = powers
        while (size := total.shape[-1]) > 1:  # by halves: the order of additions is then nobody's choice
            half = size // 2
            first = self.slice(total, [0], [half], [-1])
            folded = self.add(first, self.slice(total, [half], [2 * half], [-1]))
            odd = [self.slice(total, [size - 1], [size], [-1])] if size % 2 else []
            total = self.concat([folded, *odd], -1) if odd else folded
        return self.div(powers, total)

    def sigmoid(self, value: Value) -> Value:
        """Return 1 / (1 + exp(-x)), of operators that compute the same bits on x86 and Arm."""
        one = self.scalar(1.0, value)
        return self.div(one, self.add(one, self.exp(self.sub(self.scalar(0.0, value), value))))

    def average_pool(self, value: Value, window: Sequence[int], stride: Sequence[int]) -> Value:
        """Return the average of each window of a (N, H, W, C) map."""
        return self._pool("AVERAGE_POOL_2D", value, window, stride)

    def max_pool(self, value: Value, window: Sequence[int], stride: Sequence[int]) -> Value:
        """Return the largest of each window of a (N, H, W, C) map."""
        return self._pool("MAX_POOL_2D", value, window, stride)

    def grid_sample(self, value: Value, grid: Value) -> Value:
        """Refuse: TFLite has no such operator."""
        del value, grid
        raise UnsupportedOperator("TFLite has no operator that samples a map at given positions.")

    def repeat(
        self,
        start: Value,
        turn: Callable[[Operations[Value], Value], tuple[Value, Value]],
        most: int,
        *,
        name: str,
    ) -> Value:
        """Take a fixed number of turns, `TURNS` at most: loops are subgraphs of their own, which no delegate runs."""
        del name
        value = start
        for _ in range(min(most, TURNS)):
            _, value = turn(self, value)
        return value

    # Integers

    def quantize(self, value: Value, scale: float) -> Value:
        """Return int8 codes of real values."""
        return self.op("QUANTIZE", [value], value.shape, "int8", scale=scale, options="QuantizeOptions")

    def dequantize(self, value: Value) -> Value:
        """Return the real values of int8 codes, or float32 of float16."""
        return self.op("DEQUANTIZE", [value], value.shape, "float32", options="DequantizeOptions", version=2)

    def weights(self, array: NDArray[np.generic], scales: Sequence[float], axis: int) -> Value:
        """Return integers with a scale for each entry of an axis."""
        return self.writer.constant(array, name="weight", scales=scales, axis=axis)

    def _pool(self, code: str, value: Value, window: Sequence[int], stride: Sequence[int]) -> Value:
        batch, height, width, channels = value.shape
        shape = (
            batch,
            (height - window[0]) // stride[0] + 1,
            (width - window[1]) // stride[1] + 1,
            channels,
        )
        return self.op(
            code,
            [value],
            shape,
            value.dtype,
            scale=value.scale,
            options="Pool2DOptions",
            version=2 if value.dtype == "int8" else 1,
            settings={
                "padding": schema.Padding.VALID,
                "filterHeight": window[0],
                "filterWidth": window[1],
                "strideH": stride[0],
                "strideW": stride[1],
            },
        )


def _numbers(given: Sequence[int] | Shared[Value]) -> tuple[int, ...]:
    return given.numbers if isinstance(given, Shared) else tuple(int(number) for number in given)
