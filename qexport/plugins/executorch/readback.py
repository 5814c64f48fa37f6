"""Read a `.pte` back: every quantized layer in XNNPACK, an integer kernel with our scales and biases."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch.fx import Node

from qexport.artifact import LayerDecision
from qexport.encodings import Encodings, QuantParams
from qexport.errors import ExportError
from qexport.layers import stage_of
from qexport.plugins.executorch.emission import Written
from qexport.plugins.executorch.held import Held
from qexport.plugins.executorch.program_file import XNNPACK, FileNode, FileValue, ProgramFile, Subgraph
from qexport.plugins.executorch.steps import Node as SegmentNode
from qexport.plugins.executorch.steps import Value
from qexport.quantization.graph import IMAGE_KEY, argument_node, base_of, op_name
from qexport.quantization.quantizer import SHAPE_ONLY, UNARY, WEIGHTED
from qexport.runtimes.executorch_table import FORWARD

_WEIGHTED = ("Conv2d", "DepthwiseConv2d", "FullyConnected")
_INSIDE = {"multiscale_roi_align": "int8 rows are gathered, then weighed and averaged in float32"}


@dataclass(frozen=True, slots=True)
class ReadBack:
    """What was found."""

    layers: tuple[LayerDecision, ...]
    subgraphs: int
    delegated_nodes: int
    """Operators that XNNPACK computes."""
    kernels: int
    """Operators that ExecuTorch's own kernels compute."""
    delegated_macs: int
    """Multiply-accumulates of the layers' convolutions and linear layers in XNNPACK."""


@dataclass(frozen=True, slots=True)
class _Found:
    """A node of the file."""

    subgraph: Subgraph
    node: FileNode

    @property
    def output(self) -> FileValue:
        return self.subgraph.values[self.node.output]

    @property
    def sources(self) -> list[FileValue]:
        return [self.subgraph.values[number] for number in self.node.inputs]


def read_back(
    written: Written,
    held: Mapping[str, Held],
    quantize_nodes: Mapping[str, Node],
    encodings: Encodings,
    *,
    name: str,
) -> ReadBack:
    """Compare a program with the encodings, layer by layer.

    Args:
        written: the program.
        held: where each quantized activation was written, by key.
        quantize_nodes: of the reference, by key.
        encodings: that it has to follow.
        name: of the file, for messages.

    Raises:
        ExportError: names every layer that is not in XNNPACK, not int8, or of other scales or biases, or int8 where
            it is to be float.
    """
    reader = _Reader(written, encodings)
    wrong, decisions = [], []
    first: dict[Value, str] = {}
    kept_float = {(row.path, row.call) for row in encodings.float_rows}
    for key, node in quantize_nodes.items():
        wrong += reader.wrong_scale(key, held[key])
        op = op_name(base_of(argument_node(node)))
        if key == IMAGE_KEY or op in SHAPE_ONLY or _site(key) in kept_float:
            continue
        decision = reader.decide(key, op, held[key], first.setdefault(held[key].value, key))
        decisions.append(decision)
        if not decision.integer and not decision.reason:
            wrong.append(f"{key}: {', '.join(decision.kernels)} is no integer kernel of XNNPACK")
    wrong += reader.wrong_weights(held)
    wrong += reader.seized()
    if wrong:
        lines = [f"{name}: not what the encodings say:", *(f"  {line}" for line in wrong)]
        raise ExportError(
            "\n".join([*lines, "Report the model's structure; --keep-float PATH leaves a layer out."])
        )
    return reader.result(tuple(decisions))


class _Reader:
    def __init__(self, written: Written, encodings: Encodings) -> None:
        self._written, self._encodings = written, encodings
        self._rows = {row.key: row.params for row in encodings.rows}
        program = ProgramFile(written.data)
        if program.backends() - {XNNPACK}:
            raise ExportError(f"parts are handed to {sorted(program.backends())}, expected {XNNPACK} alone.")
        self._calls = program.calls(FORWARD)
        self._nodes = {
            node.handle: _Found(call.subgraph, node)
            for call in self._calls
            if call.subgraph is not None
            for node in call.subgraph.nodes
        }
        self._found_at = {
            call.instruction: [self._nodes[node.handle] for node in call.subgraph.nodes]
            for call in self._calls
            if call.subgraph is not None
        }
        table = written.table
        self._operators: dict[str, set[str]] = {}
        for call in table.calls:
            if call.operator:
                self._operators.setdefault(table.sites[call.site], set()).add(call.operator)
            for node in call.nodes:
                self._operators.setdefault(table.sites[node.site], set()).add(node.kind)

    def _find(self, held: Held) -> _Found | None:
        handle = self._written.handles.get(id(held.value.maker))
        return None if handle is None else self._nodes[handle]

    def wrong_scale(self, key: str, held: Held) -> list[str]:
        """Return what is wrong with the scale of an activation that the program computes."""
        found, expected = self._find(held), float(np.float32(self._rows[key].scale[0]))
        if found is None:
            return []  # nothing reads it, or ExecuTorch's kernels moved it
        value = found.output
        if value.datatype == "qint8" and value.scale == (expected,) and value.zero_point == 0:
            return []
        return [
            f"{key}: {value.datatype} of scale {value.scale}, the encodings say int8 of {expected}, zero point 0"
        ]

    def decide(self, key: str, op: str, held: Held, first: str) -> LayerDecision:
        """Return how a layer is computed.

        Args:
            key: of what it computes.
            op: the operator.
            held: where that is.
            first: the first key of the same tensor: another one where the layer changes nothing.
        """
        path, call = _site(key)
        if first != key:
            return LayerDecision(path=path, call=call, op=op, kernels=(f"none: {first}",), integer=True)
        place = key.replace("@0/", "/").partition("/")[0]
        if op in _INSIDE:
            return LayerDecision(
                path=path, call=call, op=op, kernels=tuple(sorted(self._operators.get(place, ()))), integer=False,
                reason=_INSIDE[op],
            )  # fmt: skip
        found = self._find(held)
        if found is None:
            # Computed by ExecuTorch's own kernel, or by nobody: what is not needed is not written.
            outside = not isinstance(held.value.maker, SegmentNode)
            kernel = "ExecuTorch's own kernel" if outside else "not computed"
            reason = "" if outside else "nothing reads it"
            return LayerDecision(path=path, call=call, op=op, kernels=(kernel,), integer=False, reason=reason)
        reads = all(value.datatype == "qint8" for value in found.sources[: 2 if op not in WEIGHTED else 1])
        integer = reads and found.output.datatype == "qint8" and found.node.kind != "Convert"
        reason = f"computed in float32 between int8 tensors: {op}" if not integer and op in UNARY else ""
        return LayerDecision(
            path=path, call=call, op=op, kernels=(found.node.kind,), integer=integer, reason=reason
        )

    def wrong_weights(self, held: Mapping[str, Held]) -> list[str]:
        """Return what is wrong with weights and biases of integer layers."""
        weights = {
            key.removesuffix("/weight"): row for key, row in self._rows.items() if key.endswith("/weight")
        }
        keys: dict[int, str] = {}
        for key, one in held.items():
            keys.setdefault(id(one.value.maker), key)
        wrong = []
        for identity, handle in self._written.handles.items():
            found = self._nodes[handle]
            if found.node.kind not in _WEIGHTED or found.sources[0].datatype != "qint8":
                continue
            key = keys.get(identity, "")
            wrong += _wrong_weight(found, key, weights.get(f"{_site(key)[0]}@0"))
        return wrong

    def seized(self) -> list[str]:
        """Return layers that the encodings keep in float and that compute in integers."""
        kept = {(row.path, row.call) for row in self._encodings.float_rows if row.op in WEIGHTED}
        table, wrong = self._written.table, []
        for written in table.calls:
            for number, node in enumerate(written.nodes):
                found = self._found_at[written.instruction][number]
                site = table.sites[node.site]
                reads = found.sources[0].datatype
                if found.node.kind in _WEIGHTED and _site(site) in kept and reads != "fp32":
                    wrong.append(f"{site}: was kept in float, {found.node.kind} reads {reads}")
        return wrong

    def result(self, layers: tuple[LayerDecision, ...]) -> ReadBack:
        """Return the whole, counted."""
        subgraphs = [call.subgraph for call in self._calls if call.subgraph is not None]
        macs = 0
        for written in self._written.table.calls:
            for number, node in enumerate(written.nodes):
                if stage_of(_site(self._written.table.sites[node.site])[0]) != "preprocess":
                    macs += _macs(self._found_at[written.instruction][number])
        return ReadBack(
            layers=layers,
            subgraphs=len(subgraphs),
            delegated_nodes=len(self._nodes),
            kernels=len(self._calls) - len(subgraphs),
            delegated_macs=macs,
        )


def _wrong_weight(found: _Found, key: str, row: QuantParams | None) -> list[str]:
    source, weight, bias = found.sources
    expected = tuple(float(np.float32(scale)) for scale in row.scale) if row is not None else ()
    if weight.datatype != "qcint8" or weight.scale != expected:
        return [
            f"{key}: weight of type {weight.datatype} and {len(weight.scale)} scales that are not the encodings'"
        ]
    steps = np.float32(source.scale[0]) * np.asarray(weight.scale, np.float32)
    if bias.datatype != "qcint32" or not np.array_equal(np.asarray(bias.scale, np.float32), steps):
        return [f"{key}: bias that is not int32 in steps of its input's scale times its weight's"]
    return []


def _macs(found: _Found) -> int:
    """Return the multiply-accumulates of a convolution or a linear layer."""
    if found.node.kind not in _WEIGHTED:
        return 0
    weight, result = found.sources[1], found.output
    each = math.prod(weight.shape[1:3] if found.node.kind == "DepthwiseConv2d" else weight.shape[1:])
    return math.prod(result.shape) * each


def _site(key: str) -> tuple[str, int]:
    path, _, call = key.partition("/")[0].partition("@")
    return path, int(call or 0)
