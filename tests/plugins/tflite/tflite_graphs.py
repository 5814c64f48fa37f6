"""Small modules taken down the exporter's own road: calibrated, quantized, lowered, and run by LiteRT's interpreter.

The graph's input is one flat vector, cut into the tensors that a module takes outside of the quantized stages. Input
values lie on the grid of their scale, so that quantizing them is exact and what differs is the operator's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx import GraphModule

pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed (the extra tflite)")

from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from qexport.artifact import InputSpec
from qexport.calibration.calibrator import calibrate
from qexport.plugins.tflite.held import as_plain
from qexport.plugins.tflite.lowering import Lowering
from qexport.plugins.tflite.operators import operators
from qexport.plugins.tflite.readback import ReadModel
from qexport.quantization.graph import export_graph, scale_of
from qexport.quantization.reference import QuantizedDetector, quantize

Array = NDArray[Any]
KERNELS = {"XNNPACK": OpResolverType.AUTO, "builtin": OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES}
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
    kernels: tuple[str, ...]
    """TFLite's operators that compute it, leaving out those that only move values about."""

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


def graph_of(module: Cases) -> GraphModule:
    """Return its graph in float."""
    static: Any = module
    return export_graph(static)


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


def run_torch(graph: nn.Module, given: Tensor) -> list[Array]:
    """Return a graph's outputs."""
    with torch.no_grad():
        results = graph(given)
    return [each.numpy() for each in (results if isinstance(results, (tuple, list)) else [results])]


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
