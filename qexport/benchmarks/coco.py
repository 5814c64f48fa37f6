"""COCO average precision: pycocotools matches, once; the averaging is done here, for many resamples.

The averaging is pycocotools' `COCOeval.accumulate`, with every image counted as often as it was drawn; with
every image counted once it gives the same numbers to 12 digits, which the tests hold it to.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexport.benchmarks.matches import Matches, chunks, count_at_hits, labels_of, mean_over_classes
from qexport.detections import Detections
from qexport.errors import TargetUnavailable
from qexport.samples import Dataset

IOU_50, IOU_75 = 0, 5
"""Indices of IoU 0.50 and 0.75 among the thresholds 0.50, 0.55, ... 0.95."""
MAX_DETECTIONS = 100
_AREAS = ("all", "small", "medium", "large")
_THRESHOLDS = 10
_RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True, slots=True, eq=False)
class CocoMatches:
    """One subject's matches: per class, for objects of all sizes, and for small, medium and large ones.

    Each tuple is in the order of `labels_of(dataset)`.
    """

    everything: tuple[Matches, ...]
    small: tuple[Matches, ...]
    medium: tuple[Matches, ...]
    large: tuple[Matches, ...]


def match_coco(dataset: Dataset, detections: Sequence[Detections]) -> CocoMatches:
    """Match all classes over all images with pycocotools.

    Args:
        dataset: the annotated images. Crowds are matched as COCO does; objects that VOC calls difficult count
            neither as found nor as missed.
        detections: one per sample, boxes in pixels of the sample's image; the best 100 of a class in an image
            count.

    Raises:
        TargetUnavailable: pycocotools is not installed.
    """
    evaluator = coco_evaluator(dataset, detections)
    images = len(dataset.samples)
    classes = range(len(labels_of(dataset)))
    # evalImgs lies class by class, area by area, image by image.
    by_area = [
        tuple(
            _collect(evaluator.evalImgs[(k * len(_AREAS) + area) * images :][:images], images)
            for k in classes
        )
        for area in range(len(_AREAS))
    ]
    return CocoMatches(*by_area)


def average_precision(matches: Matches, weights: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return COCO's AP of one class at each IoU threshold: the mean of the envelope at 101 recalls.

    Args:
        matches: of one class and area.
        weights: (B, I) int64, how often each image counts.

    Returns:
        (T, B) float64, NaN where there is no object.
    """
    results = []
    for rows in chunks(matches, weights):
        values = np.full((len(matches.hit), len(rows)), np.nan)
        for threshold in range(len(matches.hit)):
            counts = count_at_hits(matches, threshold, rows)
            known = counts.objects > 0
            recall = counts.hits / np.maximum(counts.objects, 1)[:, None]
            # One more column: a recall that is never reached has a precision of 0.
            envelope = np.pad(counts.envelope(), ((0, 0), (0, 1)))
            for row in np.flatnonzero(known):
                values[threshold, row] = envelope[row, np.searchsorted(recall[row], _RECALLS)].mean()
        results.append(values)
    return np.concatenate(results, axis=1)


def mean_average_precision(
    matches: Sequence[Matches], weights: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return AP per class and its mean over classes, at each threshold.

    Args:
        matches: of all classes, one area.
        weights: (B, I) int64.

    Returns:
        (K, T, B) float64 and (T, B) float64, NaN where there is no object.
    """
    by_class = np.stack([average_precision(item, weights) for item in matches])
    return by_class, mean_over_classes(by_class)


# Any: pycocotools ships no types.
def coco_evaluator(dataset: Dataset, detections: Sequence[Detections]) -> Any:
    """Return a pycocotools COCOeval after `evaluate()`, its printing silenced. Arguments as `match_coco`."""
    try:
        # Only here: everything else runs where pycocotools is not installed.
        from pycocotools.coco import COCO  # noqa: PLC0415
        from pycocotools.cocoeval import COCOeval  # noqa: PLC0415
    except ImportError as error:
        raise TargetUnavailable(
            "COCO accuracy needs pycocotools, which is not installed: pip install 'qexport[report]'"
        ) from error
    truth, answers = COCO(), COCO()
    images = [{"id": number} for number in range(1, len(dataset.samples) + 1)]
    categories = [{"id": label, "name": dataset.classes[label]} for label in labels_of(dataset)]
    truth.dataset = {"images": images, "categories": categories, "annotations": _objects(dataset)}
    answers.dataset = {"images": images, "categories": categories, "annotations": _answers(detections)}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        answers.createIndex()
        evaluator = COCOeval(truth, answers, "bbox")
        evaluator.params.maxDets = [1, 10, MAX_DETECTIONS]
        evaluator.evaluate()
    return evaluator


def _objects(dataset: Dataset) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for number, sample in enumerate(dataset.samples, start=1):
        for box in sample.boxes:
            x1, y1, x2, y2 = box.xyxy
            area = (x2 - x1) * (y2 - y1) if box.area_px is None else box.area_px
            # An area outside every range is how pycocotools is told to ignore an object that is no crowd.
            rows.append(
                {
                    "id": len(rows) + 1,
                    "image_id": number,
                    "category_id": box.label,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": -1.0 if box.difficult else area,
                    "iscrowd": int(box.crowd),
                }
            )
    return rows


def _answers(detections: Sequence[Detections]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for number, found in enumerate(detections, start=1):
        boxes = found.boxes.astype(np.float64).tolist()
        for (x1, y1, x2, y2), score, label in zip(
            boxes, found.scores.tolist(), found.labels.tolist(), strict=True
        ):
            rows.append(
                {
                    "id": len(rows) + 1,
                    "image_id": number,
                    "category_id": label,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "score": score,
                    "iscrowd": 0,
                }
            )
    return rows


def _collect(rows: Sequence[dict[str, Any] | None], images: int) -> Matches:
    """Join pycocotools' per-image results of one class and area; None: neither objects nor detections."""
    objects = np.zeros(images, dtype=np.int64)
    image: list[NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)]
    scores: list[NDArray[np.float64]] = [np.zeros(0)]
    found: list[NDArray[np.bool_]] = [np.zeros((_THRESHOLDS, 0), dtype=np.bool_)]
    ignored: list[NDArray[np.bool_]] = [np.zeros((_THRESHOLDS, 0), dtype=np.bool_)]
    for index, row in enumerate(rows):
        if row is None:
            continue
        objects[index] = np.count_nonzero(np.asarray(row["gtIgnore"]) == 0)
        image.append(np.full(len(row["dtScores"]), index, dtype=np.int64))
        scores.append(np.asarray(row["dtScores"], dtype=np.float64))
        found.append(row["dtMatches"] > 0)
        ignored.append(row["dtIgnore"].astype(np.bool_))
    # pycocotools sorts with mergesort, which is stable: equal scores stay in the order of the images.
    order = np.argsort(-np.concatenate(scores), kind="mergesort")
    matched = np.concatenate(found, axis=1)[:, order]
    counted = ~np.concatenate(ignored, axis=1)[:, order]
    return Matches(
        image=np.concatenate(image)[order], hit=matched & counted, miss=~matched & counted, objects=objects
    )
