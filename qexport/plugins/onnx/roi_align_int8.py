"""RoIAlign of integers: every sample's four neighbours gathered as rows, summed by one batched QLinearMatMul.

The product's left side holds the bilinear weights in 8 bits. At most one step from torchvision's RoIAlign
quantized after, while no level's scale is many times the result's (rounding of the weights costs about a
twentieth of a step, times that ratio), and several times faster than a float RoiAlign on a CPU.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from qexport.plugins.onnx.builder import Builder
from qexport.plugins.roi_align_sampler import Pooling, Sampler

CHUNK_BYTES = 5 * 2**20
"""Gathered rows of one product: few enough to stay in the cache between the gather and the product."""


class QuantizedFeature(NamedTuple):
    """A feature map as integers: (1, C, H, W) uint8 with zero point 128, and its scale."""

    value: ir.Value
    scale: float


class _Axis(NamedTuple):
    """Along one axis: the two neighbours of each sample and their weights, (R, samples * 2)."""

    index: ir.Value
    weight: ir.Value


def reachable_levels(pooling: Pooling, canonical_scale: int, canonical_level: int) -> int:
    """Return how many levels, from the finest, a box as large as the image can be pooled from."""
    finest = pooling.levels[0]
    side = math.sqrt(finest.height * finest.width) / pooling.scales[0]
    highest = math.floor(canonical_level + 1e-6 + math.log2(side / canonical_scale))
    return min(max(highest + round(math.log2(pooling.scales[0])), 0) + 1, len(pooling.levels))


def pool_by_int8_gather(
    build: Builder,
    boxes: ir.Value,
    level: ir.Value,
    features: list[QuantizedFeature],
    pooling: Pooling,
    *,
    reached: int,
    output_scale: float,
) -> ir.Value:
    """Return RoIAlign of integers, (R * pooled_h, pooled_w, C) uint8 with zero point 128: channels last.

    Args:
        build: what to write with.
        boxes: (R, 4), xyxy, pixels of the image.
        level: (R,), level of each box.
        features: the pyramid levels, finest first.
        pooling: what is pooled.
        reached: how many levels boxes are pooled from; the scales of the others do not matter.
        output_scale: scale of the result.
    """
    largest = max(feature.scale for feature in features[:reached])
    rows = [
        build.reshape(build.transpose(feature.value, [0, 2, 3, 1]), [-1, pooling.channels])
        for feature in features
    ]
    table = build.concat(rows, axis=0) if len(rows) > 1 else rows[0]
    sampler = RowSampler(build, boxes, level, pooling)
    x, y = sampler.axis(0), sampler.axis(1)
    index = sampler.index(x, y)
    pooled_h = pooling.output_size[0]
    inner = sampler.rows_of_a_product
    relative = [feature.scale / largest for feature in features]
    weight_scale = build.constant(1.0 / pooling.sampling_ratio**2 / 255, np.float32)
    no_offset = build.constant(0, np.uint8)
    weights = build.op("QuantizeLinear", [sampler.weights(x, y, relative), weight_scale, no_offset])
    right_params = [build.constant(largest, np.float32), build.constant(128, np.uint8)]
    result_params = [build.constant(output_scale, np.float32), build.constant(128, np.uint8)]
    chunk = max(1, CHUNK_BYTES // (pooled_h * inner * pooling.channels))
    pooled = []
    for start in range(0, pooling.proposals, chunk):
        count = min(chunk, pooling.proposals - start)
        right = build.gather(table, build.slice(index, [start], [start + count], [0]), axis=0)
        right = build.reshape(right, [count * pooled_h, inner, pooling.channels])
        left = build.slice(weights, [start * pooled_h], [(start + count) * pooled_h], [0])
        pooled.append(
            build.op("QLinearMatMul", [left, weight_scale, no_offset, right, *right_params, *result_params])
        )
    return build.concat(pooled, axis=0) if len(pooled) > 1 else pooled[0]


class RowSampler(Sampler[ir.Value]):
    """Samples of RoIAlign as rows of a table that holds the cells of all levels, and weights of the rows.

    Boxes lie within the image, hence no sample before the first row or column of a level.
    """

    _build: Builder

    def __init__(self, build: Builder, boxes: ir.Value, level: ir.Value, pooling: Pooling) -> None:
        super().__init__(build, boxes, level, pooling)
        cells = [size.height * size.width for size in pooling.levels]
        self._first_row = self.per_level(np.cumsum([0, *cells[:-1]]), np.int32)
        self._width = self.per_level([size.width for size in pooling.levels], np.int32)

    @property
    def _taps(self) -> int:
        """Neighbours of a bin along one axis."""
        return 2 * self._pooling.sampling_ratio

    @property
    def rows_of_a_product(self) -> int:
        """Rows of the table that a row of bins reads."""
        return self._taps**2 * self._pooling.output_size[1]

    def axis(self, axis: int) -> _Axis:
        """Return neighbours and weights of the samples along x (0) or y (1)."""
        build, samples = self._build, self.samples(axis)
        position, inside = self.positions(axis)
        last = self.last(axis)
        position = self.clamp(position, last)
        low = build.floor(position)
        high_weight = build.mul(build.sub(position, low), inside)
        low_weight = build.sub(inside, high_weight)
        high = build.minimum(build.add(low, build.constant(1.0, np.float32)), last)
        index = build.cast(self._interleave(low, high, samples), np.int32)
        return _Axis(index, self._interleave(low_weight, high_weight, samples))

    def _interleave(self, first: ir.Value, second: ir.Value, samples: int) -> ir.Value:
        build = self._build
        last_axis = build.integers(2)
        pairs = [build.unsqueeze(value, last_axis) for value in (first, second)]
        return build.reshape(build.concat(pairs, axis=2), [self._pooling.proposals, 2 * samples])

    def index(self, x: _Axis, y: _Axis) -> ir.Value:
        """Return the table row of every pair of neighbours, (R, 2 * samples_y, 2 * samples_x) int32."""
        build = self._build
        row = build.add(build.mul(y.index, self._width), self._first_row)
        return build.add(build.unsqueeze(row, [2]), build.unsqueeze(x.index, [1]))

    def weights(self, x: _Axis, y: _Axis, relative: list[float]) -> ir.Value:
        """Return the weights of a bin's neighbours, (R * pooled_h, pooled_w, taps * taps * pooled_w).

        A row of bins reads the same gathered rows; the weights of the other bins' columns are zero. The scale
        of a box's level, relative to the largest one, is folded in.
        """
        build, taps, proposals = self._build, self._taps, self._pooling.proposals
        pooled_h, pooled_w = self._pooling.output_size
        own = np.zeros((1, pooled_w, taps * pooled_w), np.float32)
        for column in range(pooled_w):
            own[0, column, taps * column : taps * (column + 1)] = 1 / self._pooling.sampling_ratio**2
        along_x = build.mul(build.unsqueeze(x.weight, [1]), build.constant(own, np.float32))
        along_y = build.mul(y.weight, self.per_level(relative, np.float32))
        along_y = build.reshape(along_y, [proposals, pooled_h, 1, taps, 1])
        along_x = build.reshape(along_x, [proposals, 1, pooled_w, 1, taps * pooled_w])
        both = build.mul(along_y, along_x)
        return build.reshape(both, [proposals * pooled_h, pooled_w, self.rows_of_a_product])
