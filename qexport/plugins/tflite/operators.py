"""Every operator of the graph and how TFLite computes it, listed."""

from __future__ import annotations

from torch.fx import Node

from qexport.plugins.tflite import (
    convolution,
    elementwise,
    image,
    linear,
    pooling,
    ranking,
    roi_align,
    shapes,
)
from qexport.plugins.tflite.builder import TfliteBuilder
from qexport.plugins.tflite.held import Held
from qexport.plugins.tflite.lowering import Integer, Lowering, Moving, Operators, Real
from qexport.quantization.graph import argument_node

MOVING: dict[str, Moving] = {
    "cat": shapes.concatenate,
    "clone": shapes.same,
    "contiguous": shapes.same,
    "dropout": shapes.same,
    "flatten": shapes.view,
    "index_select": shapes.index_select,
    "max_pool2d": shapes.max_pool2d,
    "permute": shapes.permute,
    "relu": shapes.relu,
    "reshape": shapes.view,
    "select": shapes.select,
    "slice": shapes.cut,
    "stack": shapes.stack,
    "unsqueeze": shapes.unsqueeze,
    "upsample_nearest2d": shapes.upsample_nearest2d,
    "view": shapes.view,
    "_unsafe_view": shapes.view,
}
"""Operators that move or select values, whatever their type."""

INTEGER: dict[str, Integer] = {
    "adaptive_avg_pool2d": pooling.integer,
    "add": elementwise.integer("ADD"),
    "conv2d": convolution.integer,
    "linear": linear.integer,
    "mean": pooling.integer,
    "mul": elementwise.integer("MUL"),
    "multiscale_roi_align": roi_align.integer,
}
"""Operators that have an integer kernel with scales of its own."""


def _getitem(lowering: Lowering, node: Node) -> Held:
    several = lowering.several(argument_node(node))
    assert isinstance(several, tuple)
    return several[int(str(node.args[1]))]


REAL: dict[str, Real] = {
    "__and__": elementwise.binary(TfliteBuilder.logical_and),
    "__or__": elementwise.binary(TfliteBuilder.logical_or),
    "adaptive_avg_pool2d": pooling.real,
    "add": elementwise.binary(TfliteBuilder.add),
    "avg_pool2d": pooling.real,
    "batched_nms_mask": ranking.nms_mask,
    "best_scores": ranking.best_scores,
    "clamp": elementwise.clamp,
    "conv2d": convolution.real,
    "div": elementwise.binary(TfliteBuilder.div),
    "exp": elementwise.unary(TfliteBuilder.exp),
    "ge": elementwise.binary(TfliteBuilder.greater_or_equal),
    "getitem": _getitem,
    "gt": elementwise.binary(TfliteBuilder.greater),
    "hardsigmoid": elementwise.unary(elementwise.hardsigmoid),
    "hardtanh": elementwise.clamp,
    "hardswish": elementwise.unary(
        lambda build, value: build.unary("HARD_SWISH", value, options="HardSwishOptions")
    ),
    "le": elementwise.binary(TfliteBuilder.less_or_equal),
    "linear": linear.real,
    "lt": elementwise.binary(TfliteBuilder.less),
    "mean": pooling.real,
    "mul": elementwise.binary(TfliteBuilder.mul),
    "multiscale_roi_align": roi_align.real,
    "normalised_image": image.normalised_image,
    "pad": shapes.pad,
    "remainder": elementwise.binary(TfliteBuilder.remainder),
    "sigmoid": elementwise.unary(TfliteBuilder.sigmoid),
    "silu": elementwise.unary(elementwise.silu),
    "softmax": elementwise.softmax,
    "sub": elementwise.binary(TfliteBuilder.sub),
    "sum": elementwise.total,
    "topk": ranking.topk,
    "where": elementwise.where,
}
"""Operators computed in float32."""


def operators(*, portable_nms: bool = False) -> Operators:
    """Return how operators are written.

    Args:
        portable_nms: whether suppression is written in operators that every runtime has.
    """
    real = {**REAL, "batched_nms_mask": ranking.portable_nms_mask} if portable_nms else REAL
    return Operators(MOVING, real, INTEGER)
