"""Pascal VOC average precision at IoU 0.5.

Everingham et al., "The Pascal Visual Object Classes Challenge: A Retrospective", IJCV 2015, section 2.2, and
the devkit's VOCevaldet.m: detections by falling score; each looks at the object of its class that it overlaps
most, difficult ones included; with an IoU of at least 0.5 it is a hit if that object is not difficult and was
not found before, ignored if it is difficult, and otherwise a miss. Boxes are continuous (see
`voc_annotations`), so no pixel is added to widths as the devkit does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qexport.benchmarks.matches import Matches, chunks, count_at_hits
from qexport.detections import Detections
from qexport.samples import Box, Dataset

IOU = 0.5
_CURVE_POINTS = 101


def match_voc(dataset: Dataset, detections: Sequence[Detections], label: int) -> Matches:
    """Match one class over all images.

    Args:
        dataset: the annotated images.
        detections: one per sample, boxes in pixels of the sample's image.
        label: the class.

    Returns:
        Matches with one threshold.
    """
    images: list[NDArray[np.int64]] = []
    scores: list[NDArray[np.float32]] = []
    hits: list[NDArray[np.bool_]] = []
    misses: list[NDArray[np.bool_]] = []
    objects = np.zeros(len(dataset.samples), dtype=np.int64)
    for index, (sample, found) in enumerate(zip(dataset.samples, detections, strict=True)):
        boxes = [box for box in sample.boxes if box.label == label]
        objects[index] = sum(not box.ignored for box in boxes)
        chosen = np.flatnonzero(found.labels == label)
        chosen = chosen[np.argsort(-found.scores[chosen], kind="stable")]
        hit, miss = _match_image(found.boxes[chosen], boxes)
        images.append(np.full(len(chosen), index, dtype=np.int64))
        scores.append(found.scores[chosen])
        hits.append(hit)
        misses.append(miss)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return Matches(
        image=np.concatenate(images)[order],
        hit=np.concatenate(hits)[order][None],
        miss=np.concatenate(misses)[order][None],
        objects=objects,
    )


def ap_all_points(matches: Matches, weights: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the area under the envelope of the precision/recall curve (VOC from 2010 on).

    Args:
        matches: of one class.
        weights: (B, I) int64, how often each image counts.

    Returns:
        (B,) float64, NaN where there is no object.
    """
    results = []
    for rows in chunks(matches, weights):
        counts = count_at_hits(matches, 0, rows)
        gained = np.diff(counts.hits, axis=1, prepend=0)
        area = (gained * counts.envelope()).sum(axis=1)
        results.append(_divide(area, counts.objects))
    return np.concatenate(results)


def ap_11_points(matches: Matches, weights: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the mean of the envelope at recalls 0, 0.1, ... 1 (VOC 2007). Arguments as `ap_all_points`."""
    results = []
    for rows in chunks(matches, weights):
        counts = count_at_hits(matches, 0, rows)
        envelope = counts.envelope()
        total = np.zeros(len(rows))
        for tenth in range(11):
            # Integers: 3 of 10 objects reach a recall of 0.3, which floats deny.
            reached = counts.hits * 10 >= tenth * counts.objects[:, None]
            total += np.where(reached, envelope, 0.0).max(axis=1, initial=0.0)
        known = counts.objects > 0
        results.append(np.where(known, total / 11, np.nan))
    return np.concatenate(results)


def curve(matches: Matches) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return precision and recall at the hits, recall rising, at most 101 points; empty without objects."""
    counts = count_at_hits(matches, 0, matches.whole)
    if not counts.objects[0]:
        return (), ()
    precision = counts.precision()[0]
    recall = counts.hits[0] / counts.objects[0]
    if len(recall) > _CURVE_POINTS:
        kept = np.linspace(0, len(recall) - 1, _CURVE_POINTS).round().astype(np.int64)
        precision, recall = precision[kept], recall[kept]
    return tuple(precision.tolist()), tuple(recall.tolist())


def box_iou(first: NDArray[np.floating], second: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the IoU of every pair of boxes.

    Args:
        first: (N, 4), xyxy.
        second: (M, 4), xyxy.

    Returns:
        (N, M) float64 in 0..1; 0 where both boxes are empty.
    """
    a = np.asarray(first, dtype=np.float64).reshape(-1, 4)[:, None]
    b = np.asarray(second, dtype=np.float64).reshape(-1, 4)[None]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared = np.clip(sides, 0.0, None).prod(axis=-1)
    union = (a[..., 2:] - a[..., :2]).prod(axis=-1) + (b[..., 2:] - b[..., :2]).prod(axis=-1) - shared
    iou: NDArray[np.float64] = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return iou


def _match_image(
    found: NDArray[np.float32], boxes: Sequence[Box]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return (D,) hit and (D,) miss for one image's detections, best first."""
    hit = np.zeros(len(found), dtype=np.bool_)
    if not boxes or not len(found):
        return hit, ~hit
    iou = box_iou(found, np.array([box.xyxy for box in boxes]))
    nearest = iou.argmax(axis=1)
    overlaps = iou[np.arange(len(found)), nearest] >= IOU
    ignored = overlaps & np.array([box.ignored for box in boxes])[nearest]
    candidates = np.flatnonzero(overlaps & ~ignored)
    # The first detection of each object is its hit; unique() gives the first place of every value.
    _, first = np.unique(nearest[candidates], return_index=True)
    hit[candidates[first]] = True
    return hit, ~hit & ~ignored


def _divide(value: NDArray[np.float64], objects: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.where(objects > 0, value / np.maximum(objects, 1), np.nan)
