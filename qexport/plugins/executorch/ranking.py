"""Best scores and non-maximum suppression, exact.

ExecuTorch's topk takes equal values in any order, it has no sort and no suppression. Who suppresses whom is a matrix
that XNNPACK computes, in pieces that stay in the cache. It has no comparison, but a difference times 2**126, clamped to
0 and 1, is one. Starting from "all are kept", a box is kept where no better kept box suppresses it. A few such turns
settle most images; where they do not, loops of more and more turns do, the last of as many as there are boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch.fx import Node

from qexport.plugins.executorch.builder import KernelBuilder
from qexport.plugins.executorch.held import Held, as_plain
from qexport.plugins.executorch.lowering import Lowering
from qexport.plugins.executorch.steps import Value
from qexport.plugins.executorch.xnnpack import SegmentBuilder
from qexport.quantization.graph import argument_node

TURNS = 6
"""That are written out; chains of suppressions on most images are this long."""
FURTHER_TURNS = (6, 24)
"""Of loops that are run where these do not settle it, before the one that always does."""
MATRIX_VALUES = 2**24
"""Of the matrices that are held at a time: 64 MiB."""
PIECE_VALUES = 2**17
"""Of the matrix, computed at a time: half a MiB."""
_STEEP = 2.0**126
"""Takes every difference of two float32 beyond 1, if it is not subnormal."""
_TINY = 2.0**-100
"""Less than any area of a box that suppresses, more than zero: 0 / 0 has to count as no overlap."""


def best_scores(lowering: Lowering, node: Node) -> tuple[Held, ...]:
    """Write the best of a vector, of equal ones the earlier first, and where they stand."""
    scores = as_plain(lowering.xnnpack, lowering.real(argument_node(node)))
    build, count, number = lowering.kernels, int(str(node.args[1])), scores.shape[0]
    ranked, index = build.steps.kernel(torch.topk, scores, number)
    group = _group_of_equals(build, ranked)
    # Numbers that are all different: the rank of the value first, then the place.
    order = build.add(build.call(torch.mul, group, number), index)
    first, _ = build.steps.kernel(torch.topk, order, count, -1, False)
    place = build.call(torch.remainder, first, number)
    return Held.plain(build.gather(scores, place)), Held.plain(place)


def _group_of_equals(build: KernelBuilder, ranked: Value) -> Value:
    """Return how many different values stand before each of a sorted vector, int64."""
    number = ranked.shape[0]
    differs = build.call(
        torch.ne, build.slice(ranked, [1], [number], [0]), build.slice(ranked, [0], [number - 1], [0])
    )
    counted = build.call(torch.cumsum, build.cast(differs, np.int64), 0)
    return build.pad(counted, [1, 0])


def topk(lowering: Lowering, node: Node) -> tuple[Held, ...]:
    """Write the largest entries of an axis and where they stand, of equal ones any."""
    value = as_plain(lowering.xnnpack, lowering.real(argument_node(node)))
    results = lowering.steps.kernel(torch.topk, value, *node.args[1:])
    return tuple(map(Held.plain, results))


def nms_mask(lowering: Lowering, node: Node) -> Held:
    """Write `qexport.detectors.operators.batched_nms_mask`."""
    xnnpack, build = lowering.xnnpack, lowering.kernels
    boxes, scores, valid = (
        as_plain(xnnpack, lowering.real(argument_node(node, place))) for place in range(3)
    )
    lowering.go_to(node)
    groups, number = scores.shape
    # torchvision compares in double: above the threshold is above the largest float32 that is not.
    threshold = _at_most(float(str(node.args[3])))
    sides = _sides(xnnpack, boxes)
    places = _Places(build, number)
    alive = build.reshape(build.cast(valid, np.float32), [groups, number, 1])
    each = max(1, MATRIX_VALUES // number**2)
    kept: list[Value] = []
    for first in range(0, groups, each):
        last = min(first + each, groups)
        nothing = _nothing(build, kept[-1]) if kept else None
        lowering.steps.part = f"groups from {first}" if each < groups else ""
        ranks = scores if nothing is None else xnnpack.binary("add", scores, nothing)
        matrices = [
            _matrix(
                xnnpack,
                [xnnpack.cut(side, 0, group, group + 1) for side in (*sides, ranks)],
                places,
                threshold,
            )
            for group in range(first, last)
        ]
        matrix = xnnpack.reshape(xnnpack.concatenate(matrices, 0), (last - first, number, number))
        lowering.steps.part = ""
        kept.append(_kept(build, matrix, build.slice(alive, [first], [last], [0])))
    return Held.plain(build.concat(kept, 0) if len(kept) > 1 else kept[0])


def _nothing(build: KernelBuilder, after: Value) -> Value:
    """Return zero, (1, 1), that is known only after another value is.

    ExecuTorch does everything as soon as it can, and would hold all matrices. And what its branches return lies in one
    place: the next one may not begin before that is read.
    """
    one = build.cast(build.slice(after, [0, 0], [1, 1], [0, 1]), np.float32)
    return build.call(torch.mul, one, 0.0)


def _kept(build: KernelBuilder, matrix: Value, start: Value) -> Value:
    """Return which boxes of several groups survive, (G, N) bool."""
    kept = before = start
    for _ in range(TURNS):
        before, kept = kept, build.call(_turn, matrix, start, kept)
    settled = build.call(_settled, before, matrix, start, kept)
    # Compared first: what a branch returns is moved into its place, where a view of it would not look.
    return build.reshape(build.call(torch.gt, settled, 0.5), matrix.shape[:2])


def _at_most(number: float) -> float:
    nearest = np.float32(number)
    return float(nearest if float(nearest) <= number else np.nextafter(nearest, np.float32(-np.inf)))


def _sides(xnnpack: SegmentBuilder, boxes: Value) -> list[Value]:
    """Return left, top, right, bottom and area of each box, (G, N) each."""
    groups, number, _ = boxes.shape
    turned = xnnpack.transpose(boxes, (2, 0, 1))
    left, top, right, bottom = (
        xnnpack.reshape(xnnpack.cut(turned, 0, side, side + 1), (groups, number)) for side in range(4)
    )
    width, height = (
        xnnpack.binary("subtract", last, first) for first, last in ((left, right), (top, bottom))
    )
    return [left, top, right, bottom, xnnpack.binary("multiply", width, height)]


class _Places:
    """Numbers of boxes, as constants that are stored once."""

    def __init__(self, build: KernelBuilder, number: int) -> None:
        self._build = build
        self.row = build.constant(np.arange(number)[None], np.float32)
        """(1, N)"""
        self._columns: dict[int, Value] = {}

    def column(self, first: int, last: int) -> Value:
        """Return a range of them, (last - first, 1)."""
        if first not in self._columns:
            self._columns[first] = self._build.constant(np.arange(first, last)[:, None], np.float32)
        return self._columns[first]


def _matrix(xnnpack: SegmentBuilder, columns: Sequence[Value], places: _Places, threshold: float) -> Value:
    """Return whether the box of the column suppresses that of the row, (N, N) of 0 and 1.

    Args:
        xnnpack: to write with.
        columns: left, top, right, bottom, area and score of the boxes of a group, (1, N) each.
        places: of the boxes.
        threshold: of the overlap.
    """
    number = columns[0].shape[1]
    each = max(1, PIECE_VALUES // number)
    pieces = []
    for first in range(0, number, each):
        last = min(first + each, number)
        rows = [xnnpack.reshape(xnnpack.cut(one, 1, first, last), (last - first, 1)) for one in columns]
        better = _better(xnnpack, (rows[5], places.column(first, last)), (columns[5], places.row))
        pieces.append(xnnpack.binary("multiply", _overlap(xnnpack, rows, columns, threshold), better))
    return xnnpack.concatenate(pieces, 0)


def _overlap(
    xnnpack: SegmentBuilder, rows: Sequence[Value], columns: Sequence[Value], threshold: float
) -> Value:
    """Return whether IoU exceeds the threshold, as torchvision's nms computes it."""
    width, height = (
        xnnpack.binary(
            "subtract",
            xnnpack.binary("minimum", rows[end], columns[end]),
            xnnpack.binary("maximum", rows[start], columns[start]),
            limits=(0.0, None),
        )
        for start, end in ((0, 2), (1, 3))
    )
    shared = xnnpack.binary("multiply", width, height)
    both = xnnpack.binary("add", rows[4], columns[4])
    union = xnnpack.binary("subtract", both, shared, limits=(_TINY, None))
    above = xnnpack.binary("subtract", xnnpack.binary("divide", shared, union), xnnpack.number(threshold))
    return xnnpack.binary("multiply", above, xnnpack.number(_STEEP), limits=(0.0, 1.0))


def _better(xnnpack: SegmentBuilder, own: Sequence[Value], other: Sequence[Value]) -> Value:
    """Return whether the box of the column ranks before that of the row; of equal ones the earlier.

    Args:
        xnnpack: to write with.
        own: score and place of the box of the row.
        other: of that of the column.
    """
    difference = xnnpack.binary("subtract", other[0], own[0])
    steep = xnnpack.binary("multiply", difference, xnnpack.number(_STEEP))
    # Zero or beyond any place, by far: places only decide where the scores do not.
    return xnnpack.binary("subtract", xnnpack.binary("add", steep, own[1]), other[1], limits=(0.0, 1.0))


def _turn(matrix: Tensor, start: Tensor, kept: Tensor) -> Tensor:
    """Return which boxes are kept where no kept box suppresses them, (G, N, 1) of 0 and 1."""
    return torch.mul(start, torch.bmm(matrix, kept) < 0.5)


def _settled(before: Tensor, matrix: Tensor, start: Tensor, kept: Tensor) -> Tensor:
    """Return what is kept when a further turn changes nothing."""
    if kept.is_meta:
        return torch.empty_like(kept)  # asked for the shape alone: which branch is taken is not known
    # No chain of suppressions is longer than there are boxes.
    for turns in (*FURTHER_TURNS, matrix.shape[1]):
        done = torch.eq(kept, before).all()
        before, kept = torch.cond(done, _as_it_is, _with_turns(turns), (matrix, start, before, kept))
    return kept


def _as_it_is(matrix: Tensor, start: Tensor, before: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    del matrix, start
    return before.clone(), kept.clone()


def _with_turns(turns: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return what takes so many turns: what was kept before the last of them, and after."""

    def several(matrix: Tensor, start: Tensor, before: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        def turn(carried: tuple[Tensor, Tensor], _: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
            after = _turn(matrix, start, carried[1])
            return (carried[1].clone(), after), after.sum()

        settled: tuple[Tensor, Tensor] = scan(turn, (before, kept), torch.arange(turns).to(torch.float32))[0]
        return settled

    return several
