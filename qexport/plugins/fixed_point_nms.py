"""Greedy NMS in operations that every runtime has: the fixed point of "kept unless a kept better box overlaps".

Who suppresses whom is one matrix a group. Starting from "all are kept", a box is kept where no better kept box
suppresses it; repeated until nothing changes. A box's fate is final once that of all better boxes is, so the
loop ends after as many turns as the longest chain of suppressions has links (4 to 8 on real images), at most
after as many as there are boxes, and its result is that of the greedy algorithm, not an approximation.
"""

from __future__ import annotations

import numpy as np

from qexport.plugins.operations import Operations, V


def kept_boxes(
    build: Operations[V], boxes: V, scores: V, valid: V, *, iou_threshold: float, number: int
) -> V:
    """Return which boxes survive, (G, N) bool.

    Args:
        build: what to write with.
        boxes: (G, N, 4), xyxy; a group is a pyramid level or a class.
        scores: (G, N).
        valid: (G, N) bool; an invalid box neither survives nor suppresses.
        iou_threshold: a box that overlaps a better one by more than this is suppressed.
        number: N.
    """
    overlap = _overlap_more_than(build, boxes, iou_threshold)
    suppresses = build.logical_and(overlap, _better(build, scores, number))
    matrix = build.cast(suppresses, np.float32)  # (G, N, N): column suppresses row
    start = build.unsqueeze(build.cast(valid, np.float32), [2])
    kept = _until_nothing_changes(build, matrix, start, number)
    return build.greater(build.squeeze(kept, [2]), build.constant(0.5, np.float32))


def _overlap_more_than(build: Operations[V], boxes: V, threshold: float) -> V:
    """Return whether IoU exceeds the threshold, (G, N, N) bool, as torchvision's nms computes it."""
    low, high = (build.slice(boxes, [start], [start + 2], [2]) for start in (0, 2))
    area = _product(build, build.sub(high, low))  # (G, N)
    row, column = build.integers(2), build.integers(1)
    corner = build.maximum(build.unsqueeze(low, row), build.unsqueeze(low, column))  # (G, N, N, 2)
    end = build.minimum(build.unsqueeze(high, row), build.unsqueeze(high, column))
    side = build.maximum(build.sub(end, corner), build.constant(0.0, np.float32))
    shared = _product(build, side)
    both = build.add(build.unsqueeze(area, row), build.unsqueeze(area, column))
    iou = build.div(shared, build.sub(both, shared))
    # Boxes without area give 0 / 0, of which no comparison is true.
    return build.greater(iou, build.constant(threshold, np.float32))


def _product(build: Operations[V], pairs: V) -> V:
    """Return the product of the two values of the last axis."""
    first, second = (build.gather(pairs, build.constant(index, np.int64), axis=-1) for index in (0, 1))
    return build.mul(first, second)


def _better(build: Operations[V], scores: V, number: int) -> V:
    """Return whether the box of the column ranks before that of the row, (G, N, N); of equal ones the earlier."""
    own = build.unsqueeze(scores, [2])
    other = build.unsqueeze(scores, [1])
    earlier = build.constant(np.tril(np.ones((1, number, number)), -1), np.bool_)
    equal = build.logical_and(build.equal(other, own), earlier)
    return build.logical_or(build.greater(other, own), equal)


def _until_nothing_changes(build: Operations[V], matrix: V, start: V, number: int) -> V:
    """Return the fixed point of kept = start where matrix x kept is zero, (G, N, 1) float32 of 0 and 1."""

    def turn(inner: Operations[V], kept: V) -> tuple[V, V]:
        half = inner.constant(0.5, np.float32)
        suppressed = inner.greater(inner.matmul(matrix, kept), half)
        after = inner.mul(start, inner.cast(inner.logical_not(suppressed), np.float32))
        change = inner.largest(inner.absolute(inner.sub(after, kept)))
        return inner.greater(change, half), after

    return build.repeat(start, turn, number, name="until_nothing_changes")
