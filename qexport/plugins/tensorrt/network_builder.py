"""Write layers into a TensorRT network: the TensorRT back end of `Operations`.

Only calls that TensorRT 8.5 to 11 all have, or that are looked for first. What TensorRT does not do by itself, and
ONNX does, is done here: shapes of different rank are made equal, integers of 64 bits are held in 32 where the
library has no others. Types are those of strongly typed networks: nothing is converted unasked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from qexport.errors import UnsupportedOperator
from qexport.plugins.operations import Dtype, Operations, Shared

Tensor: TypeAlias = Any
"""A `tensorrt.ITensor`."""
Integers: TypeAlias = Sequence[int] | Shared[Tensor]

MOST_OF_TOP_K = 3840
"""The builder refuses a larger K."""


class NetworkBuilder:
    """Adds layers to a network.

    Args:
        trt: the module of `load_library`.
        network: an `INetworkDefinition`, or torch2trt's wrapper around one.

    Raises:
        UnsupportedOperator: by any operation on a tensor of dynamic shape, and by `top_k`.
    """

    def __init__(self, trt: Any, network: Any) -> None:
        self._trt, self._network = trt, network

    def constant(self, value: ArrayLike, dtype: Dtype) -> Tensor:
        """Add a constant; the network keeps the array."""
        array = np.asarray(value, dtype=dtype)
        if array.dtype == np.int64 and not hasattr(self._trt, "int64"):
            array = array.astype(np.int32)
        array = np.ascontiguousarray(array).reshape(array.shape)  # the first adds an axis to a scalar
        return self._network.add_constant(array.shape, array).get_output(0)

    def integers(self, *numbers: int) -> Shared[Tensor]:
        """Return integers; a layer holds its own."""
        return Shared(numbers)

    def add(self, first: Tensor, second: Tensor) -> Tensor:
        """Add the sum."""
        return self._elementwise("SUM", first, second)

    def sub(self, first: Tensor, second: Tensor) -> Tensor:
        """Add the difference."""
        return self._elementwise("SUB", first, second)

    def mul(self, first: Tensor, second: Tensor) -> Tensor:
        """Add the product."""
        return self._elementwise("PROD", first, second)

    def div(self, first: Tensor, second: Tensor) -> Tensor:
        """Add the quotient."""
        return self._elementwise("DIV", first, second)

    def minimum(self, first: Tensor, second: Tensor) -> Tensor:
        """Add the smaller of each pair."""
        return self._elementwise("MIN", first, second)

    def maximum(self, first: Tensor, second: Tensor) -> Tensor:
        """Add the larger of each pair."""
        return self._elementwise("MAX", first, second)

    def clip(self, value: Tensor, low: float, high: float) -> Tensor:
        """Add both bounds."""
        above = self.maximum(value, self.constant(low, np.float32))
        return self.minimum(above, self.constant(high, np.float32))

    def floor(self, value: Tensor) -> Tensor:
        """Add the largest integer that is not above."""
        return self._unary("FLOOR", value)

    def log(self, value: Tensor) -> Tensor:
        """Add the natural logarithm."""
        return self._unary("LOG", value)

    def sqrt(self, value: Tensor) -> Tensor:
        """Add the square root."""
        return self._unary("SQRT", value)

    def absolute(self, value: Tensor) -> Tensor:
        """Add the magnitude."""
        return self._unary("ABS", value)

    def equal(self, first: Tensor, second: Tensor) -> Tensor:
        """Add the comparison."""
        return self._elementwise("EQUAL", first, second)

    def greater(self, first: Tensor, second: Tensor) -> Tensor:
        """Add the comparison."""
        return self._elementwise("GREATER", first, second)

    def less_or_equal(self, first: Tensor, second: Tensor) -> Tensor:
        """Add both comparisons: TensorRT has no layer for the two."""
        return self.logical_or(self._elementwise("LESS", first, second), self.equal(first, second))

    def logical_and(self, first: Tensor, second: Tensor) -> Tensor:
        """Add the conjunction."""
        return self._elementwise("AND", first, second)

    def logical_or(self, first: Tensor, second: Tensor) -> Tensor:
        """Add the disjunction."""
        return self._elementwise("OR", first, second)

    def logical_not(self, value: Tensor) -> Tensor:
        """Add the negation."""
        return self._unary("NOT", value)

    def cast(self, value: Tensor, dtype: Dtype) -> Tensor:
        """Add a conversion; where the version has no layer for it, an identity whose output has the other type."""
        wanted = self._dtype(dtype)
        if hasattr(self._network, "add_cast"):
            return self._network.add_cast(value, wanted).get_output(0)
        layer = self._network.add_identity(value)
        layer.set_output_type(0, wanted)
        return layer.get_output(0)

    def gather(self, value: Tensor, index: Tensor, axis: int | None = None) -> Tensor:
        """Add a gather."""
        axis = (axis or 0) % len(_shape(value))
        return self._network.add_gather(value, index, axis).get_output(0)

    def slice(self, value: Tensor, starts: Integers, ends: Integers, axes: Integers) -> Tensor:
        """Add a slice of stride 1."""
        size = _shape(value)
        first, count = [0] * len(size), list(size)
        for start, end, axis in zip(_numbers(starts), _numbers(ends), _numbers(axes), strict=True):
            first[axis], count[axis] = start, min(end, size[axis]) - start
        return self._sliced(value, first, count, [1] * len(size)).get_output(0)

    def concat(self, values: Sequence[Tensor], axis: int) -> Tensor:
        """Add a concatenation."""
        layer = self._network.add_concatenation(list(values))
        layer.axis = axis
        return layer.get_output(0)

    def reshape(self, value: Tensor, shape: Integers) -> Tensor:
        """Add a shuffle."""
        layer = self._network.add_shuffle(value)
        layer.reshape_dims = tuple(_numbers(shape))
        return layer.get_output(0)

    def unsqueeze(self, value: Tensor, axes: Integers) -> Tensor:
        """Add a shuffle."""
        new, sizes = set(_numbers(axes)), iter(_shape(value))
        rank = len(_shape(value)) + len(new)
        return self.reshape(value, [1 if axis in new else next(sizes) for axis in range(rank)])

    def squeeze(self, value: Tensor, axes: Integers) -> Tensor:
        """Add a shuffle."""
        gone = set(_numbers(axes))
        return self.reshape(value, [size for axis, size in enumerate(_shape(value)) if axis not in gone])

    def transpose(self, value: Tensor, order: Sequence[int]) -> Tensor:
        """Add a shuffle."""
        layer = self._network.add_shuffle(value)
        layer.first_transpose = tuple(order)
        return layer.get_output(0)

    def expand(self, value: Tensor, shape: Integers) -> Tensor:
        """Add a slice that stands still along axes of length 1."""
        size, wanted = _shape(value), list(_numbers(shape))
        stride = [0 if given == 1 else 1 for given in size]
        return self._sliced(value, [0] * len(size), wanted, stride).get_output(0)

    def pad(self, value: Tensor, counts: Integers, *, edge: bool = False) -> Tensor:
        """Add a slice that begins and ends outside."""
        size, numbers = _shape(value), list(_numbers(counts))
        before, after = numbers[: len(size)], numbers[len(size) :]
        whole = [sum(lengths) for lengths in zip(before, size, after, strict=True)]
        layer = self._sliced(value, [-count for count in before], whole, [1] * len(size))
        modes = _either(self._trt, "SampleMode", "SliceMode")
        layer.mode = modes.CLAMP if edge else modes.FILL
        if not edge:
            layer.set_input(4, self.constant(0.0, np.float32))
        return layer.get_output(0)

    def reduce_mean(self, value: Tensor, axes: Integers) -> Tensor:
        """Add a reduction that keeps the axes."""
        mask = sum(1 << axis for axis in _numbers(axes))
        return self._network.add_reduce(value, self._trt.ReduceOperation.AVG, mask, True).get_output(0)

    def largest(self, value: Tensor) -> Tensor:
        """Add a reduction over all axes."""
        mask = (1 << len(_shape(value))) - 1
        return self._network.add_reduce(value, self._trt.ReduceOperation.MAX, mask, False).get_output(0)

    def matmul(self, first: Tensor, second: Tensor) -> Tensor:
        """Add a matrix product."""
        none = self._trt.MatrixOperation.NONE
        first, second = self._of_one_rank(first, second)
        return self._network.add_matrix_multiply(first, none, second, none).get_output(0)

    def average_pool(self, value: Tensor, window: Sequence[int], stride: Sequence[int]) -> Tensor:
        """Add a pooling."""
        layer = self._network.add_pooling_nd(value, self._trt.PoolingType.AVERAGE, tuple(window))
        layer.stride_nd = tuple(stride)
        return layer.get_output(0)

    def grid_sample(self, value: Tensor, grid: Tensor) -> Tensor:
        """Add a grid sample that reads the border beyond it."""
        layer = self._network.add_grid_sample(value, grid)
        layer.interpolation_mode = _either(self._trt, "InterpolationMode", "ResizeMode").LINEAR
        layer.sample_mode = _either(self._trt, "SampleMode", "SliceMode").CLAMP
        layer.align_corners = True
        return layer.get_output(0)

    def top_k(self, value: Tensor, count: int, axis: int) -> tuple[Tensor, Tensor]:
        """Add the largest entries and their indices, int64, best first; TensorRT promises no order of equal ones.

        Raises:
            UnsupportedOperator: more entries than TensorRT's layer gives.
        """
        if count > MOST_OF_TOP_K:
            raise UnsupportedOperator(
                f"TensorRT's TopK gives at most {MOST_OF_TOP_K} entries; {count} are asked for. "
                "Keep fewer proposals and candidates (rpn_pre_nms_top_n_test, --proposals)."
            )
        size = _shape(value)
        # TensorRT takes no vector.
        given = self.unsqueeze(value, [1]) if len(size) == 1 else value
        layer = self._network.add_topk(given, self._trt.TopKOperation.MAX, count, 1 << axis)
        best, index = layer.get_output(0), layer.get_output(1)
        if len(size) == 1:
            best, index = self.squeeze(best, [1]), self.squeeze(index, [1])
        return best, self.cast(index, np.int64) if hasattr(self._trt, "int64") else index

    def repeat(
        self,
        start: Tensor,
        turn: Callable[[Operations[Tensor], Tensor], tuple[Tensor, Tensor]],
        most: int,
        *,
        name: str,
    ) -> Tensor:
        """Add a loop that ends when a turn says so, or after `most` turns."""
        trt = self._trt
        limit, going_on = self.constant(most, np.int32), self.constant(True, np.bool_)
        loop = self._network.add_loop()
        loop.name = f"{name}_{self._network.num_layers}"
        loop.add_trip_limit(limit, trt.TripLimit.COUNT)
        going, held = loop.add_recurrence(going_on), loop.add_recurrence(start)
        loop.add_trip_limit(going.get_output(0), trt.TripLimit.WHILE)
        again, after = turn(self, held.get_output(0))
        going.set_input(1, again)
        held.set_input(1, after)
        return loop.add_loop_output(held.get_output(0), trt.LoopOutput.LAST_VALUE).get_output(0)

    def _elementwise(self, operation: str, first: Tensor, second: Tensor) -> Tensor:
        kind = getattr(self._trt.ElementWiseOperation, operation)
        return self._network.add_elementwise(*self._of_one_rank(first, second), kind).get_output(0)

    def _unary(self, operation: str, value: Tensor) -> Tensor:
        return self._network.add_unary(value, getattr(self._trt.UnaryOperation, operation)).get_output(0)

    def _of_one_rank(self, *values: Tensor) -> list[Tensor]:
        rank = max(len(_shape(value)) for value in values)
        return [
            value
            if len(_shape(value)) == rank
            else self.reshape(value, [*[1] * (rank - len(_shape(value))), *_shape(value)])
            for value in values
        ]

    def _sliced(
        self, value: Tensor, start: Sequence[int], count: Sequence[int], stride: Sequence[int]
    ) -> Any:
        return self._network.add_slice(value, tuple(start), tuple(count), tuple(stride))

    def _dtype(self, dtype: Dtype) -> Any:
        names = {np.float32: "float32", np.int32: "int32", np.int64: "int64", np.bool_: "bool"}
        return _either(self._trt, names[dtype], "int32")


def _numbers(integers: Integers) -> Sequence[int]:
    return integers.numbers if isinstance(integers, Shared) else integers


def _either(trt: Any, name: str, otherwise: str) -> Any:
    """Return what a version of TensorRT calls by one name or the other."""
    return getattr(trt, name if hasattr(trt, name) else otherwise)


def _shape(value: Tensor) -> tuple[int, ...]:
    shape = tuple(int(size) for size in value.shape)
    if any(size < 0 for size in shape):
        raise UnsupportedOperator(
            f"the tensor {value.name} has the dynamic shape {shape}; this form needs a fixed one. "
            "Convert with inputs of fixed shape."
        )
    return shape
