"""RoIAlign by GridSample and an average, over all levels in one map: for runtimes that have no RoIAlign."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qexport.errors import UnsupportedOperator
from qexport.plugins.operations import Operations, V
from qexport.plugins.roi_align_sampler import LevelSize, Pooling, Sampler, cut_outside


@dataclass(frozen=True, slots=True)
class Atlas:
    """All levels in one map: the finest above the others, which stand side by side.

    Each has two replicated rows and columns after it, which is what RoIAlign's clamping at the border of a level
    reads.
    """

    sizes: tuple[LevelSize, ...]
    """Of the padded levels."""
    offsets: tuple[tuple[int, int], ...]
    """Column and row at which each level begins."""
    height: int
    width: int

    @classmethod
    def of(cls, levels: Sequence[LevelSize]) -> Atlas:
        """Lay out levels, finest first."""
        sizes = tuple(LevelSize(level.height + 2, level.width + 2) for level in levels)
        starts = [sum(size.width for size in sizes[1:index]) for index in range(1, len(sizes))]
        offsets = ((0, 0), *((start, sizes[0].height) for start in starts))
        below = max((size.height for size in sizes[1:]), default=0)
        width = max(sizes[0].width, sum(size.width for size in sizes[1:]))
        return cls(sizes, offsets, sizes[0].height + below, width)

    def write(self, build: Operations[V], features: Sequence[V]) -> V:
        """Return the map, (1, C, height, width)."""
        edge = build.integers(0, 0, 0, 0, 0, 0, 2, 2)
        padded = [build.pad(feature, edge, edge=True) for feature in features]
        first = _grow(build, padded[0], 0, self.width - self.sizes[0].width)
        if len(padded) == 1:
            return first
        row_height = self.height - self.sizes[0].height
        row = [
            _grow(build, value, row_height - size.height, 0)
            for value, size in zip(padded[1:], self.sizes[1:], strict=True)
        ]
        below = build.concat(row, axis=3) if len(row) > 1 else row[0]
        below = _grow(build, below, 0, self.width - sum(size.width for size in self.sizes[1:]))
        return build.concat([first, below], axis=2)


def require_fixed_samples(sampling_ratio: int) -> None:
    """Refuse a number of samples that depends on the box.

    Raises:
        UnsupportedOperator: `sampling_ratio` is below 1.
    """
    if sampling_ratio < 1:
        raise UnsupportedOperator(
            f"RoIAlign with sampling_ratio {sampling_ratio} takes as many samples as a box is large, which "
            "has no form of fixed shape. Build the detector with MultiScaleRoIAlign(..., sampling_ratio=2), "
            "torchvision's own choice, or choose the plugin form where the runtime has it."
        )


def pool_by_grid(
    build: Operations[V],
    features: Sequence[V],
    level: V,
    sampler: Sampler[V],
    pooling: Pooling,
    atlas: Atlas,
) -> V:
    """Return RoIAlign of each box from its level, (R, C, output_size).

    GridSample takes positions in -1..1, whose rounding moves a sample by up to 1e-5 of a cell.

    Args:
        build: what to write with.
        features: one (1, C, H, W) map a level.
        level: (R,), level of each box.
        sampler: of the boxes.
        pooling: what is pooled.
        atlas: the layout of the levels.
    """
    ratio = pooling.sampling_ratio
    rows, columns = sampler.samples(1), sampler.samples(0)
    along = []
    for axis, size in ((0, atlas.width), (1, atlas.height)):
        first = build.constant([[offset[axis]] for offset in atlas.offsets], np.float32)
        place = build.add(sampler.clamped(axis), build.gather(first, level, axis=0))
        place = build.mul(place, build.constant(2 / (size - 1), np.float32))
        place = build.sub(place, build.constant(1.0, np.float32))
        place = build.reshape(place, _along(axis, pooling.proposals, rows, columns))
        along.append(build.expand(place, [pooling.proposals, rows, columns, 1]))
    grid = build.concat(along, axis=3)
    grid = build.reshape(grid, [1, pooling.proposals * rows, columns, 2])
    samples = build.grid_sample(atlas.write(build, features), grid)
    if not pooling.boxes_inside:
        samples = build.mul(samples, _counting(build, sampler, pooling))
    bins = build.average_pool(samples, [ratio, ratio], [ratio, ratio])
    split = build.reshape(bins, [pooling.channels, pooling.proposals, *pooling.output_size])
    pooled = build.transpose(split, [1, 0, 2, 3])
    return cut_outside(build, pooled, sampler) if pooling.boxes_inside else pooled


def _counting(build: Operations[V], sampler: Sampler[V], pooling: Pooling) -> V:
    """Return 1 for each sample that counts and 0 for each other, (1, 1, R * rows, columns).

    A box that lies partly outside may have bins with samples on both sides of a border that read different rows,
    which a share of the bin's mean would not make good.
    """
    rows, columns = sampler.samples(1), sampler.samples(0)
    along = []
    for axis in (0, 1):
        _, inside = sampler.positions(axis)
        along.append(build.reshape(inside, _along(axis, pooling.proposals, rows, columns)))
    return build.reshape(build.mul(*along), [1, 1, pooling.proposals * rows, columns])


def _along(axis: int, proposals: int, rows: int, columns: int) -> list[int]:
    return [proposals, 1, columns, 1] if axis == 0 else [proposals, rows, 1, 1]


def _grow(build: Operations[V], value: V, rows: int, columns: int) -> V:
    if not rows and not columns:
        return value
    return build.pad(value, [0, 0, 0, 0, 0, 0, rows, columns])
