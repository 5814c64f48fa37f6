"""Multi-scale RoIAlign in ONNX, in three forms.

`atlas`: all pyramid levels side by side in one map, each proposal pooled once by one RoiAlign. Exact.

`grid`: the same map sampled by GridSample and averaged, for runtimes that have no RoiAlign. Within 1e-5.

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

from qexport.errors import UnsupportedOperator
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
    """Replace a placeholder by one RoiAlign over all levels laid out in one map."""
    spec = RoiAlignSpec.of(node)
    build = Builder(node)
    boxes, features = node.inputs[0], [value for value in node.inputs[1:] if value is not None]
    assert boxes is not None
    if len(features) == 1:
        scaled = build.op("Mul", [boxes, build.constant(spec.scales[0], np.float32)])
        build.replace_with(_roi_align(build, features[0], scaled, spec))
        return
    atlas = _Atlas.of(spec)
    level = level_of(build, boxes, spec)
    scale = build.op("Gather", [build.constant([[s] for s in spec.scales], np.float32), level])
    shift = build.op("Gather", [build.constant([offset * 2 for offset in atlas.offsets], np.float32), level])
    placed = build.op("Add", [build.op("Mul", [boxes, scale]), shift])
    pooled = _roi_align(build, atlas.write(build, features), placed, spec)
    build.replace_with(_cut_outside(build, pooled, Sampler(build, boxes, level, spec)))


def lower_to_grid(node: ir.Node) -> None:
    """Replace a placeholder by GridSample at RoIAlign's samples, over all levels in one map, and an average.

    For runtimes without RoIAlign. GridSample takes positions in -1..1, whose rounding moves a sample by up to
    1e-5 of a cell.

    Raises:
        UnsupportedOperator: the number of samples depends on the box (`sampling_ratio` below 1).
    """
    spec = RoiAlignSpec.of(node)
    if spec.sampling_ratio < 1:
        raise UnsupportedOperator(
            f"RoIAlign with sampling_ratio {spec.sampling_ratio} takes as many samples as a box is large, which "
            "has no form of fixed shape. Build the detector with MultiScaleRoIAlign(..., sampling_ratio=2), "
            "torchvision's own choice, or choose the plugin form where the runtime has it."
        )
    build = Builder(node)
    boxes, features = node.inputs[0], [value for value in node.inputs[1:] if value is not None]
    assert boxes is not None
    atlas = _Atlas.of(spec)
    level = level_of(build, boxes, spec)
    sampler = Sampler(build, boxes, level, spec)
    rows, columns = spec.output_size[0] * spec.sampling_ratio, spec.output_size[1] * spec.sampling_ratio
    along = []
    for axis, size in ((0, atlas.width), (1, atlas.height)):
        first = build.constant([[offset[axis]] for offset in atlas.offsets], np.float32)
        place = build.op("Add", [sampler.clamped(axis), build.op("Gather", [first, level], axis=0)])
        place = build.op("Mul", [place, build.constant(2 / (size - 1), np.float32)])
        place = build.op("Sub", [place, build.constant(1.0, np.float32)])
        shape = [spec.proposals, 1, columns, 1] if axis == 0 else [spec.proposals, rows, 1, 1]
        place = build.op("Reshape", [place, build.constant(shape, np.int64)])
        whole = build.constant([spec.proposals, rows, columns, 1], np.int64)
        along.append(build.op("Expand", [place, whole]))
    grid = build.op("Concat", along, axis=3)
    grid = build.op("Reshape", [grid, build.constant([1, spec.proposals * rows, columns, 2], np.int64)])
    # Opset 18 calls the mode bilinear; the map is padded, no sample reads beyond it.
    samples = build.op(
        "GridSample",
        [atlas.write(build, features), grid],
        mode="bilinear",
        padding_mode="border",
        align_corners=1,
    )
    ratio = spec.sampling_ratio
    bins = build.op("AveragePool", [samples], kernel_shape=[ratio, ratio], strides=[ratio, ratio])
    split = build.constant([spec.channels, spec.proposals, *spec.output_size], np.int64)
    pooled = build.op("Transpose", [build.op("Reshape", [bins, split])], perm=[1, 0, 2, 3])
    build.replace_with(_cut_outside(build, pooled, sampler))


@dataclass(frozen=True, slots=True)
class _Atlas:
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
    def of(cls, spec: RoiAlignSpec) -> _Atlas:
        sizes = tuple(LevelSize(level.height + 2, level.width + 2) for level in spec.levels)
        starts = [sum(size.width for size in sizes[1:index]) for index in range(1, len(sizes))]
        offsets = ((0, 0), *((start, sizes[0].height) for start in starts))
        below = max((size.height for size in sizes[1:]), default=0)
        width = max(sizes[0].width, sum(size.width for size in sizes[1:]))
        return cls(sizes, offsets, sizes[0].height + below, width)

    def write(self, build: Builder, features: list[ir.Value]) -> ir.Value:
        """Return the map, (1, C, height, width)."""
        edge = build.constant([0, 0, 0, 0, 0, 0, 2, 2], np.int64)
        padded = [build.op("Pad", [feature, edge], mode="edge") for feature in features]
        first = _grow(build, padded[0], 0, self.width - self.sizes[0].width)
        if len(padded) == 1:
            return first
        row_height = self.height - self.sizes[0].height
        row = [
            _grow(build, value, row_height - size.height, 0)
            for value, size in zip(padded[1:], self.sizes[1:], strict=True)
        ]
        below = build.op("Concat", row, axis=3) if len(row) > 1 else row[0]
        below = _grow(build, below, 0, self.width - sum(size.width for size in self.sizes[1:]))
        return build.op("Concat", [first, below], axis=2)


def _cut_outside(build: Builder, pooled: ir.Value, sampler: Sampler) -> ir.Value:
    """Count samples beyond a level as zero, as RoIAlign does.

    A box less than a cell long is sampled over a whole cell and so may leave its level. The share of each bin's
    samples that lie inside makes that good: those outside have all read the same last row.
    """
    for axis in (0, 1):
        pooled = build.op("Mul", [pooled, sampler.share_inside(axis)])
    return pooled


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
    sampler = Sampler(build, boxes, level, spec)
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


class Sampler:
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

    def _last(self, axis: int) -> ir.Value:
        return self._per_level([size - 1 for size in self._sizes(axis)], np.float32)

    def _clamp(self, position: ir.Value, last: ir.Value) -> ir.Value:
        build = self._build
        return build.op("Max", [build.op("Min", [position, last]), build.constant(0.0, np.float32)])

    def clamped(self, axis: int) -> ir.Value:
        """Return where the samples along x (0) or y (1) read, cells of the level, (R, samples)."""
        position, _ = self._positions(axis)
        return self._clamp(position, self._last(axis))

    def axis(self, axis: int) -> _Axis:
        """Return neighbours and weights of the samples along x (0) or y (1)."""
        build, samples = self._build, self._samples(axis)
        position, inside = self._positions(axis)
        last = self._last(axis)
        position = self._clamp(position, last)
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
