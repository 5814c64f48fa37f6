"""Functions by their dotted name, looked up when they are called: torch2trt replaces them while it converts."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from torch.nn import functional

_TENSOR = ("TensorBase", "_TensorBase", "Tensor")


def owner_of(name: str) -> tuple[Any, str]:
    """Return the module or class that holds a function, and the function's name in it.

    Args:
        name: `torch.nn.functional.conv2d`, `torch.Tensor.clamp_`.

    Raises:
        AttributeError: there is no such function.
    """
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            owner: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:-1]:
            owner = getattr(owner, part)
        getattr(owner, parts[-1])
        return owner, parts[-1]
    raise AttributeError(f"no function {name}")


def lookup(name: str) -> Any:
    """Return the function that stands under a name now."""
    owner, attribute = owner_of(name)
    return getattr(owner, attribute)


def forms(*names: str) -> tuple[str, ...]:
    """Return every function that PyTorch has under these names: plain and in place, as function and as method."""
    owners = ("torch", "torch.nn.functional", "torch.Tensor")
    every = (f"{owner}.{name}{place}" for name in names for owner in owners for place in ("", "_"))
    return tuple(name for name in every if exists(name))


def exists(name: str) -> bool:
    """Tell whether there is a function of a dotted name."""
    try:
        owner_of(name)
    except AttributeError:
        return False
    return True


def name_of(function: Any) -> str:
    """Return the dotted name under which a user knows a function that a mode or a hook was given."""
    holder = getattr(function, "__self__", None)
    if inspect.isgetsetdescriptor(holder):  # a property, `x.T`
        return f"torch.Tensor.{holder.__name__}"
    qualified = str(getattr(function, "__qualname__", "") or getattr(function, "__name__", "") or function)
    if "<locals>" in qualified:  # F.max_pool2d is made by another function
        qualified = next((name for name, value in vars(functional).items() if value is function), qualified)
    owner, _, short = qualified.rpartition(".")
    if owner in _TENSOR:
        return f"torch.Tensor.{short}"
    if owner.startswith("_VariableFunctions"):
        return f"torch.{short}"
    module = str(getattr(function, "__module__", None) or "torch")
    return f"{module.replace('torch._C._nn', 'torch.nn.functional')}.{qualified}"
