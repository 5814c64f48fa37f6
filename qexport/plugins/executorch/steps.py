"""What is to be computed, before it is written: steps of XNNPACK and of ExecuTorch's own kernels, and their values.

XNNPACK runs what it is given as a subgraph, a segment here. A step belongs to the first segment that it can: that of
the steps it reads, or a later one where ExecuTorch's kernels stand between. So a segment never waits for itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "bool": torch.bool,
    "float32": torch.float32,
    "int64": torch.int64,
    "int8": torch.int8,
    "uint8": torch.uint8,
}


@dataclass(frozen=True, slots=True)
class Region:
    """Steps that are one segment: XNNPACK runs them in one call."""

    stage: int
    """How often ExecuTorch's own kernels and XNNPACK have taken turns before."""
    part: str = ""
    """Steps that are kept apart, as a few proposals at a time are."""


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """A tensor: what a step computes, a constant, or an input."""

    shape: tuple[int, ...]
    dtype: str
    maker: Step
    scale: float | None = None
    """Of int8 and uint8 codes, whose zero point is 0."""
    place: int = 0
    """Which of its maker's results."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Input:
    """What is handed to the program."""

    name: str
    stage: int = -1


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """What is stored in it."""

    tensor: Tensor
    stage: int = -1


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """A call of an operator that ExecuTorch has a kernel for."""

    compute: Callable[..., Any]
    arguments: tuple[Any, ...]
    """Values, lists of them, and whatever else the operator takes."""
    stage: int
    site: str
    """Module path that it belongs to, with the call: `rpn.head.conv.0.0@1`."""
    several: bool
    """Whether it returns several tensors."""


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """A node of an XNNPACK subgraph."""

    kind: str
    inputs: tuple[Value, ...]
    attributes: Mapping[str, Any]
    region: Region
    site: str

    @property
    def stage(self) -> int:
        """That of its region."""
        return self.region.stage


Step = Input | Constant | Kernel | Node


@dataclass(slots=True)
class Steps:
    """All that is to be computed, each after what it reads."""

    order: list[Kernel | Node] = field(default_factory=list)
    inputs: list[Value] = field(default_factory=list)
    site: str = ""
    """Module that is being written, with its call."""
    part: str = ""
    """Given to the regions of what is written."""

    @property
    def names(self) -> list[str]:
        """Names of the inputs, in order."""
        return [value.maker.name for value in self.inputs if isinstance(value.maker, Input)]

    def input(self, name: str, shape: Sequence[int], dtype: str, scale: float | None = None) -> Value:
        """Return a new input."""
        value = Value(tuple(shape), dtype, Input(name), scale)
        self.inputs.append(value)
        return value

    def constant(self, tensor: Tensor) -> Value:
        """Return a constant."""
        held = tensor.detach().clone(memory_format=torch.contiguous_format)
        return Value(tuple(held.shape), dtype_of(held), Constant(held))

    def kernel(
        self, compute: Callable[..., Any], *arguments: Any, scale: float | None = None
    ) -> tuple[Value, ...]:
        """Write a call of one of ExecuTorch's kernels; return its results, of which int8 codes have that scale."""
        stage = max((value.maker.stage for value in values_in(arguments)), default=-1)
        results = compute(*(_on_meta(argument) for argument in arguments))
        several = isinstance(results, (tuple, list))
        step = Kernel(compute, arguments, stage, self.site, several)
        self.order.append(step)
        return tuple(
            Value(tuple(one.shape), dtype_of(one), step, scale if _is_code(one) else None, place)
            for place, one in enumerate(results if several else (results,))
        )

    def node(
        self,
        kind: str,
        inputs: Sequence[Value],
        shape: Sequence[int],
        *,
        scale: float | None = None,
        **attributes: Any,
    ) -> Value:
        """Write a node of XNNPACK; its result is of int8 codes where it has a scale, else float32."""
        stage = max([0, *(self._stage_after(value) for value in inputs)])
        step = Node(kind, tuple(inputs), attributes, Region(stage, self.part), self.site)
        self.order.append(step)
        return Value(tuple(shape), "float32" if scale is None else "int8", step, scale)

    def _stage_after(self, value: Value) -> int:
        maker = value.maker
        if isinstance(maker, Node) and maker.region.part == self.part:
            return maker.stage
        return maker.stage + 1


def dtype_of(tensor: Tensor) -> str:
    """Return `int8`."""
    return str(tensor.dtype).removeprefix("torch.")


def _is_code(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.int8, torch.uint8)


def values_in(argument: object) -> list[Value]:
    """Return the values among arguments, those in lists too."""
    if isinstance(argument, Value):
        return [argument]
    if isinstance(argument, (list, tuple)):
        return [value for item in argument for value in values_in(item)]
    return []


def replaced(argument: Any, found: Callable[[Value], Any]) -> Any:
    """Return arguments with each value replaced."""
    if isinstance(argument, Value):
        return found(argument)
    if isinstance(argument, (list, tuple)):
        return type(argument)(replaced(item, found) for item in argument)
    return argument


def _on_meta(argument: Any) -> Any:
    def empty(value: Value) -> Tensor:
        return torch.empty(value.shape, dtype=DTYPES[value.dtype], device="meta")

    return replaced(argument, empty)
