"""Operators as small modules, in one graph for a table of them: what every target's lowering is tested on.

The graph's input is one flat vector, cut into the tensors that a module takes outside of the quantized stages. Input
values lie on the grid of their scale, so that quantizing them is exact and what differs is the operator's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from plain_artifact import plain_input
from torch import Tensor, nn
from torch.fx import GraphModule

from qexport.calibration.calibrator import calibrate
from qexport.quantization.graph import export_graph
from qexport.quantization.reference import QuantizedDetector, quantize

Array = NDArray[Any]
SPEC = plain_input(8, 8, "outside")


@dataclass(frozen=True, slots=True)
class Case:
    """An operator, and what it is given."""

    body: nn.Module
    """Takes one tensor for each shape."""
    shapes: tuple[tuple[int, ...], ...]
    scales: tuple[float, ...]
    """Of the values, which are int8 codes times these."""
    kernels: tuple[str, ...]
    """The runtime's operators that compute it, where a test asks for them."""

    def values(self) -> Tensor:
        """Return everything that it is given, flat."""
        return torch.cat(
            [_codes(*each) for each in zip(self.shapes, self.scales, range(len(self.shapes)), strict=True)]
        )


def case(
    body: nn.Module | Callable[..., Any],
    *shapes: tuple[int, ...],
    kernels: Sequence[str] = (),
    scales: Sequence[float] | None = None,
) -> Case:
    """Return a case with repeatable weights."""
    module = body if isinstance(body, nn.Module) else Call(body)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            fan = max(1, parameter[0].numel())
            parameter.copy_(torch.randn(parameter.shape, generator=random) / fan**0.5)
    return Case(module.eval(), shapes, tuple(scales or [1 / 32] * len(shapes)), tuple(kernels))


def _codes(shape: tuple[int, ...], scale: float, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, shape, generator=random).flatten()
    codes[0] = 127  # so that calibration finds this very scale
    return codes * scale


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        """Call it."""
        return self.function(*tensors)


class Cases(nn.Module):
    """Stands where a static detector does: each case is a module of its trunk, `backbone.NUMBER`, in one graph.

    One graph for a table, since making one takes as long as many operators do.
    """

    def __init__(self, cases: Sequence[Case]) -> None:
        super().__init__()
        self.spec = SPEC
        self.cases = tuple(cases)
        self.backbone = nn.ModuleList(each.body for each in cases)
        self.requires_grad_(False).eval()

    def example_input(self) -> Tensor:
        return torch.cat([each.values() for each in self.cases])

    def forward(self, flat: Tensor) -> tuple[Any, ...]:
        """Run each on its parts of a vector."""
        results, start = [], 0
        for each, body in zip(self.cases, self.backbone, strict=True):
            parts = []
            for shape in each.shapes:
                stop = start + math.prod(shape)
                parts.append(flat[start:stop].view(shape))
                start = stop
            results.append(body(*parts))
        return tuple(results)


def quantized(module: Cases, *, keep_float: tuple[str, ...] = ()) -> QuantizedDetector:
    """Return them with encodings of their own example."""
    static: Any = module
    encodings = calibrate(static, [module.example_input().numpy()], keep_float=keep_float)
    return quantize(static, encodings)


def graph_of(module: nn.Module) -> GraphModule:
    """Return its graph in float."""
    static: Any = module
    return export_graph(static)


def run_torch(graph: nn.Module, given: Tensor) -> list[Array]:
    """Return a graph's outputs."""
    with torch.no_grad():
        results = graph(given)
    return [each.numpy() for each in (results if isinstance(results, (tuple, list)) else [results])]
