"""Resizing an image: nearest, nearest-exact, bilinear and bicubic, to a size or by a factor."""

from __future__ import annotations

import torch

from qexport.errors import UnsupportedOperator
from qexport.plugins.torch2trt.data_types import live
from qexport.plugins.torch2trt.interface import ConversionContext, argument, give
from qexport.runtimes.tensorrt_library import load_library

FUNCTIONS = ("torch.nn.functional.interpolate", "torch.nn.functional.upsample")
_KINDS = {"nearest": "NEAREST", "nearest-exact": "NEAREST", "bilinear": "LINEAR", "bicubic": "CUBIC"}


def convert(context: ConversionContext) -> None:
    """Add a resize to the size that torch found.

    Raises:
        UnsupportedOperator: another mode or rank, anti-aliasing, or a factor that does not give a whole size.
    """
    trt = load_library().trt
    x: torch.Tensor = argument(context, 0, "input")
    mode = argument(context, 3, "mode", "nearest")
    corners = bool(argument(context, 4, "align_corners", False))
    _check(context, x, mode)
    layer = context.network.add_resize(live(context, x))
    size = tuple(context.method_return.shape)
    if all(wanted % own == 0 for own, wanted in zip(x.shape, size, strict=True)):
        layer.scales = tuple(wanted // own for own, wanted in zip(x.shape, size, strict=True))
    else:
        layer.shape = size
    # TensorRT before 8.5 has ResizeMode.
    kinds = trt.InterpolationMode if hasattr(trt, "InterpolationMode") else trt.ResizeMode
    layer.resize_mode = getattr(kinds, _KINDS[mode])
    transformations = trt.ResizeCoordinateTransformation
    if mode == "nearest":
        layer.coordinate_transformation = transformations.ASYMMETRIC
        layer.nearest_rounding = trt.ResizeRoundMode.FLOOR
    elif mode == "nearest-exact":
        layer.coordinate_transformation = transformations.HALF_PIXEL
        layer.nearest_rounding = trt.ResizeRoundMode.HALF_UP
    else:
        layer.coordinate_transformation = (
            transformations.ALIGN_CORNERS if corners else transformations.HALF_PIXEL
        )
        # Of an output of one pixel, torch takes the first corner, or the middle.
        layer.selector_for_single_pixel = trt.ResizeSelector.UPPER if corners else trt.ResizeSelector.FORMULA
    if mode == "bicubic":
        layer.cubic_coeff = -0.75  # torch's
    give(context, layer.get_output(0))


def _check(context: ConversionContext, x: torch.Tensor, mode: str) -> None:
    if mode not in _KINDS or x.dim() != 4:
        raise UnsupportedOperator(
            f"interpolate in mode {mode!r} of {x.dim()} axes: there is {', '.join(_KINDS)} of images (N, C, H, W)."
        )
    if argument(context, 6, "antialias", False):
        raise UnsupportedOperator(
            "interpolate with antialias: TensorRT's resize has none. Use antialias=False."
        )
    factor = argument(context, 2, "scale_factor")
    if factor is None or argument(context, 5, "recompute_scale_factor", False):
        return
    factors = list(factor) if isinstance(factor, (tuple, list)) else [factor, factor]
    for length, scale in zip(x.shape[2:], factors, strict=True):
        if (length * scale) % 1:
            # torch then places its samples by the factor, TensorRT by the ratio of the sizes.
            raise UnsupportedOperator(
                f"interpolate of {length} pixels by {scale}: no whole size. Give the size, or "
                "recompute_scale_factor=True."
            )
