"""Multi-scale RoIAlign in ONNX, in three forms.

`atlas`: all pyramid levels side by side in one map, each proposal pooled once by one RoiAlign. Exact.

`grid`: the same map sampled by GridSample and averaged, for runtimes that have no RoiAlign. Within 1e-5.

`int8 gather`: four neighbours of every sample, gathered as rows of integers, and their weights in 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qexport.plugins.onnx.builder import Builder
from qexport.plugins.onnx.roi_align_int8 import (
    QuantizedFeature,
    RowSampler,
    pool_by_int8_gather,
    reachable_levels,
)
from qexport.plugins.roi_align_grid import Atlas, pool_by_grid, require_fixed_samples
from qexport.plugins.roi_align_sampler import LevelSize, Pooling, cut_outside, level_of

__all__ = ["QuantizedFeature", "RoiAlignSpec", "lower_to_atlas", "lower_to_grid", "lower_to_int8_gather"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoiAlignSpec(Pooling):
    """What a MultiScaleRoiAlign placeholder asks for."""

    canonical_scale: int
    canonical_level: int

    @classmethod
    def of(cls, node: ir.Node) -> RoiAlignSpec:
        """Read the placeholder's attributes and shapes."""
        boxes, features = node.inputs[0], node.inputs[1:]
        shapes = [tuple(int(size) for size in value.shape) for value in (boxes, *features)]
        attributes = node.attributes
        height, width = attributes["output_size"].as_ints()
        return cls(
            scales=tuple(attributes["scales"].as_floats()),
            levels=tuple(LevelSize(*shape[2:]) for shape in shapes[1:]),
            channels=shapes[1][1],
            proposals=shapes[0][0],
            output_size=(height, width),
            sampling_ratio=attributes["sampling_ratio"].as_int(),
            canonical_scale=attributes["canonical_scale"].as_int(),
            canonical_level=attributes["canonical_level"].as_int(),
        )


def lower_to_atlas(node: ir.Node) -> None:
    """Replace a placeholder by one RoiAlign over all levels laid out in one map."""
    spec, build = RoiAlignSpec.of(node), Builder(node)
    boxes, features = _inputs(node)
    if len(features) == 1:
        scaled = build.mul(boxes, build.constant(spec.scales[0], np.float32))
        build.replace_with(_roi_align(build, features[0], scaled, spec))
        return
    atlas = Atlas.of(spec.levels)
    level = _level(build, boxes, spec)
    scale = build.gather(build.constant([[s] for s in spec.scales], np.float32), level)
    shift = build.gather(build.constant([offset * 2 for offset in atlas.offsets], np.float32), level)
    placed = build.add(build.mul(boxes, scale), shift)
    pooled = _roi_align(build, atlas.write(build, features), placed, spec)
    build.replace_with(cut_outside(build, pooled, RowSampler(build, boxes, level, spec)))


def lower_to_grid(node: ir.Node) -> None:
    """Replace a placeholder by GridSample at RoIAlign's samples, over all levels in one map, and an average.

    Raises:
        UnsupportedOperator: the number of samples depends on the box (`sampling_ratio` below 1).
    """
    spec, build = RoiAlignSpec.of(node), Builder(node)
    require_fixed_samples(spec.sampling_ratio)
    boxes, features = _inputs(node)
    level = _level(build, boxes, spec)
    sampler = RowSampler(build, boxes, level, spec)
    build.replace_with(pool_by_grid(build, features, level, sampler, spec, Atlas.of(spec.levels)))


def lower_to_int8_gather(node: ir.Node, features: list[QuantizedFeature], output_scale: float) -> ir.Value:
    """Write the integer form before a placeholder, and return its result.

    Args:
        node: the placeholder; it is left in place, for the caller to cut out with the quantizers around it.
        features: the pyramid levels as integers, finest first.
        output_scale: scale of the result.

    Returns:
        (R * pooled_h, pooled_w, C) uint8 with zero point 128: channels last.
    """
    spec, build = RoiAlignSpec.of(node), Builder(node)
    boxes, _ = _inputs(node)
    level = _level(build, boxes, spec)
    reached = reachable_levels(spec, spec.canonical_scale, spec.canonical_level)
    return pool_by_int8_gather(
        build, boxes, level, features, spec, reached=reached, output_scale=output_scale
    )


def _inputs(node: ir.Node) -> tuple[ir.Value, list[ir.Value]]:
    boxes = node.inputs[0]
    assert boxes is not None
    return boxes, [value for value in node.inputs[1:] if value is not None]


def _level(build: Builder, boxes: ir.Value, spec: RoiAlignSpec) -> ir.Value:
    return level_of(build, boxes, spec.scales, spec.canonical_scale, spec.canonical_level)


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
