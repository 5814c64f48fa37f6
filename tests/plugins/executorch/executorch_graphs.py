"""Small modules taken down the exporter's own road: calibrated, quantized, lowered, and run by ExecuTorch.

The graph's input is one flat vector, cut into the tensors that a module takes outside of the quantized stages. Input
values lie on the grid of their scale, so that quantizing them is exact and what differs is the operator's own.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx import GraphModule

pytest.importorskip("executorch.version", reason="executorch is not installed (the extra executorch)")

from qexport.artifact import InputSpec
from qexport.calibration.calibrator import calibrate
from qexport.plugins.executorch.emission import Method, Written, write_program
from qexport.plugins.executorch.held import as_plain
from qexport.plugins.executorch.lowering import Lowering
from qexport.plugins.executorch.operators import operators
from qexport.plugins.executorch.program_file import ProgramFile
from qexport.quantization.graph import export_graph, scale_of
from qexport.quantization.reference import QuantizedDetector, quantize
from qexport.runtimes.executorch_library import call, load_method, open_program, release
from qexport.runtimes.executorch_table import FORWARD

Array = NDArray[Any]
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


@dataclass(frozen=True, slots=True)
class Case:
    """An operator, and what it is given."""

    body: nn.Module
    """Takes one tensor for each shape."""
    shapes: tuple[tuple[int, ...], ...]
    scales: tuple[float, ...]
    """Of the values, which are int8 codes times these."""

    def values(self) -> Tensor:
        """Return everything that it is given, flat."""
        return torch.cat(
            [_codes(*each) for each in zip(self.shapes, self.scales, range(len(self.shapes)), strict=True)]
        )


def case(
    body: nn.Module | Callable[..., Any], *shapes: tuple[int, ...], scales: Sequence[float] | None = None
) -> Case:
    """Return a case with repeatable weights."""
    module = body if isinstance(body, nn.Module) else Call(body)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            fan = max(1, parameter[0].numel())
            parameter.copy_(torch.randn(parameter.shape, generator=random) / fan**0.5)
    return Case(module.eval(), shapes, tuple(scales or [1 / 32] * len(shapes)))


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


@dataclass(frozen=True, slots=True)
class Program:
    """A graph as a `.pte`."""

    written: Written
    outputs: tuple[str, ...]

    def run(self, given: Array) -> list[Array]:
        """Return the outputs in one thread."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "program.pte"
            path.write_bytes(self.written.data)
            opened = open_program(path, threads=1)
            try:
                found = call(load_method(opened, FORWARD, path), [given], self.outputs, path)
            finally:
                del opened
                release(1)
        return [found[name] for name in self.outputs]

    def nodes(self) -> list[tuple[str, str, bool]]:
        """Return module path, kind and whether it reads and writes int8, of every node of XNNPACK's."""
        found = []
        table, program = self.written.table, ProgramFile(self.written.data)
        for read, noted in zip(program.calls(FORWARD), table.calls, strict=True):
            if read.subgraph is None:
                continue
            for node, asked in zip(read.subgraph.nodes, noted.nodes, strict=True):
                types = {read.subgraph.values[number].datatype for number in (node.inputs[0], node.output)}
                found.append((table.sites[asked.site], asked.kind, types == {"qint8"}))
        return found

    def kernels(self) -> list[tuple[str, str]]:
        """Return module path and operator of every call of ExecuTorch's own kernels."""
        table = self.written.table
        return [(table.sites[one.site], one.operator) for one in table.calls if one.operator]


def graph_of(module: nn.Module) -> GraphModule:
    """Return its graph in float."""
    static: Any = module
    return export_graph(static)


def write(graph: GraphModule) -> Program:
    """Lower a graph as the exporter does."""
    lowering = Lowering(graph, operators())
    lowering.input(next(node for node in graph.graph.nodes if node.op == "placeholder"))
    results: Any = next(node for node in graph.graph.nodes if node.op == "output").args[0]
    outputs = {
        f"result_{place}": as_plain(lowering.xnnpack, lowering.real(node))
        for place, node in enumerate(results)
    }
    return Program(write_program({FORWARD: Method(lowering.steps, outputs)}), tuple(outputs))


def run_torch(graph: nn.Module, given: Tensor) -> list[Array]:
    """Return a graph's outputs."""
    with torch.no_grad():
        results = graph(given)
    return [each.numpy() for each in (results if isinstance(results, (tuple, list)) else [results])]


@dataclass(frozen=True, slots=True)
class Run:
    """A table of cases, quantized, in torch and in ExecuTorch; each by name."""

    wanted: dict[str, Array]
    found: dict[str, Array]
    steps: dict[str, float]
    """Scale of each result."""
    paths: dict[str, str]
    program: Program


def run_cases(cases: Mapping[str, Case]) -> Run:
    """Quantize and run a table of cases in one graph."""
    module = Cases(list(cases.values()))
    made, given = quantized(module), module.example_input()
    program = write(made.graph)
    results: Any = next(node for node in made.graph.graph.nodes if node.op == "output").args[0]
    return Run(
        wanted=dict(zip(cases, run_torch(made.graph, given), strict=True)),
        found=dict(zip(cases, program.run(given.numpy()), strict=True)),
        steps=dict(zip(cases, map(scale_of, results), strict=True)),
        paths={name: f"backbone.{number}" for number, name in enumerate(cases)},
        program=program,
    )
