"""Small modules taken down the exporter's own road: calibrated, quantized, lowered, and run by LiteRT's interpreter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from graph_cases import Array, Case, Cases, quantized, run_torch
from torch.fx import GraphModule

pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed (the extra tflite)")

from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from qexport.plugins.tflite.held import as_plain
from qexport.plugins.tflite.lowering import Lowering
from qexport.plugins.tflite.operators import operators
from qexport.plugins.tflite.readback import ReadModel
from qexport.quantization.graph import scale_of

KERNELS = {"XNNPACK": OpResolverType.AUTO, "builtin": OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES}


@dataclass(frozen=True, slots=True)
class Written:
    """A graph as a `.tflite`."""

    data: bytes
    lowering: Lowering

    def run(self, given: Array, kernels: str = "XNNPACK") -> list[Array]:
        """Return the outputs."""
        return run_file(self.data, given, kernels)

    def model(self) -> Any:
        """Return the model as the schema has it."""
        return schema.ModelT.InitFromPackedBuf(self.data, 0)

    def read(self, folder: Path) -> ReadModel:
        """Return tensors and operators, as the exporter reads them back."""
        path = folder / "written.tflite"
        path.write_bytes(self.data)
        return ReadModel(path)


def write(
    graph: GraphModule,
    *,
    half: bool = False,
    portable_nms: bool = False,
    names: Mapping[str, Any] | None = None,
) -> Written:
    """Lower a graph as the exporter does.

    Args:
        graph: quantized, or in float.
        half: whether float weights are stored as float16.
        portable_nms: the form of suppression.
        names: quantize nodes, by the name that their codes get.
    """
    lowering = Lowering(graph, operators(portable_nms=portable_nms), half=half)
    source = lowering.input(next(node for node in graph.graph.nodes if node.op == "placeholder"))
    for name, node in (names or {}).items():
        lowering.writer.rename(lowering.codes(node).value, name)
    results: Any = next(node for node in graph.graph.nodes if node.op == "output").args[0]
    outputs = []
    for place, node in enumerate(results):
        value = as_plain(lowering.build, lowering.real(node))
        lowering.writer.rename(value, f"result_{place}")
        outputs.append(value)
    return Written(lowering.writer.finish([source.value], outputs, description="test"), lowering)


def run_file(data: bytes, given: Array, kernels: str = "XNNPACK") -> list[Array]:
    """Return a file's outputs in one thread."""
    interpreter = Interpreter(
        model_content=data, num_threads=1, experimental_op_resolver_type=KERNELS[kernels]
    )
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], given)
    interpreter.invoke()
    return [interpreter.get_tensor(detail["index"]) for detail in interpreter.get_output_details()]


_MOVES = {"QUANTIZE", "DEQUANTIZE", "RESHAPE", "TRANSPOSE"}


@dataclass(frozen=True, slots=True)
class Run:
    """A table of cases, quantized, in torch and in LiteRT; each by name."""

    wanted: dict[str, Array]
    found: dict[str, dict[str, Array]]
    """By kernel set."""
    steps: dict[str, float]
    """Scale of each result."""
    paths: dict[str, str]
    model: ReadModel

    def kernels(self, name: str) -> dict[str, bool]:
        """Return the operators of a case that compute, and whether all of a kind read and write int8."""
        path, found = self.paths[name], dict[str, bool]()
        for one in self.model.operators:
            if self.model.names[one.inputs[0]] == "flat":
                continue  # cuts the case's own values out of all values
            if f"{one.place}.".startswith(f"{path}.") and one.code not in _MOVES:
                integer = self.model.is_int8(one.inputs[0]) and self.model.is_int8(one.outputs[0])
                found[one.code] = integer and found.get(one.code, True)
        return found


def run_cases(cases: Mapping[str, Case], folder: Path) -> Run:
    """Quantize and run a table of cases in one graph."""
    module = Cases(list(cases.values()))
    made, given = quantized(module), module.example_input()
    written = write(made.graph)
    results: Any = next(node for node in made.graph.graph.nodes if node.op == "output").args[0]
    return Run(
        wanted=dict(zip(cases, run_torch(made.graph, given), strict=True)),
        found={
            kernels: dict(zip(cases, written.run(given.numpy(), kernels), strict=True)) for kernels in KERNELS
        },
        steps=dict(zip(cases, map(scale_of, results), strict=True)),
        paths={name: f"backbone.{number}" for number, name in enumerate(cases)},
        model=written.read(folder),
    )
