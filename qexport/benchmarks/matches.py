"""Detections paired with annotated objects, once per image, so that resampling images only reweighs them.

A detection's fate is decided within its own image. A resampled set of images is therefore the same sorted
list of detections in which every detection counts as often as its image was drawn (0, 1, 2, ...), and a
precision at a hit needs two weighted running sums. Counting a detection k times stands for k copies of the
image: of k equal hits only the last, with the highest precision, shapes the envelope that every AP here is
taken from, so the result is exactly that of evaluating the copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qexport.samples import GAP, Dataset

_CHUNK_VALUES = 4_000_000
"""Weights held at once, 32 MB: memory does not grow with the number of resamples."""


@dataclass(frozen=True, slots=True, eq=False)
class Matches:
    """One class over all images: T IoU thresholds, D detections by falling score, I images.

    image: (D,) int64, index of the detection's image.
    hit: (T, D) bool, the detection finds an object.
    miss: (T, D) bool, it finds none; neither hit nor miss is ignored.
    objects: (I,) int64, objects of each image that must be found.
    """

    image: NDArray[np.int64]
    hit: NDArray[np.bool_]
    miss: NDArray[np.bool_]
    objects: NDArray[np.int64]

    @property
    def whole(self) -> NDArray[np.int64]:
        """(1, I): the weights with which every image counts once."""
        return np.ones((1, len(self.objects)), dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class HitCounts:
    """Running sums at the hits of one class and threshold: B resamples, H hits by falling score.

    hits, misses: (B, H) int64, up to and including each hit.
    objects: (B,) int64.
    """

    hits: NDArray[np.int64]
    misses: NDArray[np.int64]
    objects: NDArray[np.int64]

    def precision(self) -> NDArray[np.float64]:
        """(B, H): the share of hits among all detections so far; 0 before the first."""
        # pycocotools adds 2e-16 below the line instead, which makes a perfect precision a little less than 1.
        precision: NDArray[np.float64] = self.hits / np.maximum(self.hits + self.misses, 1)
        return precision

    def envelope(self) -> NDArray[np.float64]:
        """(B, H): the best precision at this recall or a higher one."""
        best: NDArray[np.float64] = np.maximum.accumulate(self.precision()[:, ::-1], axis=1)
        return best[:, ::-1]


def count_at_hits(matches: Matches, threshold: int, weights: NDArray[np.int64]) -> HitCounts:
    """Return the running sums at one class's hits.

    Args:
        matches: the class's matches.
        threshold: index of the IoU threshold.
        weights: (B, I) int64, how often each image counts in each resample.
    """
    columns = np.flatnonzero(matches.hit[threshold])
    drawn = weights[:, matches.image]
    misses = np.cumsum(drawn * matches.miss[threshold], axis=1)[:, columns]
    hits = np.cumsum(drawn[:, columns], axis=1)
    return HitCounts(hits=hits, misses=misses, objects=weights @ matches.objects)


def chunks(matches: Matches, weights: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Yield the resamples in pieces that keep the running sums small."""
    rows = max(1, _CHUNK_VALUES // max(1, len(matches.image)))
    for start in range(0, len(weights), rows):
        yield weights[start : start + rows]


def draw_images(images: int, resamples: int, seed: int) -> NDArray[np.int64]:
    """Return (resamples, images) int64: how often each image is drawn, with replacement."""
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, images, size=(resamples, images))
    return np.stack([np.bincount(row, minlength=images) for row in drawn]).astype(np.int64)


def labels_of(dataset: Dataset) -> tuple[int, ...]:
    """Return the labels that have a category, rising."""
    return tuple(label for label, name in enumerate(dataset.classes) if label and name != GAP)


def mean_over_classes(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean over the first axis of the values that are not NaN; NaN where all are."""
    known = ~np.isnan(values)
    count = known.sum(axis=0)
    total = np.where(known, values, 0.0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
