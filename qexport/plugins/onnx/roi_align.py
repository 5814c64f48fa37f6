"""Multi-scale RoIAlign in ONNX, in two forms.

`atlas`: all pyramid levels side by side in one map, each proposal pooled once by one RoiAlign. Exact.

`int8 gather`: from int8 channels-last features, every sample's four neighbours gathered as rows and summed
by one batched QLinearMatMul, whose left side holds the bilinear weights in 8 bits. At most one step from
torchvision's RoIAlign quantized after, while no level's scale is many times the result's (rounding of the
weights costs about a twentieth of a step, times that ratio), and several times faster than a float RoiAlign
on a CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from qexport.plugins.onnx.builder import Builder

CHUNK_BYTES = 5 * 2**20
"""Gathered rows of one product: few enough to stay in the cache between the gather and the product."""


class LevelSize(NamedTuple):
    """Height and width of a pyramid level."""

    height: int
    width: int


@dataclass(frozen=True, slots=True)
class RoiAlignSpec:
    """What a MultiScaleRoiAlign placeholder asks for."""

    scales: tuple[float, ...]
    output_size: tuple[int, int]
    sampling_ratio: int
    canonical_scale: int
    canonical_level: int
    levels: tuple[LevelSize, ...]
    channels: int
    proposals: int

    @classmethod
    def of(cls, node: ir.Node) -> RoiAlignSpec:
        """Read the placeholder's attributes and shapes."""
        boxes, features = node.inputs[0], node.inputs[1:]
        shapes = [tuple(int(size) for size in value.shape) for value in (boxes, *features)]
        attributes = node.attributes
        height, width = attributes["output_size"].as_ints()
        return cls(
            tuple(attributes["scales"].as_floats()),
            (height, width),
            attributes["sampling_ratio"].as_int(),
            attributes["canonical_scale"].as_int(),
            attributes["canonical_level"].as_int(),
            tuple(LevelSize(*shape[2:]) for shape in shapes[1:]),
            shapes[1][1],
            shapes[0][0],
        )


def reachable_levels(spec: RoiAlignSpec) -> int:
    """Return how many levels, from the finest, a box as large as the image can be pooled from."""
    finest = spec.levels[0]
    side = math.sqrt(finest.height * finest.width) / spec.scales[0]
    highest = math.floor(spec.canonical_level + 1e-6 + math.log2(side / spec.canonical_scale))
    return min(max(highest + round(math.log2(spec.scales[0])), 0) + 1, len(spec.levels))


def level_of(build: Builder, boxes: ir.Value, spec: RoiAlignSpec) -> ir.Value:
    """Return the pyramid level of each box, (R,) int64 from 0: equation 1 of the FPN paper, eps as torchvision."""
    lowest = -math.log2(spec.scales[0])
    highest = -math.log2(spec.scales[-1])
    size = build.op(
        "Sub",
        [
            build.op("Slice", [boxes, *_range(build, 2, 4)]),
            build.op("Slice", [boxes, *_range(build, 0, 2)]),
        ],
    )
    width, height = (build.op("Gather", [size, build.constant(axis, np.int64)], axis=1) for axis in (0, 1))
    side = build.op("Sqrt", [build.op("Mul", [width, height])])
    ratio = build.op("Div", [side, build.constant(spec.canonical_scale, np.float32)])
    log2 = build.op("Div", [build.op("Log", [ratio]), build.constant(math.log(2.0), np.float32)])
    level = build.op("Add", [log2, build.constant(spec.canonical_level + 1e-6, np.float32)])
    clipped = build.op(
        "Clip",
        [build.op("Floor", [level]), build.constant(lowest, np.float32), build.constant(highest, np.float32)],
    )
    return build.op(
        "Cast", [build.op("Sub", [clipped, build.constant(lowest, np.float32)])], to=ir.DataType.INT64
    )


def lower_to_atlas(node: ir.Node) -> None:
    """Replace a placeholder by one RoiAlign over all levels laid out in one map.

    The finest level stands above the others, which stand side by side; each has two replicated rows and columns
    after it, which is what RoiAlign's clamping at the border of a level reads. A box less than a cell long is
    sampled over a whole cell and so may leave its level; what lies outside counts as zero in RoiAlign, which
    the share of each bin's samples that lie inside makes good: they all read the same last row.
    """
    spec = RoiAlignSpec.of(node)
    build = Builder(node)
    boxes, features = node.inputs[0], [value for value in node.inputs[1:] if value is not None]
    assert boxes is not None
    if len(features) == 1:
        scaled = build.op("Mul", [boxes, build.constant(spec.scales[0], np.float32)])
        build.replace_with(_roi_align(build, features[0], scaled, spec))
        return
    edge = build.constant([0, 0, 0, 0, 0, 0, 2, 2], np.int64)
    padded = [build.op("Pad", [feature, edge], mode="edge") for feature in features]
    sizes = [LevelSize(level.height + 2, level.width + 2) for level in spec.levels]
    row_height = max(size.height for size in sizes[1:])
    width = max(sizes[0].width, sum(size.width for size in sizes[1:]))
    offsets = [(0, 0)]
    row = []
    for value, size in zip(padded[1:], sizes[1:], strict=True):
        offsets.append((sum(before.width for before in sizes[1 : len(offsets)]), sizes[0].height))
        row.append(_grow(build, value, row_height - size.height, 0))
    below = build.op("Concat", row, axis=3) if len(row) > 1 else row[0]
    below = _grow(build, below, 0, width - sum(size.width for size in sizes[1:]))
    atlas = build.op("Concat", [_grow(build, padded[0], 0, width - sizes[0].width), below], axis=2)
    level = level_of(build, boxes, spec)
    scale = build.op("Gather", [build.constant([[s] for s in spec.scales], np.float32), level])
    shift = build.op("Gather", [build.constant([offset * 2 for offset in offsets], np.float32), level])
    placed = build.op("Add", [build.op("Mul", [boxes, scale]), shift])
    pooled = _roi_align(build, atlas, placed, spec)
    sampler = _Sampler(build, boxes, level, spec)
    for axis in (0, 1):
        pooled = build.op("Mul", [pooled, sampler.share_inside(axis)])
    build.replace_with(pooled)


class QuantizedFeature(NamedTuple):
    """A feature map as integers: (1, C, H, W) uint8 with zero point 128, and its scale."""

    value: ir.Value
    scale: float


def lower_to_int8_gather(node: ir.Node, features: list[QuantizedFeature], output_scale: float) -> ir.Value:
    """Write the integer form before a placeholder, and return its result.

    Args:
        node: the placeholder; it is left in place, for the caller to cut out with the quantizers around it.
        features: the pyramid levels as integers, finest first.
        output_scale: scale of the result.

    Returns:
        (R * pooled_h, pooled_w, C) uint8 with zero point 128: channels last.
    """
    spec = RoiAlignSpec.of(node)
    build = Builder(node)
    boxes = node.inputs[0]
    assert boxes is not None
    level = level_of(build, boxes, spec)
    largest = max(feature.scale for feature in features[: reachable_levels(spec)])
    rows = [
        build.op(
            "Reshape",
            [
                build.op("Transpose", [feature.value], perm=[0, 2, 3, 1]),
                build.constant([-1, spec.channels], np.int64),
            ],
        )
        for feature in features
    ]
    table = build.op("Concat", rows, axis=0) if len(rows) > 1 else rows[0]
    sampler = _Sampler(build, boxes, level, spec)
    x, y = sampler.axis(0), sampler.axis(1)
    index = sampler.index(x, y)
    pooled_h, pooled_w = spec.output_size
    taps = 2 * spec.sampling_ratio
    inner = taps * taps * pooled_w
    relative = [feature.scale / largest for feature in features]
    weight_scale = build.constant(1.0 / spec.sampling_ratio**2 / 255, np.float32)
    no_offset = build.constant(0, np.uint8)
    weights = build.op("QuantizeLinear", [sampler.weights(x, y, relative), weight_scale, no_offset])
    right_params = [build.constant(largest, np.float32), build.constant(128, np.uint8)]
    result_params = [build.constant(output_scale, np.float32), build.constant(128, np.uint8)]
    chunk = max(1, CHUNK_BYTES // (pooled_h * inner * spec.channels))
    pooled = []
    for start in range(0, spec.proposals, chunk):
        count = min(chunk, spec.proposals - start)
        right = build.op("Gather", [table, _rows(build, index, start, count)], axis=0)
        right = build.op(
            "Reshape", [right, build.constant([count * pooled_h, inner, spec.channels], np.int64)]
        )
        left = _rows(build, weights, start * pooled_h, count * pooled_h)
        pooled.append(
            build.op("QLinearMatMul", [left, weight_scale, no_offset, right, *right_params, *result_params])
        )
    return build.op("Concat", pooled, axis=0) if len(pooled) > 1 else pooled[0]


class _Axis(NamedTuple):
    """Along one axis: the two neighbours of each sample and their weights, (R, samples * 2)."""

    index: ir.Value
    weight: ir.Value


class _Sampler:
    """Positions and weights of RoIAlign's bilinear samples (torchvision's roi_align, `aligned=False`).

    Axis 0 is x, axis 1 is y. Boxes lie within the image, hence no sample before the first row or column.
    """

    def __init__(self, build: Builder, boxes: ir.Value, level: ir.Value, spec: RoiAlignSpec) -> None:
        self._build, self._spec, self._level = build, spec, level
        scale = build.op("Gather", [build.constant([[s] for s in spec.scales], np.float32), level])
        self._boxes = build.op("Mul", [boxes, scale])
        cells = [size.height * size.width for size in spec.levels]
        self._first_row = self._per_level(np.cumsum([0, *cells[:-1]]), np.int32)
        self._width = self._per_level([size.width for size in spec.levels], np.int32)

    def _per_level(self, values: object, dtype: type[np.generic]) -> ir.Value:
        column = np.asarray(values).reshape(-1, 1)
        return self._build.op("Gather", [self._build.constant(column, dtype), self._level], axis=0)

    def _samples(self, axis: int) -> int:
        return self._spec.output_size[1 - axis] * max(self._spec.sampling_ratio, 1)

    def _sizes(self, axis: int) -> list[int]:
        return [level[1 - axis] for level in self._spec.levels]

    def _positions(self, axis: int) -> tuple[ir.Value, ir.Value]:
        """Return where the samples lie, (R, samples), and 1 for those on the level, 0 for those beyond it."""
        build, samples = self._build, self._samples(axis)
        start, end = (
            build.op("Gather", [self._boxes, build.constant([axis + 2 * k], np.int64)], axis=1)
            for k in (0, 1)
        )
        length = build.op("Max", [build.op("Sub", [end, start]), build.constant(1.0, np.float32)])
        centres = (np.arange(samples, dtype=np.float32) + 0.5) / samples
        position = build.op(
            "Add", [start, build.op("Mul", [length, build.constant(centres[None], np.float32)])]
        )
        inside = build.op("LessOrEqual", [position, self._per_level(self._sizes(axis), np.float32)])
        return position, build.op("Cast", [inside], to=ir.DataType.FLOAT)

    def share_inside(self, axis: int) -> ir.Value:
        """Return the share of each bin's samples that lie on the level, in a shape that broadcasts to the result."""
        build, bins = self._build, self._spec.output_size[1 - axis]
        _, inside = self._positions(axis)
        per_bin = self._samples(axis) // bins
        split = build.constant([self._spec.proposals, 1, bins, per_bin], np.int64)
        share = build.op(
            "ReduceMean", [build.op("Reshape", [inside, split]), build.constant([3], np.int64)], keepdims=1
        )
        return share if axis else build.op("Transpose", [share], perm=[0, 1, 3, 2])

    def axis(self, axis: int) -> _Axis:
        """Return neighbours and weights of the samples along x (0) or y (1)."""
        build, samples = self._build, self._samples(axis)
        position, inside = self._positions(axis)
        last = self._per_level([size - 1 for size in self._sizes(axis)], np.float32)
        position = build.op("Max", [build.op("Min", [position, last]), build.constant(0.0, np.float32)])
        low = build.op("Floor", [position])
        high_weight = build.op("Mul", [build.op("Sub", [position, low]), inside])
        low_weight = build.op("Sub", [inside, high_weight])
        high = build.op("Min", [build.op("Add", [low, build.constant(1.0, np.float32)]), last])
        index = build.op("Cast", [self._interleave(low, high, samples)], to=ir.DataType.INT32)
        return _Axis(index, self._interleave(low_weight, high_weight, samples))

    def _interleave(self, first: ir.Value, second: ir.Value, samples: int) -> ir.Value:
        build = self._build
        last_axis = build.constant([2], np.int64)
        pairs = build.op(
            "Concat",
            [build.op("Unsqueeze", [first, last_axis]), build.op("Unsqueeze", [second, last_axis])],
            axis=2,
        )
        return build.op("Reshape", [pairs, build.constant([self._spec.proposals, 2 * samples], np.int64)])

    def index(self, x: _Axis, y: _Axis) -> ir.Value:
        """Return the table row of every pair of neighbours, (R, 2 * samples_y, 2 * samples_x) int32."""
        build = self._build
        row = build.op("Add", [build.op("Mul", [y.index, self._width]), self._first_row])
        return build.op(
            "Add",
            [
                build.op("Unsqueeze", [row, build.constant([2], np.int64)]),
                build.op("Unsqueeze", [x.index, build.constant([1], np.int64)]),
            ],
        )

    def weights(self, x: _Axis, y: _Axis, relative: list[float]) -> ir.Value:
        """Return the weights of a bin's neighbours, (R * pooled_h, pooled_w, taps * taps * pooled_w).

        A row of bins reads the same gathered rows; the weights of the other bins' columns are zero. The scale
        of a box's level, relative to the largest one, is folded in.
        """
        build, spec = self._build, self._spec
        pooled_h, pooled_w = spec.output_size
        taps = 2 * spec.sampling_ratio
        own = np.zeros((1, pooled_w, taps * pooled_w), np.float32)
        for column in range(pooled_w):
            own[0, column, taps * column : taps * (column + 1)] = 1 / spec.sampling_ratio**2
        along_x = build.op(
            "Mul",
            [
                build.op("Unsqueeze", [x.weight, build.constant([1], np.int64)]),
                build.constant(own, np.float32),
            ],
        )
        along_y = build.op("Mul", [y.weight, self._per_level(relative, np.float32)])
        along_y = build.op(
            "Reshape", [along_y, build.constant([spec.proposals, pooled_h, 1, taps, 1], np.int64)]
        )
        along_x = build.op(
            "Reshape", [along_x, build.constant([spec.proposals, 1, pooled_w, 1, taps * pooled_w], np.int64)]
        )
        inner = taps * taps * pooled_w
        return build.op(
            "Reshape",
            [
                build.op("Mul", [along_y, along_x]),
                build.constant([spec.proposals * pooled_h, pooled_w, inner], np.int64),
            ],
        )


def _roi_align(build: Builder, features: ir.Value, boxes: ir.Value, spec: RoiAlignSpec) -> ir.Value:
    return build.op(
        "RoiAlign",
        [features, boxes, build.constant(np.zeros(spec.proposals), np.int64)],
        output_height=spec.output_size[0],
        output_width=spec.output_size[1],
        sampling_ratio=max(spec.sampling_ratio, 0),
        spatial_scale=1.0,
        coordinate_transformation_mode="output_half_pixel",
    )


def _grow(build: Builder, value: ir.Value, rows: int, columns: int) -> ir.Value:
    if not rows and not columns:
        return value
    return build.op("Pad", [value, build.constant([0, 0, 0, 0, 0, 0, rows, columns], np.int64)])


def _rows(build: Builder, value: ir.Value, start: int, count: int) -> ir.Value:
    """Return `count` entries of the first axis."""
    bounds = [build.constant([number], np.int64) for number in (start, start + count, 0)]
    return build.op("Slice", [value, *bounds])


def _range(build: Builder, start: int, end: int) -> list[ir.Value]:
    return [build.constant([number], np.int64) for number in (start, end, 1)]
