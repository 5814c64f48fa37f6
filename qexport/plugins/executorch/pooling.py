"""Average pools over windows and over whole maps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from qexport.errors import UnsupportedOperator
from qexport.plugins.executorch.elementwise import axes_of
from qexport.plugins.executorch.held import Held, as_map, as_plain
from qexport.plugins.executorch.lowering import Lowering
from qexport.plugins.executorch.xnnpack import Limits
from qexport.quantization.graph import argument_node, op_name, site_of


def integer(lowering: Lowering, node: Node, limits: Limits | None, scale: float) -> Held | None:
    """Write the mean of whole maps of int8 codes; None for another pool."""
    quantizer = lowering.quantizer_behind(node.args[0])
    if limits is not None or quantizer is None:
        return None
    source = lowering.codes(quantizer)
    if not _is_global(node, source):
        return None
    lowering.go_to(node)
    made = lowering.xnnpack.mean(as_map(lowering.xnnpack, source), scale)
    return _result(lowering, node, Held.map(made))


def real(lowering: Lowering, node: Node) -> Held:
    """Write an average in float32.

    Raises:
        UnsupportedOperator: windows of several sizes.
    """
    source = lowering.real(argument_node(node))
    if op_name(node) == "mean" and not _is_global(node, source):
        axes, keep = axes_of(node, len(source.shape))
        plain = as_plain(lowering.xnnpack, source)
        return Held.plain(lowering.kernels.call(torch.mean, plain, list(axes), keep))
    value = as_map(lowering.xnnpack, source)
    if _is_global(node, source):
        return _result(lowering, node, Held.map(lowering.xnnpack.mean(value)))
    return Held.map(lowering.xnnpack.average_pool(value, *_windows(node, value.shape[1:3])))


def _is_global(node: Node, source: Held) -> bool:
    if len(source.shape) != 4:
        return False
    if op_name(node) == "mean":
        return axes_of(node, 4)[0] == (2, 3)
    return math.prod(node.meta["val"].shape[2:]) == 1 and op_name(node) == "adaptive_avg_pool2d"


def _result(lowering: Lowering, node: Node, held: Held) -> Held:
    """Return a mean without the axes that it was taken over, where the graph drops them."""
    shape = tuple(node.meta["val"].shape)
    return held if len(shape) == 4 else Held.plain(lowering.xnnpack.reshape(held.value, shape))


def _windows(node: Node, size: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, int]]:
    if op_name(node) == "adaptive_avg_pool2d":
        result = tuple(node.meta["val"].shape[2:])
        if all(length % count == 0 for length, count in zip(size, result, strict=True)):
            window = (size[0] // result[0], size[1] // result[1])
            return window, window
        raise UnsupportedOperator(
            f"adaptive average pool {site_of(node).path}: {size[0]}x{size[1]} to {result[0]}x{result[1]} has windows "
            "of several sizes. Replace it by qexport.plugins.adaptive_avg_pool_module.SplitAdaptiveAvgPool2d."
        )
    given: Any = node.args
    window = (int(given[1][0]), int(given[1][-1]))
    stride = (int(given[2][0]), int(given[2][-1])) if len(given) > 2 and given[2] else window
    if len(given) > 3 and any(given[3]):
        raise UnsupportedOperator(
            f"average pool {site_of(node).path} pads: XNNPACK would leave the padding out."
        )
    if len(given) > 6 and given[6] is not None:
        raise UnsupportedOperator(
            f"average pool {site_of(node).path} divides by {given[6]}: XNNPACK divides by the size of the window."
        )
    return window, stride
