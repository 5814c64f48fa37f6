"""Best scores and non-maximum suppression."""

from __future__ import annotations

import numpy as np
from torch.fx import Node

from qexport.errors import UnsupportedOperator
from qexport.plugins.fixed_point_nms import kept_boxes
from qexport.plugins.tflite.builder import TfliteBuilder
from qexport.plugins.tflite.held import Held, as_plain
from qexport.plugins.tflite.lowering import Lowering
from qexport.plugins.tflite.writer import Value
from qexport.quantization.graph import argument_node, site_of


def best_scores(lowering: Lowering, node: Node) -> tuple[Held, ...]:
    """Write the best of a vector, of equal ones the earlier first, and where they stand."""
    scores = as_plain(lowering.build, lowering.real(argument_node(node)))
    return tuple(map(Held.plain, _top_k(lowering.build, scores, int(str(node.args[1])))))


def topk(lowering: Lowering, node: Node) -> tuple[Held, ...]:
    """Write the largest entries of the last axis and where they stand.

    Raises:
        UnsupportedOperator: another axis, or the smallest.
    """
    value = as_plain(lowering.build, lowering.real(argument_node(node)))
    axis = int(str(node.args[2])) if len(node.args) > 2 else -1
    largest = bool(node.args[3]) if len(node.args) > 3 else True
    if axis % len(value.shape) != len(value.shape) - 1 or not largest:
        raise UnsupportedOperator(f"topk in {site_of(node).path}: TFLite takes the largest of the last axis.")
    return tuple(map(Held.plain, _top_k(lowering.build, value, int(str(node.args[1])))))


def _top_k(build: TfliteBuilder, value: Value, count: int) -> tuple[Value, Value]:
    shape = (*value.shape[:-1], count)
    place = build.writer.place or "detector"
    results = (
        build.writer.tensor(shape, value.dtype, name=f"{place}/TOPK_V2"),
        build.writer.tensor(shape, "int32", name=f"{place}/TOPK_V2/index"),
    )
    build.writer.operator(
        "TOPK_V2", [value, build.constant(count, np.int32)], results, options="TopKV2Options"
    )
    return results


def nms_mask(lowering: Lowering, node: Node) -> Held:
    """Write `qexport.detectors.operators.batched_nms_mask` by TFLite's own NON_MAX_SUPPRESSION_V4."""
    build = lowering.build
    boxes, scores, valid = (as_plain(build, lowering.real(argument_node(node, place))) for place in range(3))
    # It suppresses from the threshold on, torchvision above it.
    threshold = float(np.nextafter(np.float32(str(node.args[3])), np.float32(np.inf)))
    groups, number = scores.shape
    # A box without area overlaps nothing, itself neither: the operator would choose it again and again.
    area = _has_area(build, boxes)
    ranked = _by_rank(build, scores, build.logical_and(valid, area))
    kept = [
        _kept(build, build.select(boxes, 0, group), build.select(ranked, 0, group), number, threshold)
        for group in range(groups)
    ]
    apart = build.logical_and(valid, build.logical_not(area))
    return Held.plain(build.logical_or(build.stack(kept, 0), apart))


def _has_area(build: TfliteBuilder, boxes: Value) -> Value:
    """Return which boxes have an area, (G, N) bool."""
    sides = build.sub(build.slice(boxes, [2], [4], [2]), build.slice(boxes, [0], [2], [2]))
    area = build.mul(build.select(sides, 2, 0), build.select(sides, 2, 1))
    return build.greater(area, build.scalar(0.0, area))


def _by_rank(build: TfliteBuilder, scores: Value, valid: Value) -> Value:
    """Return scores that are all different and rank as those given, of equal ones the earlier first; (G, N).

    The operator takes equal scores in the order of its heap, and int8 maps give equal scores by the dozen. Those of
    boxes that are not valid are below the operator's limit, which is exclusive.
    """
    number = scores.shape[1]
    counted = build.constant(number, np.int32)
    _, order = _top_k(build, build.where(valid, scores, build.scalar(-1.0, scores)), number)
    _, rank = _top_k(build, build.sub(counted, order), number)  # of each box, its place in that order
    points = build.cast(build.sub(counted, rank), np.float32)
    return build.where(valid, points, build.scalar(-1.0, points))


def portable_nms_mask(lowering: Lowering, node: Node) -> Held:
    """Write the same in plain operators: exact while no chain of suppressions is longer than `TURNS`."""
    build = lowering.build
    boxes, scores, valid = (as_plain(build, lowering.real(argument_node(node, place))) for place in range(3))
    return Held.plain(
        kept_boxes(
            build, boxes, scores, valid, iou_threshold=float(str(node.args[3])), number=scores.shape[1]
        )
    )


def _kept(build: TfliteBuilder, boxes: Value, scores: Value, number: int, threshold: float) -> Value:
    """Return which boxes of one group survive, (N,) bool."""
    place = build.writer.place or "detector"
    chosen = build.writer.tensor((number,), "int32", name=f"{place}/NON_MAX_SUPPRESSION_V4")
    count = build.writer.tensor((), "int32", name=f"{place}/NON_MAX_SUPPRESSION_V4/count")
    limits = [
        build.constant(number, np.int32),
        build.constant(threshold, np.float32),
        build.constant(-0.5, np.float32),
    ]
    build.writer.operator(
        "NON_MAX_SUPPRESSION_V4",
        [boxes, scores, *limits],
        [chosen, count],
        options="NonMaxSuppressionV4Options",
    )
    # Indices beyond the count are zero, as that of the first box may be: they add nothing.
    order = build.constant(np.arange(number), np.int32)
    counts = build.cast(build.less(order, count), np.int32)
    hits = build.op(
        "SCATTER_ND",
        [build.reshape(chosen, (number, 1)), counts, build.constant([number], np.int32)],
        (number,),
        "int32",
        options="ScatterNdOptions",
    )
    return build.greater(hits, build.constant(0, np.int32))
