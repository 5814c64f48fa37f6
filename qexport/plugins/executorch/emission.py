"""From steps to a `.pte`: each method exported by torch, segments handed to XNNPACK, weights stored once for all."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from executorch.exir import (
    EdgeCompileConfig,
    ExecutorchBackendConfig,
    ExecutorchProgramManager,
    to_edge_transform_and_lower,
)
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.traceback import preserve_node_meta

from qexport.errors import ExportError
from qexport.plugins.executorch.delegate import SegmentPartitioner, describe
from qexport.plugins.executorch.program_file import ProgramFile, Subgraph
from qexport.plugins.executorch.segments import Segment, schedule
from qexport.plugins.executorch.steps import DTYPES, Constant, Kernel, Steps, Value, replaced
from qexport.plugins.executorch.steps import Node as SegmentNode
from qexport.runtimes.executorch_table import FORWARD, TABLE, ProgramTable, TableCall, TableMethod, TableNode
from qexport.versions import package_versions

_MARK = "qexport"


@dataclass(frozen=True, slots=True)
class Method:
    """One entry of a program."""

    steps: Steps
    outputs: Mapping[str, Value]
    """By name, in order."""


@dataclass(frozen=True, slots=True)
class Written:
    """A program."""

    data: bytes
    table: ProgramTable
    handles: Mapping[int, int]
    """By the identity of a node of `forward`: the number by which it is found in the file."""


def write_program(methods: Mapping[str, Method]) -> Written:
    """Write methods into one program, with the table that says for what each instruction was written.

    Raises:
        ExportError: ExecuTorch did not write what it was told.
    """
    scheduled = {name: schedule(method.steps, method.outputs.values()) for name, method in methods.items()}
    numbered = _number(scheduled)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch's and ExecuTorch's own future
        programs = {
            name: _exported(_GraphOf(method, numbered[name].handles).write(scheduled[name]), method)
            for name, method in methods.items()
        }
        edge = to_edge_transform_and_lower(
            programs,
            partitioner={name: [SegmentPartitioner()] for name in methods},
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        )
        configuration = ExecutorchBackendConfig()
        made = edge.to_executorch(configuration)
        graphs = {name: made.exported_program(name) for name in methods}
        table = make_table(bytes(made.buffer), methods, graphs[FORWARD].graph_module, numbered[FORWARD])
        # What each instruction was written for is known when they are written: once more, with that.
        texts = {TABLE: msgspec.json.encode(table).decode()}
        whole = ExecutorchProgramManager(graphs, texts, configuration, made._named_data)
    data = bytes(whole.buffer)
    if make_table(data, methods, graphs[FORWARD].graph_module, numbered[FORWARD]) != table:
        raise ExportError("ExecuTorch wrote other instructions when it wrote the same program again.")
    return Written(data, table, numbered[FORWARD].handles)


def make_table(
    data: bytes, methods: Mapping[str, Method], graph: GraphModule, numbered: _Numbered
) -> ProgramTable:
    """Return what a program says of itself, from its own instructions.

    Raises:
        ExportError: an instruction is not the one that its operator was written as.
    """
    sites: dict[str, int] = {}
    calls = []
    kernels = _sites_of_kernels(graph)
    branch = ""
    for call in ProgramFile(data).calls(FORWARD):
        nodes: tuple[TableNode, ...] = ()
        if call.subgraph is not None:
            asked = numbered.nodes(call.subgraph)
            site = asked[0].site
            nodes = tuple(
                TableNode(node.kind, sites.setdefault(node.site, len(sites)), _is_clamped(node))
                for node in asked
            )
        else:
            operator, site = kernels.get(call.instruction, (call.operator, branch))
            if operator != call.operator:
                raise ExportError(
                    f"instruction {call.instruction} is {call.operator}, written was {operator}"
                )
            branch = site  # instructions of a branch have no operator of their own
        calls.append(TableCall(call.instruction, call.operator, sites.setdefault(site, len(sites)), nodes))
    return ProgramTable(
        executorch=package_versions("executorch")["executorch"],
        sites=tuple(sites),
        methods={
            name: TableMethod(tuple(method.steps.names), tuple(method.outputs))
            for name, method in methods.items()
        },
        calls=tuple(calls),
    )


def _sites_of_kernels(graph: GraphModule) -> dict[int, tuple[str, str]]:
    """Return operator and site of each kernel, by the number of its instruction."""
    found = {}
    for node in graph.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or "debug_handle" not in node.meta:
            continue
        name = f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name
        found[node.meta["debug_handle"]] = (name, node.meta.get("custom", {}).get(_MARK, ""))
    return found


def _is_clamped(node: SegmentNode) -> bool:
    """Tell whether XNNPACK clamps a node's result in a step of its own; weighted kernels clamp themselves."""
    return "limits" in node.attributes and node.kind not in ("convolution", "linear", "clamp")


@dataclass(frozen=True, slots=True)
class _Numbered:
    """Of one method: a number for every node of every segment, and the segments by their first node's."""

    handles: Mapping[int, int]
    """By the node's identity."""
    segments: Mapping[int, Segment]

    def nodes(self, subgraph: Subgraph) -> list[SegmentNode]:
        """Return what the nodes of a subgraph were asked as, which it has to hold one for one and in order."""
        handles = [node.handle for node in subgraph.nodes]
        asked = self.segments[handles[0]].nodes
        if handles != list(range(handles[0], handles[0] + len(asked))):
            raise ExportError(f"a subgraph holds {len(handles)} nodes, {len(asked)} were asked for")
        return asked


def _number(scheduled: Mapping[str, Sequence[Segment | Kernel]]) -> dict[str, _Numbered]:
    """Number every node of every method; no two share a number."""
    numbered, count = {}, 0
    for name, steps in scheduled.items():
        handles: dict[int, int] = {}
        segments: dict[int, Segment] = {}
        for segment in steps:
            if isinstance(segment, Segment):
                segments[count] = segment
                handles.update({id(node): count + place for place, node in enumerate(segment.nodes)})
                count += len(segment.nodes)
        numbered[name] = _Numbered(handles, segments)
    return numbered


def _exported(graph: GraphModule, method: Method) -> ExportedProgram:
    examples = tuple(torch.zeros(value.shape, dtype=DTYPES[value.dtype]) for value in method.steps.inputs)
    with preserve_node_meta():
        program = torch.export.export(_Traced(graph), examples, strict=False)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            custom = node.meta.get("custom", {})
            # What torch notes beside it at a branch, its next pass finds contradictory.
            node.meta["custom"] = {_MARK: custom[_MARK]} if _MARK in custom else {}
    return program


class _Traced(nn.Module):
    """Runs a graph node by node, so that what is noted on its nodes goes with them through torch.export."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__()
        self.traced = graph

    def forward(self, *inputs: Tensor) -> Any:
        return Interpreter(self.traced).run(*inputs)


class _GraphOf:
    """Writes the graph of a method that torch.export is to trace."""

    def __init__(self, method: Method, handles: Mapping[int, int]) -> None:
        self._root, self._graph = nn.Module(), torch.fx.Graph()
        self._method, self._handles = method, handles
        self._nodes: dict[tuple[int, int], Node] = {}
        self._calls: dict[Kernel, Node] = {}
        self._stored: dict[tuple[Constant, Segment | None], Node] = {}
        self._registered: set[Constant] = set()

    def write(self, scheduled: Sequence[Segment | Kernel]) -> GraphModule:
        for number, value in enumerate(self._method.steps.inputs):
            self._nodes[_identity(value)] = self._graph.placeholder(f"input_{number}")
        for step in scheduled:
            if isinstance(step, Segment):
                self._segment(step)
            else:
                call = self._graph.call_function(step.compute, tuple(replaced(step.arguments, self._find)))
                call.meta["custom"] = {_MARK: step.site}
                self._calls[step] = call
        self._graph.output(tuple(self._find(value) for value in self._method.outputs.values()))
        return GraphModule(self._root, self._graph)

    def _segment(self, segment: Segment) -> None:
        given = [self._find(value) for value in segment.inputs]
        held = [self._constant(value.maker, segment) for value in segment.constants]
        program = describe(segment, self._handles)
        call = self._graph.call_function(torch.ops.qexport.xnnpack_segment.default, (given, held, program))
        for place, value in enumerate(segment.outputs):
            self._nodes[_identity(value)] = self._graph.call_function(operator.getitem, (call, place))

    def _find(self, value: Value) -> Node:
        maker = value.maker
        if isinstance(maker, Constant):
            return self._constant(maker, None)
        if isinstance(maker, Kernel) and not maker.several:
            return self._calls[maker]
        identity = _identity(value)
        if identity not in self._nodes:
            assert isinstance(maker, Kernel)
            call = self._calls[maker]
            self._nodes[identity] = self._graph.call_function(operator.getitem, (call, value.place))
        return self._nodes[identity]

    def _constant(self, maker: object, owner: Segment | None) -> Node:
        """Return a constant; each segment has its own, which ExecuTorch asks for: their data is stored once."""
        assert isinstance(maker, Constant)
        if (maker, owner) not in self._stored:
            name = f"constant_{len(self._stored)}"
            # torch.export knows one tensor under one name, whatever it was registered as.
            tensor = maker.tensor.clone() if maker in self._registered else maker.tensor
            self._root.register_buffer(name, tensor)
            self._registered.add(maker)
            self._stored[maker, owner] = self._graph.get_attr(name)
        return self._stored[maker, owner]


def _identity(value: Value) -> tuple[int, int]:
    """Return what stands for a value: its maker and its place among the maker's results."""
    return id(value.maker), value.place
