"""Adaptive average pooling as a few plain layers, exact for every size.

Output `i` of `m` over an axis of `n` is the mean of inputs floor(i n / m) to ceil((i + 1) n / m), PyTorch's rule.
The windows of the two axes are independent of each other, so an axis can be done by a layer of its own:

- windows of one size at one distance (n mod m is 0, 1 or m - 1) are a strided pool;
- any windows are a product with a constant (m, n) matrix, its rows 1 / size inside the window, 0 outside; where
  n and m have a common factor g, the windows repeat g times and the matrix is (m / g, n / g);
- a whole axis is a reduction.

No pool here has a window of 100,000 elements, which TensorRT refuses, or of more than `POOL_TERMS`: a pool adds
its window up one by one, and in float32 a longer sum is more than 1e-6 off.

Of the forms that fit, `plan` takes the cheapest by this cost, in nanoseconds, summed over the layers that run:

    pool       layer + outputs * (volume * pool_read + pool_write) + volume * pool_term
    reduction  layer + inputs * reduce_read + outputs * reduce_write + vectors * vector
    product    layer + (inputs + outputs) * move + multiply-adds * multiply + products * product + vectors * vector
    grouped    a product + 2 * reshape; joined, a product + outputs * turn

`Costs` holds the figures of a runtime. A constant costs nothing at run time; it counts as a layer all the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qexport.errors import UnsupportedOperator

Pair = tuple[int, int]
"""Of rows and columns."""
Axis = Literal[0, 1]
"""0: rows, the second last axis of a feature map; 1: columns, its last."""

WINDOW_LIMIT = 100_000
"""TensorRT's builder demands fewer elements in the window of a 2-D pool."""
POOL_TERMS = 256
MOST_LAYERS, MOST_LAYERS_GLOBAL = 6, 4


@dataclass(frozen=True, slots=True)
class Costs:
    """What the parts of a layer take in one runtime, in nanoseconds."""

    layer: float
    """To start a layer."""
    pool_read: float
    """Each element of each window."""
    pool_read_apart: float
    """The same in a window of one column, whose elements lie apart in memory."""
    pool_write: float
    """Each output of a pool."""
    pool_term: float
    """Each further term of one window, where windows run at the same time and the sum of one cannot be shared."""
    reduce_read: float
    reduce_write: float
    move: float
    """Each element that a matrix product reads or writes."""
    multiply: float
    """Each multiply-add; with fewer than 64 columns to multiply along the rows, 64 / columns of them."""
    product: float
    """Each single product of a batch: one for each map where rows are averaged, one for all maps for columns."""
    vector: float
    """Each row of a map (part of one where grouped) that is multiplied along its columns, or added to the others."""
    rows_together: bool
    """Whether a product over columns leaves the rows together in memory, so that those are one product as well."""
    turn: float
    """Each output of that one product, to bring it into the map's order."""
    reshape: float
    largest_reduction: int
    """Most elements that one reduction sums; above, it is done one axis after the other."""


ONNX_RUNTIME = Costs(
    layer=1500, pool_read=0.12, pool_read_apart=0.15, pool_write=1.2, pool_term=0, reduce_read=0.065,
    reduce_write=3, move=0.05, multiply=0.015, product=90, vector=2.5, rows_together=False, turn=0, reshape=1500,
    largest_reduction=16_384,
)  # fmt: skip
"""Fitted to ONNX Runtime 1.31 on one thread of an x86-64; longer reductions are also more than 1e-6 off there."""
TORCH = Costs(
    layer=3000, pool_read=0.3, pool_read_apart=0.9, pool_write=4.5, pool_term=0, reduce_read=0.045,
    reduce_write=3, move=0.17, multiply=0.013, product=1000, vector=0, rows_together=True, turn=3, reshape=2500,
    largest_reduction=2**62,
)  # fmt: skip
"""Fitted to PyTorch 2.14 on one thread of an x86-64. Its mean sums in pairs, so it needs no stages."""
TENSORRT = Costs(
    layer=5000, pool_read=0.04, pool_read_apart=0.04, pool_write=0.04, pool_term=3, reduce_read=0.08,
    reduce_write=0.04, move=0.08, multiply=0.002, product=1, vector=0, rows_together=False, turn=0, reshape=0,
    largest_reduction=WINDOW_LIMIT - 1,
)  # fmt: skip
"""An estimate, not a measurement: a GPU of 100 GB/s (Jetson Orin), where a reduction or a product reads a map that
convolutions left in another layout, hence twice."""
_WIDE = 64
"""Columns from which on a product over rows uses a machine's vectors in full."""


@dataclass(frozen=True, slots=True)
class Window:
    """Windows of one size at one distance along an axis."""

    kernel: int
    stride: int
    padding: int
    """At both ends; padded elements count in no average."""


@dataclass(frozen=True, slots=True)
class Pool:
    """A strided average pool over both axes; padding does not count."""

    kernel: Pair
    stride: Pair
    padding: Pair

    @property
    def volume(self) -> int:
        """Elements of one window."""
        return self.kernel[0] * self.kernel[1]

    @property
    def layers(self) -> int:
        """Layers it makes."""
        return 1

    def output_size(self, size: Pair) -> Pair:
        """Return the size after this step."""
        rows, columns = (
            (size[axis] + 2 * self.padding[axis] - self.kernel[axis]) // self.stride[axis] + 1
            for axis in (0, 1)
        )
        return rows, columns

    def cost_ns(self, size: Pair, maps: int, costs: Costs) -> float:
        """Return the cost of this step on maps of a size."""
        outputs = maps * math.prod(self.output_size(size))
        read = costs.pool_read_apart if self.kernel[1] == 1 < self.kernel[0] else costs.pool_read
        each = self.volume * read + costs.pool_write
        return costs.layer + outputs * each + self.volume * costs.pool_term


@dataclass(frozen=True, slots=True)
class Reduce:
    """The mean over whole axes, which stay as size 1."""

    axes: tuple[Axis, ...]

    @property
    def layers(self) -> int:
        """Layers it makes."""
        return 1

    @property
    def negative_axes(self) -> tuple[int, ...]:
        """The axes counted from the last, for maps of any number of axes."""
        return tuple(axis - 2 for axis in self.axes)

    def output_size(self, size: Pair) -> Pair:
        """Return the size after this step."""
        return 1 if 0 in self.axes else size[0], 1 if 1 in self.axes else size[1]

    def cost_ns(self, size: Pair, maps: int, costs: Costs) -> float:
        """Return the cost of this step on maps of a size."""
        inputs, outputs = maps * math.prod(size), maps * math.prod(self.output_size(size))
        vectors = maps * size[0] if self.axes == (0,) else 0
        cost = costs.layer + inputs * costs.reduce_read + outputs * costs.reduce_write
        return cost + vectors * costs.vector


@dataclass(frozen=True, slots=True)
class Matrix:
    """A product with a constant averaging matrix along one axis."""

    axis: Axis
    inputs: int
    outputs: int
    groups: int = 1
    """Equal parts of the axis, each multiplied by the same matrix."""

    @property
    def layers(self) -> int:
        """Constant and product; grouped, a reshape before and one after."""
        return 2 if self.groups == 1 else 4

    def weights(self) -> NDArray[np.float64]:
        """Return the matrix, (outputs / groups, inputs / groups) float64."""
        return averaging_matrix(self.inputs // self.groups, self.outputs // self.groups)

    def output_size(self, size: Pair) -> Pair:
        """Return the size after this step."""
        return (self.outputs, size[1]) if self.axis == 0 else (size[0], self.outputs)

    def cost_ns(self, size: Pair, maps: int, costs: Costs, *, rows_together: bool = False) -> float:
        """Return the cost of this step on maps of a size, whose rows may lie together in memory."""
        inputs, outputs = maps * math.prod(size), maps * math.prod(self.output_size(size))
        joined = rows_together and self.axis == 0 and self.groups == 1
        products = 1 if self.axis == 1 or joined else maps * self.groups
        multiply_adds = outputs * (self.inputs // self.groups)
        vectors = maps * size[0] * self.groups if self.axis == 1 else 0
        thin = max(1.0, _WIDE / size[1]) if products > 1 else 1.0
        cost = costs.layer + (inputs + outputs) * costs.move + multiply_adds * thin * costs.multiply
        cost += products * costs.product + vectors * costs.vector + joined * outputs * costs.turn
        return cost + (2 * costs.reshape if self.groups > 1 else 0)


Step = Pool | Reduce | Matrix


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """The steps of one adaptive average pool, in order; none where the output has the input's size."""

    input_size: Pair
    output_size: Pair
    steps: tuple[Step, ...]
    cost_ns: float

    @property
    def layers(self) -> int:
        """Layers it makes, constants and reshapes among them."""
        return sum(step.layers for step in self.steps)

    @property
    def largest_window(self) -> int:
        """Elements of the largest window of a pool; 0 without a pool."""
        return max((step.volume for step in self.steps if isinstance(step, Pool)), default=0)

    @property
    def form(self) -> str:
        """The steps in words, `reduce(1) reduce(0)`."""
        return " ".join(_word(step) for step in self.steps) or "identity"


def most_layers(output_size: Pair) -> int:
    """Return the bound on the layers of a plan."""
    return MOST_LAYERS_GLOBAL if output_size == (1, 1) else MOST_LAYERS


def window_bounds(inputs: int, outputs: int) -> list[Pair]:
    """Return first element and the one after the last of each window, by PyTorch's rule."""
    return [(i * inputs // outputs, -(-(i + 1) * inputs // outputs)) for i in range(outputs)]


def averaging_matrix(inputs: int, outputs: int) -> NDArray[np.float64]:
    """Return the (outputs, inputs) float64 matrix whose product with an axis averages its windows."""
    matrix = np.zeros((outputs, inputs))
    for row, (first, end) in enumerate(window_bounds(inputs, outputs)):
        matrix[row, first:end] = 1 / (end - first)
    return matrix


def regular_window(inputs: int, outputs: int) -> Window | None:
    """Return the windows of an axis as those of a strided pool; None where they differ.

    With n = q m + r: window i starts at q i + floor(i r / m). For r = 1 the floor is 0 and each window has q + 1
    elements. For r = m - 1 it is i - 1 but for the first, so that windows of q + 2 at a distance of q + 1 start
    one element before the axis and end one after it.
    """
    distance, rest = divmod(inputs, outputs)
    if rest == 0:
        return Window(distance, distance, 0)
    if rest == 1 and distance:
        return Window(distance + 1, distance, 0)
    return Window(distance + 2, distance + 1, 1) if rest == outputs - 1 else None


def resolve_output_size(output_size: int | Sequence[int | None] | None, input_size: Pair) -> Pair:
    """Return PyTorch's `output_size` as numbers; None is the input's size.

    Raises:
        UnsupportedOperator: no size, or not one or two numbers.
    """
    asked = (
        [output_size, output_size] if output_size is None or isinstance(output_size, int) else [*output_size]
    )
    sizes = [
        given if wanted is None else int(wanted) for wanted, given in zip(asked, input_size, strict=False)
    ]
    if len(asked) != 2 or min(sizes) < 1 or min(input_size) < 1:
        raise UnsupportedOperator(
            f"an adaptive pool of a {input_size[0]} x {input_size[1]} map to output_size {output_size}: "
            "expected one number or two, each at least 1 or None, and a map that is not empty."
        )
    return sizes[0], sizes[1]


@functools.lru_cache(maxsize=4096)
def plan(
    input_size: Pair, output_size: Pair, *, costs: Costs, maps: int = 256, layers: int | None = None
) -> PoolPlan:
    """Return the cheapest exact form of an adaptive average pool.

    Args:
        input_size: rows and columns of the map.
        output_size: as `resolve_output_size` gives it.
        costs: of the runtime.
        maps: maps that are pooled, batch times channels.
        layers: most layers, where fewer are left than `most_layers` allows; at least 4.

    There always is one: a reduction or a product for each axis, two layers each at most.
    """
    limit = most_layers(output_size) if layers is None else min(layers, most_layers(output_size))
    best: PoolPlan | None = None
    for steps in _forms(input_size, output_size, costs):
        candidate = PoolPlan(input_size, output_size, steps, _cost_ns(steps, input_size, maps, costs))
        if candidate.layers <= limit and (best is None or candidate.cost_ns < best.cost_ns):
            best = candidate
    if best is None:
        raise UnsupportedOperator(
            f"an adaptive average pool of {input_size} to {output_size} in {limit} layers: allow at least 4."
        )
    return best


def _cost_ns(steps: tuple[Step, ...], size: Pair, maps: int, costs: Costs) -> float:
    total, together = 0.0, False
    for step in steps:
        if isinstance(step, Matrix):
            total += step.cost_ns(size, maps, costs, rows_together=together)
        else:
            total += step.cost_ns(size, maps, costs)
        together = costs.rows_together and isinstance(step, Matrix) and (step.axis, step.groups) == (1, 1)
        size = step.output_size(size)
    return total


def _forms(input_size: Pair, output_size: Pair, costs: Costs) -> Iterator[tuple[Step, ...]]:
    if input_size == output_size:
        yield ()
        return
    yield from _pools_of_both_axes(input_size, output_size)
    if output_size == (1, 1) and math.prod(input_size) <= costs.largest_reduction:
        yield (Reduce((0, 1)),)
    for rows in _forms_of_axis(0, input_size[0], output_size[0]):
        for columns in _forms_of_axis(1, input_size[1], output_size[1]):
            yield (*rows, *columns)
            yield (*columns, *rows)


def _forms_of_axis(axis: Axis, inputs: int, outputs: int) -> Iterator[tuple[Step, ...]]:
    if inputs == outputs:
        yield ()
        return
    window = regular_window(inputs, outputs)
    if window is not None and window.kernel <= POOL_TERMS:
        yield (_pool((window, _WHOLE) if axis == 0 else (_WHOLE, window)),)
    yield (Reduce((axis,)) if outputs == 1 else Matrix(axis, inputs, outputs),)
    groups = math.gcd(inputs, outputs)
    if groups > 1:
        yield (Matrix(axis, inputs, outputs, groups),)


_WHOLE = Window(1, 1, 0)


def _pool(windows: tuple[Window, Window]) -> Pool:
    rows, columns = windows
    return Pool((rows.kernel, columns.kernel), (rows.stride, columns.stride), (rows.padding, columns.padding))


def _pools_of_both_axes(input_size: Pair, output_size: Pair) -> Iterator[tuple[Step, ...]]:
    """Yield one pool, or two where its window is long and the windows do not overlap."""
    rows, columns = (regular_window(n, m) for n, m in zip(input_size, output_size, strict=True))
    if rows is None or columns is None:
        return
    pool = _pool((rows, columns))
    if pool.volume <= POOL_TERMS:
        yield (pool,)
    elif pool.kernel == pool.stride:
        height, width = pool.kernel
        for first in _divisors(height):
            for second in _divisors(width):
                kernel, rest = (first, second), (height // first, width // second)
                if 1 < math.prod(kernel) <= POOL_TERMS and math.prod(rest) <= POOL_TERMS:
                    yield Pool(kernel, kernel, (0, 0)), Pool(rest, rest, (0, 0))


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _word(step: Step) -> str:
    if isinstance(step, Pool):
        return "pool({}x{}/{}x{})".format(*step.kernel, *step.stride)
    if isinstance(step, Reduce):
        return f"reduce({','.join(map(str, step.axes))})"
    grouped = f"*{step.groups}" if step.groups > 1 else ""
    return f"matrix({step.axis}: {step.inputs // step.groups}->{step.outputs // step.groups}{grouped})"
