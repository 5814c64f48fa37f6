"""Small modules taken down the exporter's own road: calibrated, quantized, lowered, and run by ExecuTorch."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from graph_cases import Array, Case, Cases, quantized, run_torch
from torch.fx import GraphModule

pytest.importorskip("executorch.version", reason="executorch is not installed (the extra executorch)")

from qexport.plugins.executorch.emission import Method, Written, write_program
from qexport.plugins.executorch.held import as_plain
from qexport.plugins.executorch.lowering import Lowering
from qexport.plugins.executorch.operators import operators
from qexport.plugins.executorch.program_file import ProgramFile
from qexport.quantization.graph import scale_of
from qexport.runtimes.executorch_library import call, load_method, open_program, release
from qexport.runtimes.executorch_table import FORWARD


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
