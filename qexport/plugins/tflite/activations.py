"""Activations that a kernel applies by saturation, as TFLite names them."""

from __future__ import annotations

from typing import Any

from ai_edge_litert import schema_py_generated as schema
from torch.fx import Node

from qexport.errors import UnsupportedOperator
from qexport.quantization.graph import op_name, site_of

ACTIVATIONS = {
    "": schema.ActivationFunctionType.NONE,
    "relu": schema.ActivationFunctionType.RELU,
    "relu6": schema.ActivationFunctionType.RELU6,
    "relu1": schema.ActivationFunctionType.RELU_N1_TO_1,
}
_OF_LIMITS: dict[tuple[float | None, float | None], str] = {
    (0.0, None): "relu",
    (0.0, 6.0): "relu6",
    (-1.0, 1.0): "relu1",
}
_HARDTANH = (-1.0, 1.0)
"""Its limits where a call names none."""


def limits_of(node: Node) -> tuple[float | None, float | None]:
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


def activation_of(node: Node) -> str:
    """Return TFLite's name of an activation, `relu6`; torch's own where a kernel has none of that kind."""
    name = op_name(node)
    if name not in ("clamp", "hardtanh"):
        return name
    return _OF_LIMITS.get(limits_of(node), name)
