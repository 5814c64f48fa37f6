"""Multi-scale RoIAlign by rows: every sample's four neighbours gathered, weighed and summed in float32.

Integers are gathered as they are, a quarter of the bytes, and become real values in the cache: the proposals are
taken a few at a time. Measured for 300 proposals of 256 channels, one thread of an x86 processor: 9 ms by fives, 31 ms
all at once; with int8 products, which round every one of them, 18 ms at best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.fx import Node

from qexport.errors import UnsupportedOperator
from qexport.plugins.roi_align_sampler import LevelSize, Pooling, Sampler, level_of
from qexport.plugins.tflite.builder import TfliteBuilder
from qexport.plugins.tflite.held import Held, as_map, as_plain
from qexport.plugins.tflite.lowering import Lowering
from qexport.plugins.tflite.writer import Value
from qexport.quantization.graph import scale_of, site_of

CHUNK_BYTES = 2**20
"""Gathered int8 rows of one turn: with their real values, few enough to stay in the cache."""


class _Axis(NamedTuple):
    """Along one axis: the two neighbours of each sample and their weights, (R, samples * 2)."""

    row: Value
    weight: Value


def integer(lowering: Lowering, node: Node, activation: str, scale: float) -> Held | None:
    """Write RoIAlign of int8 maps, quantized after; None where a map is not int8."""
    given: Any = node.args[0]
    quantizers = [lowering.quantizer_behind(source) for source in given]
    if activation or None in quantizers:
        return None
    features = [lowering.codes(quantizer) for quantizer in quantizers if quantizer is not None]
    boxes = as_plain(lowering.build, lowering.real(_boxes(node)))
    lowering.go_to(node)
    scales = [scale_of(quantizer) for quantizer in quantizers if quantizer is not None]
    return _pool(lowering, node, features, boxes, scales, scale)


def real(lowering: Lowering, node: Node) -> Held:
    """Write RoIAlign of float32 maps."""
    given: Any = node.args[0]
    features = [lowering.real(source) for source in given]
    boxes = as_plain(lowering.build, lowering.real(_boxes(node)))
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
    build = lowering.build
    pooling, canonical = _asked(node, features, boxes.shape[0])
    level = level_of(build, boxes, pooling.scales, *canonical)
    largest = max(scales)
    integers = scale is not None
    rows = [
        # The codes of all levels in one table; what a level's scale is in the table's goes into its weights.
        build.reshape(as_map(build, feature), [-1, pooling.channels], scale=largest if integers else None)
        for feature in features
    ]
    table = build.concat(rows, 0) if len(rows) > 1 else rows[0]
    sampler = RowSampler(build, boxes, level, pooling)
    x, y = sampler.axis(0), sampler.axis(1)
    index = sampler.index(x, y)
    weights = sampler.weights(x, y, [own / largest for own in scales])
    bins, taps = math.prod(pooling.output_size), weights.shape[1]
    chunk = max(1, CHUNK_BYTES // (bins * taps * pooling.channels))
    pooled: list[Value] = []
    for start in range(0, pooling.proposals, chunk):
        first, last = start * bins, min(start + chunk, pooling.proposals) * bins
        own = build.slice(index, [first], [last], [0])
        if pooled:
            own = build.add(own, _nothing(build, pooled[-1]))
        taken = build.gather(table, own)
        values = build.dequantize(taken) if integers else taken
        weighed = build.mul(values, build.slice(weights, [first], [last], [0]))
        total = build.reduce("SUM", weighed, [1], keep=False)
        pooled.append(build.quantize(total, scale) if scale is not None else total)
    whole = build.concat(pooled, 0) if len(pooled) > 1 else pooled[0]
    height, width = pooling.output_size
    return Held.map(build.reshape(whole, [pooling.proposals, height, width, pooling.channels]))


def _nothing(build: TfliteBuilder, after: Value) -> Value:
    """Return int32 zero, (1, 1), that is known only after another value is.

    TFLite would do every gather before it hands the rest to XNNPACK in one piece, and hold 60 MB of rows for it. This
    way a turn ends before the next begins: 9 ms in place of 12, and 50 MB less.
    """
    one = build.slice(after, [0, 0], [1, 1], [0, 1])
    return build.cast(build.less(one, one), np.int32)


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

    def __init__(self, build: TfliteBuilder, boxes: Value, level: Value, pooling: Pooling) -> None:
        super().__init__(build, boxes, level, pooling)
        cells = [size.height * size.width for size in pooling.levels]
        self._first_row = self.per_level(np.cumsum([0, *cells[:-1]]), np.int32)
        self._width = self.per_level([size.width for size in pooling.levels], np.int32)

    @property
    def _taps(self) -> int:
        """Neighbours of a bin along one axis."""
        return 2 * self._pooling.sampling_ratio

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
        index = build.cast(self._side_by_side(low, high, samples), np.int32)
        return _Axis(index, self._side_by_side(low_weight, high_weight, samples))

    def _side_by_side(self, first: Value, second: Value, samples: int) -> Value:
        build = self._build
        pairs = [build.unsqueeze(value, [2]) for value in (first, second)]
        return build.reshape(build.concat(pairs, 2), [self._pooling.proposals, 2 * samples])

    def index(self, x: _Axis, y: _Axis) -> Value:
        """Return the table row of every neighbour of every bin, (R * bins, taps * taps) int32."""
        build = self._build
        row = build.add(build.mul(y.row, self._width), self._first_row)
        return build.reshape(build.add(self._down(row), self._across(x.row)), [-1, self._taps**2])

    def weights(self, x: _Axis, y: _Axis, relative: Sequence[float]) -> Value:
        """Return the weight of every neighbour of every bin, (R * bins, taps * taps, 1).

        Args:
            x: along x.
            y: along y.
            relative: scale of each level in that of the table.
        """
        build, per_bin = self._build, self._pooling.sampling_ratio**2
        share = self.per_level([own / per_bin for own in relative], np.float32)
        both = build.mul(self._down(build.mul(y.weight, share)), self._across(x.weight))
        return build.reshape(both, [-1, self._taps**2, 1])

    def _down(self, value: Value) -> Value:
        """Return what belongs to rows of bins, (R * rows, 1, taps, 1)."""
        return self._build.reshape(value, [-1, 1, self._taps, 1])

    def _across(self, value: Value) -> Value:
        """Return what belongs to columns of bins, once for each row of bins, (R * rows, columns, 1, taps)."""
        build, (height, width) = self._build, self._pooling.output_size
        proposals = self._pooling.proposals
        whole = build.expand(
            build.reshape(value, [proposals, 1, width * self._taps]), [proposals, height, width * self._taps]
        )
        return build.reshape(whole, [proposals * height, width, 1, self._taps])
