"""Activations that a kernel of XNNPACK applies by saturation: any two limits."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from qexport.errors import UnsupportedOperator
from qexport.plugins.executorch.xnnpack import Limits
from qexport.quantization.graph import op_name, site_of

_HARDTANH = (-1.0, 1.0)
"""Its limits where a call names none."""


def limits_of_fused(node: Node) -> Limits:
    """Return the limits of relu, relu6, hardtanh or clamp.

    Raises:
        UnsupportedOperator: a limit is a tensor.
    """
    name = op_name(node)
    if name in ("relu", "relu6"):
        return (0.0, 6.0 if name == "relu6" else None)
    return limits_of(node)


def limits_of(node: Node) -> Limits:
    """Return the least and the largest value that a clamp or hardtanh lets through; None for no limit.

    Raises:
        UnsupportedOperator: a limit is a tensor.
    """
    given: list[Any] = list(node.args[1:])
    names = ("min", "max") if op_name(node) == "clamp" else ("min_val", "max_val")
    defaults = (None, None) if op_name(node) == "clamp" else _HARDTANH
    limits: list[Any] = [
        given[place] if len(given) > place else node.kwargs.get(name, default)
        for place, (name, default) in enumerate(zip(names, defaults, strict=True))
    ]
    for limit in limits:
        if isinstance(limit, Node):
            raise UnsupportedOperator(
                f"{node.target} in module {site_of(node).path}: a limit is a tensor. Clamp to numbers in the model."
            )
    low, high = (None if limit is None else float(limit) for limit in limits)
    return low, high
