"""What every lowering is checked for: that it read what the graph asks, and wrote what the graph says."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from qexport.errors import UnsupportedOperator
from qexport.plugins.executorch.held import Held
from qexport.plugins.executorch.steps import dtype_of
from qexport.quantization.graph import site_of

_READ = ("min", "max", "min_val", "max_val", "memory_format")
"""Options by keyword that a lowering reads, or that change no value."""
_NEUTRAL: dict[str, object] = {"alpha": 1, "rounding_mode": None, "dtype": None, "approximate": "none"}
"""Others, with the value that changes nothing."""


def check_options(node: Node) -> None:
    """Refuse an option that no lowering reads.

    Raises:
        UnsupportedOperator: names the option.
    """
    for name, value in node.kwargs.items():
        if name not in _READ and not (name in _NEUTRAL and value == _NEUTRAL[name]):
            raise UnsupportedOperator(
                f"{node.target} in module {where(node)} with {name}={value}: not written for ExecuTorch. Write it in "
                "other operators in the model."
            )


def check_result(node: Node, held: Held | tuple[Held, ...]) -> None:
    """Refuse what was written for a node where it is not what the graph says.

    Raises:
        UnsupportedOperator: it has another shape or type than the graph says, so the call asked for something that
            the lowering does not know.
    """
    expected = node.meta.get("val")
    several = held if isinstance(held, tuple) else (held,)
    wanted = expected if isinstance(expected, (tuple, list)) else (expected,)
    for found, value in zip(several, wanted, strict=False):
        if not isinstance(value, Tensor):
            continue
        shape, dtype = tuple(value.shape), dtype_of(value)
        if found.shape != shape or found.value.dtype not in (dtype, "int8"):
            raise UnsupportedOperator(
                f"{node.target} in module {where(node)} gives {dtype} {shape}, what is known of it for ExecuTorch "
                f"{found.value.dtype} {found.shape}. Write it in other operators in the model."
            )


def where(node: Node) -> str:
    """Return the module path of a node, for messages."""
    return site_of(node).path or "(the model itself)"
