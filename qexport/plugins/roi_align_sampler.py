"""Where RoIAlign takes its samples: the pyramid level of each box, positions on it, which of them count."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, NamedTuple

import numpy as np

from qexport.plugins.operations import Dtype, Operations, V


class LevelSize(NamedTuple):
    """Height and width of a pyramid level."""

    height: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """What is pooled from what."""

    scales: tuple[float, ...]
    """Size of a level over the size of the image, finest level first."""
    levels: tuple[LevelSize, ...]
    channels: int
    proposals: int
    output_size: tuple[int, int]
    """Height and width of a pooled map, bins."""
    sampling_ratio: int
    """Samples per bin and axis; below 1, as many as the box is large."""
    aligned: bool = False
    """Whether a pixel's value belongs to its centre (torchvision's `aligned=True`)."""
    boxes_inside: bool = True
    """Whether every box is known to lie within the image."""


def level_of(
    build: Operations[V], boxes: V, scales: tuple[float, ...], canonical_scale: int, canonical_level: int
) -> V:
    """Return the pyramid level of each box, (R,) int64 from 0: equation 1 of the FPN paper, eps as torchvision."""
    lowest = -math.log2(scales[0])
    highest = -math.log2(scales[-1])
    size = build.sub(build.slice(boxes, [2], [4], [1]), build.slice(boxes, [0], [2], [1]))
    width, height = (build.gather(size, build.constant(axis, np.int64), axis=1) for axis in (0, 1))
    side = build.sqrt(build.mul(width, height))
    ratio = build.div(side, build.constant(canonical_scale, np.float32))
    log2 = build.div(build.log(ratio), build.constant(math.log(2.0), np.float32))
    level = build.add(log2, build.constant(canonical_level + 1e-6, np.float32))
    clipped = build.clip(build.floor(level), lowest, highest)
    return build.cast(build.sub(clipped, build.constant(lowest, np.float32)), np.int64)


class Sampler(Generic[V]):
    """Positions of RoIAlign's bilinear samples, as torchvision's roi_align takes them.

    Axis 0 is x, axis 1 is y.

    Args:
        build: what to write with.
        boxes: (R, 4), xyxy, pixels of the image.
        level: (R,), level of each box.
        pooling: what is pooled.
    """

    def __init__(self, build: Operations[V], boxes: V, level: V, pooling: Pooling) -> None:
        self._build, self._pooling, self._level = build, pooling, level
        scale = build.gather(build.constant([[s] for s in pooling.scales], np.float32), level)
        self._boxes = build.mul(boxes, scale)

    def per_level(self, values: object, dtype: Dtype) -> V:
        """Return each box's own of one value a level, (R, 1)."""
        column = np.asarray(values).reshape(-1, 1)
        return self._build.gather(self._build.constant(column, dtype), self._level, axis=0)

    def samples(self, axis: int) -> int:
        """Return how many samples a box has along x (0) or y (1)."""
        return self._pooling.output_size[1 - axis] * max(self._pooling.sampling_ratio, 1)

    def _sizes(self, axis: int) -> list[int]:
        return [level[1 - axis] for level in self._pooling.levels]

    def positions(self, axis: int) -> tuple[V, V]:
        """Return where the samples lie, cells of the level, and 1 for those that count, 0 for others, (R, samples)."""
        build, samples = self._build, self.samples(axis)
        start, end = (
            build.gather(self._boxes, build.constant([axis + 2 * k], np.int64), axis=1) for k in (0, 1)
        )
        length = build.sub(end, start)
        if self._pooling.aligned:
            start = build.sub(start, build.constant(0.5, np.float32))
        else:
            length = build.maximum(length, build.constant(1.0, np.float32))
        centres = (np.arange(samples, dtype=np.float32) + 0.5) / samples
        position = build.add(start, build.mul(length, build.constant(centres[None], np.float32)))
        inside = build.less_or_equal(position, self.per_level(self._sizes(axis), np.float32))
        if not self._pooling.boxes_inside:
            beyond_first = build.less_or_equal(build.constant(-1.0, np.float32), position)
            inside = build.logical_and(inside, beyond_first)
        return position, build.cast(inside, np.float32)

    def share_inside(self, axis: int) -> V:
        """Return the share of each bin's samples that count, in a shape that broadcasts to the result."""
        build, bins = self._build, self._pooling.output_size[1 - axis]
        _, inside = self.positions(axis)
        per_bin = self.samples(axis) // bins
        split = build.reshape(inside, [self._pooling.proposals, 1, bins, per_bin])
        share = build.reduce_mean(split, [3])
        return share if axis else build.transpose(share, [0, 1, 3, 2])

    def last(self, axis: int) -> V:
        """Return the last cell of each box's level, (R, 1)."""
        return self.per_level([size - 1 for size in self._sizes(axis)], np.float32)

    def clamp(self, position: V, last: V) -> V:
        """Return positions on the level."""
        return self._build.maximum(self._build.minimum(position, last), self._build.constant(0.0, np.float32))

    def clamped(self, axis: int) -> V:
        """Return where the samples along x (0) or y (1) read, cells of the level, (R, samples)."""
        position, _ = self.positions(axis)
        return self.clamp(position, self.last(axis))


def cut_outside(build: Operations[V], pooled: V, sampler: Sampler[V]) -> V:
    """Count samples beyond a level as zero, as RoIAlign does, for boxes within the image.

    A box less than a cell long is sampled over a whole cell and so may leave its level. The share of each bin's
    samples that lie inside makes that good: those outside have all read the same last row.
    """
    for axis in (0, 1):
        pooled = build.mul(pooled, sampler.share_inside(axis))
    return pooled
