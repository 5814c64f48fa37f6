"""RoIAlign by TensorRT's grid sample: of a pyramid, and torchvision's own of one map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qexport.errors import UnsupportedOperator
from qexport.plugins.roi_align_grid import Atlas, pool_by_grid, require_fixed_samples
from qexport.plugins.roi_align_sampler import LevelSize, Pooling, Sampler, level_of
from qexport.plugins.tensorrt.network_builder import NetworkBuilder
from qexport.plugins.torch2trt.interface import ConversionContext, argument, give, trt_tensor
from qexport.runtimes.tensorrt_library import load_library

FUNCTIONS: tuple[str, ...] = (
    "qexport.detectors.operators.multiscale_roi_align",
    "torchvision.ops.roi_align",
)


def convert(context: ConversionContext) -> None:
    """Add the layers of one call.

    Raises:
        UnsupportedOperator: the number of samples depends on the box, or the features are not float32.
    """
    if isinstance(argument(context, 0, "features"), (list, tuple)):
        _convert_pyramid(context)
    else:
        _convert_single(context)


def _convert_pyramid(context: ConversionContext) -> None:
    """Add multiscale_roi_align(features, boxes, scales, output_size, sampling_ratio, scale, level)."""
    features: Sequence[Tensor] = argument(context, 0, "features")
    boxes: Tensor = argument(context, 1, "boxes")
    scales = tuple(float(scale) for scale in argument(context, 2, "scales"))
    build = NetworkBuilder(load_library().trt, context.network)
    pooling = _pooling(
        features,
        scales=scales,
        proposals=boxes.shape[0],
        output_size=argument(context, 3, "output_size"),
        sampling_ratio=argument(context, 4, "sampling_ratio"),
    )
    placed = trt_tensor(context, boxes)
    canonical = argument(context, 5, "canonical_scale"), argument(context, 6, "canonical_level")
    level = level_of(build, placed, scales, *canonical)
    _pool(context, build, [trt_tensor(context, feature) for feature in features], placed, level, pooling)


def _convert_single(context: ConversionContext) -> None:
    """Add roi_align(input, boxes, output_size, spatial_scale, sampling_ratio, aligned).

    The images of a batch are to the boxes what the levels of a pyramid are, all of one scale.
    """
    batch: Tensor = argument(context, 0, "input")
    boxes: Tensor | Sequence[Tensor] = argument(context, 1, "boxes")
    build = NetworkBuilder(load_library().trt, context.network)
    images = batch.shape[0]
    if isinstance(boxes, Tensor):
        proposals, table = boxes.shape[0], trt_tensor(context, boxes)
        placed = build.slice(table, [1], [5], [1])
        level = build.cast(build.squeeze(build.slice(table, [0], [1], [1]), [1]), np.int64)
    else:
        counts = [given.shape[0] for given in boxes]
        proposals = sum(counts)
        given = [trt_tensor(context, own) for own in boxes if own.shape[0]]
        placed = build.concat(given, axis=0) if len(given) > 1 else given[0]
        level = build.constant(np.repeat(np.arange(images), counts), np.int64)
    pooling = _pooling(
        [batch] * images,
        scales=(float(argument(context, 3, "spatial_scale", 1.0)),) * images,
        proposals=proposals,
        output_size=argument(context, 2, "output_size"),
        sampling_ratio=argument(context, 4, "sampling_ratio", -1),
        aligned=bool(argument(context, 5, "aligned", False)),
        boxes_inside=False,
    )
    maps = trt_tensor(context, batch)
    features = [build.slice(maps, [image], [image + 1], [0]) for image in range(images)]
    _pool(context, build, features, placed, level, pooling)


def _pooling(
    features: Sequence[Tensor],
    *,
    scales: tuple[float, ...],
    proposals: int,
    output_size: int | Sequence[int],
    sampling_ratio: int,
    aligned: bool = False,
    boxes_inside: bool = True,
) -> Pooling:
    require_fixed_samples(sampling_ratio)
    if any(feature.dtype != torch.float32 for feature in features):
        raise UnsupportedOperator(
            f"RoIAlign of {features[0].dtype}: its positions need float32. Convert the detector in float32, and let "
            "TensorRT or the encodings choose the precision of the layers before it."
        )
    size = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
    return Pooling(
        scales=scales,
        levels=tuple(LevelSize(*feature.shape[2:]) for feature in features),
        channels=features[0].shape[1],
        proposals=proposals,
        output_size=(size[0], size[1]),
        sampling_ratio=sampling_ratio,
        aligned=aligned,
        boxes_inside=boxes_inside,
    )


def _pool(
    context: ConversionContext,
    build: NetworkBuilder,
    features: Sequence[Any],
    boxes: Any,
    level: Any,
    pooling: Pooling,
) -> None:
    sampler: Sampler[Any] = Sampler(build, boxes, level, pooling)
    give(context, pool_by_grid(build, features, level, sampler, pooling, Atlas.of(pooling.levels)))
