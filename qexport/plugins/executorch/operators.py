"""Every operator of the graph and how it is computed, listed."""

from __future__ import annotations

import torch
from torch.fx import Node

from qexport.plugins.executorch import elementwise, image, layers, pooling, ranking, roi_align, shapes
from qexport.plugins.executorch.elementwise import node_of
from qexport.plugins.executorch.held import Held
from qexport.plugins.executorch.lowering import Integer, Lowering, Moving, Operators, Real
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
    "add": elementwise.integer("add"),
    "conv2d": layers.integer_convolution,
    "linear": layers.integer_linear,
    "mean": pooling.integer,
    "mul": elementwise.integer("multiply"),
    "multiscale_roi_align": roi_align.integer,
}
"""Operators that have an integer kernel with scales of its own."""


def _getitem(lowering: Lowering, node: Node) -> Held:
    several = lowering.several(argument_node(node))
    assert isinstance(several, tuple)
    return several[int(str(node.args[1]))]


REAL: dict[str, Real] = {
    "__and__": elementwise.binary("", torch.logical_and),
    "__or__": elementwise.binary("", torch.logical_or),
    "adaptive_avg_pool2d": pooling.real,
    "add": elementwise.binary("add", torch.add),
    "avg_pool2d": pooling.real,
    "batched_nms_mask": ranking.nms_mask,
    "best_scores": ranking.best_scores,
    "clamp": elementwise.clamp,
    "conv2d": layers.real_convolution,
    "div": elementwise.binary("divide", torch.div),
    "exp": elementwise.unary(torch.exp, node_of("exp")),
    "ge": elementwise.binary("", torch.ge),
    "gelu": elementwise.unary(torch.nn.functional.gelu, node_of("gelu")),
    "getitem": _getitem,
    "gt": elementwise.binary("", torch.gt),
    "hardsigmoid": elementwise.unary(torch.nn.functional.hardsigmoid, elementwise.hardsigmoid),
    "hardswish": elementwise.unary(torch.nn.functional.hardswish, node_of("hardswish")),
    "hardtanh": elementwise.clamp,
    "le": elementwise.binary("", torch.le),
    "leaky_relu": elementwise.leaky_relu,
    "linear": layers.real_linear,
    "lt": elementwise.binary("", torch.lt),
    "mean": pooling.real,
    "mul": elementwise.binary("multiply", torch.mul),
    "multiscale_roi_align": roi_align.real,
    "normalised_image": image.normalised_image,
    "pad": shapes.pad,
    "remainder": elementwise.binary("", torch.remainder),
    "sigmoid": elementwise.unary(torch.sigmoid, node_of("sigmoid")),
    "silu": elementwise.unary(torch.nn.functional.silu, elementwise.silu),
    "softmax": elementwise.softmax,
    "sub": elementwise.binary("subtract", torch.sub),
    "sum": elementwise.total,
    "tanh": elementwise.unary(torch.tanh, node_of("tanh")),
    "topk": ranking.topk,
    "where": elementwise.where,
}
"""Operators computed in float32."""


def operators() -> Operators:
    """Return how operators are written."""
    return Operators(MOVING, REAL, INTEGER)
