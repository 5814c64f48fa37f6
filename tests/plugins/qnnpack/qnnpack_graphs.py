"""Small modules taken down the exporter's own road: calibrated, quantized, lowered, written, loaded and run.

The graph's input is one flat vector, cut into the tensors that a module takes outside of the quantized stages. Input
values lie on the grid of their scale, so that quantizing them is exact and what differs is the operator's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qexport.artifact import InputSpec, LayerDecision
from qexport.calibration.calibrator import calibrate
from qexport.encodings import Encodings
from qexport.plugins.qnnpack.file import write_torchscript
from qexport.plugins.qnnpack.lowering import Lowering
from qexport.plugins.qnnpack.readback import ReadFile, read_back
from qexport.quantization.reference import QuantizedDetector, quantize

SCALE = 1 / 32
SPEC = InputSpec(
    frame_height_px=8,
    frame_width_px=8,
    preprocess="outside",
    resized_height_px=8,
    resized_width_px=8,
    padded_height_px=8,
    padded_width_px=8,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
)


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


@dataclass(frozen=True, slots=True)
class Case:
    """An operator, and the shapes and scales of what it is given."""

    body: nn.Module
    shapes: tuple[tuple[int, ...], ...]
    scales: tuple[float, ...]


def case(
    body: nn.Module | Callable[..., Any], *shapes: tuple[int, ...], scales: Sequence[float] = ()
) -> Case:
    """Return a case with repeatable weights."""
    module = body if isinstance(body, nn.Module) else Call(body)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            fan = max(1, parameter[0].numel())
            parameter.copy_(torch.randn(parameter.shape, generator=random) / fan**0.5)
    return Case(module.eval(), shapes, tuple(scales) or (SCALE,) * len(shapes))


class Cases(nn.Module):
    """Stands where a static detector does: each case is a module of its trunk, `backbone.NUMBER`, in one graph."""

    def __init__(self, cases: Sequence[Case]) -> None:
        super().__init__()
        self.spec, self.cases = SPEC, tuple(cases)
        self.backbone = nn.ModuleList(each.body for each in cases)
        self.requires_grad_(False).eval()

    def example_input(self) -> Tensor:
        parts = []
        for each in self.cases:
            for number, (shape, scale) in enumerate(zip(each.shapes, each.scales, strict=True)):
                random = torch.Generator().manual_seed(number)
                codes = torch.randint(-127, 128, shape, generator=random).flatten()
                codes[0] = 127  # so that calibration finds this very scale
                parts.append(codes * scale)
        return torch.cat(parts)

    def forward(self, flat: Tensor) -> tuple[Any, ...]:
        results, start = [], 0
        for each, body in zip(self.cases, self.backbone, strict=True):
            parts = []
            for shape in each.shapes:
                stop = start + math.prod(shape)
                parts.append(flat[start:stop].view(shape))
                start = stop
            results.append(body(*parts))
        return tuple(results)


@dataclass(frozen=True, slots=True)
class Lowered:
    """Cases as a file, read back, and what the reference makes of them."""

    encodings: Encodings
    quantized: QuantizedDetector
    names: dict[str, str]
    file: ReadFile
    layers: tuple[LayerDecision, ...]
    wanted: tuple[Tensor, ...]

    @property
    def results(self) -> list[Tensor]:
        """What the file gives."""
        return [self.file.tensors[name] for name in self.file.program.results]


def lower(cases: Sequence[Case], path: Path, *, keep_float: tuple[str, ...] = ()) -> Lowered:
    """Quantize cases in one graph, write them and read them back as the exporter does."""
    module: Any = Cases(cases)
    given = module.example_input()
    encodings = calibrate(module, [given.numpy()], keep_float=keep_float)
    made = quantize(module, encodings)
    parts, names = Lowering(made.graph, made.quantize_nodes).write()
    write_torchscript(parts, given, path)
    file = ReadFile(path, given, frozenset(names.values()))
    layers = read_back(file, made.graph, made.quantize_nodes, names, encodings)
    with torch.no_grad():
        wanted = made.graph(given)
    return Lowered(encodings, made, names, file, layers, tuple(wanted))
