"""Multi-scale RoIAlign by rows: every sample's neighbours gathered, weighed and averaged in float32.

ExecuTorch's index_select copies whole rows of int8 codes; XNNPACK makes real values of them, weighs them and takes the
mean over the neighbours of each bin. The proposals are taken a few at a time, so that rows stay in the cache. Measured
for 300 proposals of 256 channels, one thread of an x86 processor: 11 ms by fives, 17 ms by thirties in pieces of two,
and 12 to 18 ms with a batched matrix product in place of the mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.fx import Node

from qexport.errors import UnsupportedOperator
from qexport.plugins.executorch.held import Held, as_map, as_plain
from qexport.plugins.executorch.lowering import Lowering
from qexport.plugins.executorch.steps import Value
from qexport.plugins.executorch.xnnpack import Limits, SegmentBuilder
from qexport.plugins.roi_align_sampler import LevelSize, Pooling, Sampler, level_of
from qexport.quantization.graph import scale_of, site_of

CHUNK_VALUES = 2**20
"""Gathered values of one turn: as real values they come to 4 MiB."""


class _Axis(NamedTuple):
    """Along one axis: the two neighbours of each sample and their weights, (R, samples * 2)."""

    row: Value
    weight: Value


def integer(lowering: Lowering, node: Node, limits: Limits | None, scale: float) -> Held | None:
    """Write RoIAlign of int8 maps, quantized after; None where a map is not int8."""
    given: Any = node.args[0]
    quantizers = [lowering.quantizer_behind(source) for source in given]
    if limits is not None or None in quantizers:
        return None
    features = [lowering.codes(quantizer) for quantizer in quantizers if quantizer is not None]
    boxes = as_plain(lowering.xnnpack, lowering.real(_boxes(node)))
    lowering.go_to(node)
    scales = [scale_of(quantizer) for quantizer in quantizers if quantizer is not None]
    return _pool(lowering, node, features, boxes, scales, scale)


def real(lowering: Lowering, node: Node) -> Held:
    """Write RoIAlign of float32 maps."""
    given: Any = node.args[0]
    features = [lowering.real(source) for source in given]
    boxes = as_plain(lowering.xnnpack, lowering.real(_boxes(node)))
    lowering.go_to(node)
    return _pool(lowering, node, features, boxes, [1.0] * len(features), None)


def _boxes(node: Node) -> Node:
    boxes = node.args[1]
    assert isinstance(boxes, Node)
    return boxes


def _pool(
    lowering: Lowering,
    node: Node,
    features: Sequence[Held],
    boxes: Value,
    scales: Sequence[float],
    scale: float | None,
) -> Held:
    build, xnnpack = lowering.kernels, lowering.xnnpack
    pooling, canonical = _asked(node, features, boxes.shape[0])
    level = level_of(build, boxes, pooling.scales, *canonical)
    largest = max(scales)
    rows = [
        # The codes of all levels in one table; what a level's scale is in the table's goes into its weights.
        build.reshape(
            as_map(xnnpack, feature), [-1, pooling.channels], scale=None if scale is None else largest
        )
        for feature in features
    ]
    table = build.concat(rows, 0) if len(rows) > 1 else rows[0]
    sampler = RowSampler(lowering, boxes, level, pooling)
    x, y = sampler.axis(0), sampler.axis(1)
    index = sampler.index(x, y)
    weights = sampler.weights(x, y, [own / largest for own in scales])
    each = len_of_box(pooling)
    chunk = max(1, CHUNK_VALUES // (each * pooling.channels))
    pooled: list[Value] = []
    for start in range(0, pooling.proposals, chunk):
        first, last = start * each, min(start + chunk, pooling.proposals) * each
        own = build.gather(table, build.slice(index, [first], [last], [0]))
        share = build.slice(weights, [first], [last], [0])
        lowering.steps.part = f"proposals from {start}"
        pooled.append(_weighed(xnnpack, own, share, pooling, scale))
        lowering.steps.part = ""
    whole = build.concat(pooled, 0) if len(pooled) > 1 else pooled[0]
    height, width = pooling.output_size
    return Held.map(build.reshape(whole, [pooling.proposals, height, width, pooling.channels]))


def _weighed(
    xnnpack: SegmentBuilder, rows: Value, weights: Value, pooling: Pooling, scale: float | None
) -> Value:
    """Return the bins of a few proposals, (bins, C)."""
    values = rows if scale is None else xnnpack.convert(rows, None)
    taps = taps_of(pooling) ** 2
    bins, channels = rows.shape[0] // taps, rows.shape[1]
    products = xnnpack.reshape(xnnpack.binary("multiply", values, weights), (bins, taps, 1, channels))
    mean = xnnpack.reshape(xnnpack.mean(products), (bins, channels))
    return mean if scale is None else xnnpack.convert(mean, scale)


def taps_of(pooling: Pooling) -> int:
    """Return the neighbours of a bin along one axis."""
    return 2 * pooling.sampling_ratio


def len_of_box(pooling: Pooling) -> int:
    """Return the rows that are gathered for one box."""
    return math.prod(pooling.output_size) * taps_of(pooling) ** 2


def _asked(node: Node, features: Sequence[Held], proposals: int) -> tuple[Pooling, tuple[int, int]]:
    given: Any = node.args
    scales, size, ratio, canonical_scale, canonical_level = given[2:7]
    if ratio < 1:
        raise UnsupportedOperator(
            f"RoIAlign {site_of(node).path} with sampling_ratio {ratio} takes as many samples as a box is large, which "
            "has no form of fixed shape. Build the detector with MultiScaleRoIAlign(..., sampling_ratio=2)."
        )
    pooling = Pooling(
        scales=tuple(float(scale) for scale in scales),
        levels=tuple(LevelSize(*feature.shape[2:]) for feature in features),
        channels=features[0].shape[1],
        proposals=proposals,
        output_size=(int(size[0]), int(size[1])),
        sampling_ratio=int(ratio),
    )
    return pooling, (int(canonical_scale), int(canonical_level))


class RowSampler(Sampler[Value]):
    """Samples of RoIAlign as rows of a table that holds the cells of all levels, and weights of the rows."""

    def __init__(self, lowering: Lowering, boxes: Value, level: Value, pooling: Pooling) -> None:
        super().__init__(lowering.kernels, boxes, level, pooling)
        self._lowering = lowering
        cells = [size.height * size.width for size in pooling.levels]
        # Row numbers are held in float32, which is exact up to 2**24.
        self._first_row = self.per_level(np.cumsum([0, *cells[:-1]]), np.float32)
        self._width = self.per_level([size.width for size in pooling.levels], np.float32)

    def axis(self, axis: int) -> _Axis:
        """Return neighbours and weights of the samples along x (0) or y (1)."""
        build = self._build
        position, inside = self.positions(axis)
        last = self.last(axis)
        position = self.clamp(position, last)
        low = build.floor(position)
        high_weight = build.mul(build.sub(position, low), inside)
        low_weight = build.sub(inside, high_weight)
        high = build.minimum(build.add(low, build.constant(1.0, np.float32)), last)
        return _Axis(self._side_by_side(low, high), self._side_by_side(low_weight, high_weight))

    def _side_by_side(self, first: Value, second: Value) -> Value:
        pairs = self._lowering.kernels.stack([first, second], 2)
        return self._build.reshape(pairs, [self._pooling.proposals, -1])

    def index(self, x: _Axis, y: _Axis) -> Value:
        """Return the table row of every neighbour of every bin, (R * bins * taps * taps,) int64."""
        build = self._build
        row = build.add(build.mul(y.row, self._width), self._first_row)
        whole = self._lowering.xnnpack.binary("add", self._down(row), self._across(x.row))
        return build.cast(build.reshape(whole, [-1]), np.int64)

    def weights(self, x: _Axis, y: _Axis, relative: Sequence[float]) -> Value:
        """Return the weight of every neighbour of every bin in the mean over them, (R * bins * taps * taps, 1).

        Args:
            x: along x.
            y: along y.
            relative: scale of each level in that of the table.
        """
        build, pooling = self._build, self._pooling
        counted = taps_of(pooling) ** 2 / pooling.sampling_ratio**2
        share = self.per_level([own * counted for own in relative], np.float32)
        both = self._lowering.xnnpack.binary(
            "multiply", self._down(build.mul(y.weight, share)), self._across(x.weight)
        )
        return build.reshape(both, [-1, 1])

    def _down(self, value: Value) -> Value:
        """Return what belongs to rows of bins, (R, rows, 1, taps, 1)."""
        rows = self._pooling.output_size[0]
        return self._build.reshape(value, [self._pooling.proposals, rows, 1, taps_of(self._pooling), 1])

    def _across(self, value: Value) -> Value:
        """Return what belongs to columns of bins, (R, 1, columns, 1, taps)."""
        columns = self._pooling.output_size[1]
        return self._build.reshape(value, [self._pooling.proposals, 1, columns, 1, taps_of(self._pooling)])
