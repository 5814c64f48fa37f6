"""A `.pte` read back: what its methods call, and what lies in the subgraphs that XNNPACK gets."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import executorch.backends.xnnpack.serialization as xnnpack_serialization
import numpy as np
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
from executorch.exir._serialize._flatbuffer import _flatc_decompile
from executorch.exir._serialize._program import deserialize_pte_binary
from executorch.exir.schema import DelegateCall, KernelCall
from flatbuffers import encode, number_types
from flatbuffers.table import Table
from numpy.typing import NDArray

XNNPACK = "XnnpackBackend"
_NONE = 2**32 - 1
"""Number of a value that is not there."""
# Places in XNNPACK's schema: a table's first field, XNNGraph.xvalues, and members of unions.
_FIRST, _XVALUES, _OFFSET_BYTES = 4, 8, 4
_QUANTIZED_VALUE, _PER_TENSOR = 2, 2
_NOT_A_NUMBER = re.compile(rb":\s*(-?)inf")


@dataclass(frozen=True, slots=True)
class FileValue:
    """A tensor of a subgraph."""

    datatype: str
    """`qint8`, `fp32`, `qcint8` (a scale for each channel), `qcint32`."""
    shape: tuple[int, ...]
    scale: tuple[float, ...]
    """None for real values."""
    zero_point: int
    buffer: int
    """Of its data; 0 for none."""


@dataclass(frozen=True, slots=True)
class FileNode:
    """A node of a subgraph."""

    kind: str
    """`Conv2d`, as XNNPACK's schema has it."""
    handle: int
    inputs: tuple[int, ...]
    """Numbers of values; of a weighted node input, weight and bias."""
    output: int


class Subgraph:
    """What XNNPACK gets in one call."""

    def __init__(self, described: Mapping[str, Any], buffers: Mapping[str, bytes]) -> None:
        self._described, self._buffers = described, buffers
        self.values = {
            int(one["id_out"]): value
            for one, value in (self._value(each["xvalue_union"]) for each in described["xvalues"])
        }
        self.nodes = tuple(_node(one) for one in described["xnodes"])

    def data(self, buffer: int, dtype: Any) -> NDArray[Any]:
        """Return the data of a value."""
        key = self._described["constant_data"][buffer]["named_key"]
        return np.frombuffer(self._buffers[key], dtype)

    def _value(self, union: Mapping[str, Any]) -> tuple[Mapping[str, Any], FileValue]:
        tensor = union.get("tensor_value", union)
        quantized = union.get("quant_params", {})
        scale: tuple[float, ...] = ()
        if "num_scales" in quantized:
            scale = tuple(map(float, self.data(int(quantized["scale_buffer_idx"]), np.float32)))
        elif quantized:
            scale = (float(np.float32(quantized["scale"])),)
        return tensor, FileValue(
            datatype=str(tensor["datatype"]).removeprefix("xnn_datatype_"),
            shape=tuple(tensor.get("dims", ())),
            scale=scale,
            zero_point=int(quantized.get("zero_point", 0)),
            buffer=int(tensor["constant_buffer_idx"]),
        )


@dataclass(frozen=True, slots=True)
class FileCall:
    """An instruction that computes."""

    instruction: int
    operator: str
    """`aten::topk.values`; empty for a call of XNNPACK."""
    subgraph: Subgraph | None


class ProgramFile:
    """A program's methods."""

    def __init__(self, data: bytes) -> None:
        self._file = deserialize_pte_binary(data)

    @cached_property
    def _named(self) -> dict[str, bytes]:
        stored = self._file.named_data
        if stored is None:
            return {}
        return {key: _bytes(stored.buffers[entry.buffer_index]) for key, entry in stored.pte_data.items()}

    def backends(self) -> set[str]:
        """Return the names of what parts of it are handed to."""
        return {delegate.id for plan in self._file.program.execution_plan for delegate in plan.delegates}

    def calls(self, method: str) -> list[FileCall]:
        """Return what a method calls, in the order of its instructions."""
        program = self._file.program
        plan = next(plan for plan in program.execution_plan if plan.name == method)
        found = []
        for number, instruction in enumerate(plan.chains[0].instructions):
            call = instruction.instr_args
            if isinstance(call, KernelCall):
                operator = plan.operators[call.op_index]
                name = f"{operator.name}.{operator.overload}" if operator.overload else operator.name
                found.append(FileCall(number, name, None))
            elif isinstance(call, DelegateCall):
                place = plan.delegates[call.delegate_index].processed.index
                payload = bytes(program.backend_delegate_data[place].data)
                found.append(FileCall(number, "", Subgraph(_read_graph(payload), self._named)))
        return found


def _bytes(buffer: Any) -> bytes:
    return (
        buffer if isinstance(buffer, bytes) else bytes(buffer.buffer if hasattr(buffer, "buffer") else buffer)
    )


def _read_graph(payload: bytes) -> Mapping[str, Any]:
    header = XNNHeader.from_bytes(payload[: XNNHeader.EXPECTED_LENGTH])
    graph = payload[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        schema = place / "schema.fbs"
        schema.write_bytes(package_files(xnnpack_serialization).joinpath("schema.fbs").read_bytes())
        (place / "graph.bin").write_bytes(graph)
        _flatc_decompile(folder, str(schema), str(place / "graph.bin"), ["--raw-binary"])
        text = (place / "graph.json").read_bytes()
    made: Mapping[str, Any] = json.loads(_NOT_A_NUMBER.sub(rb': "\1inf"', text))
    for value, scale in zip(made["xvalues"], _exact_scales(graph), strict=True):
        if scale is not None:
            value["xvalue_union"]["quant_params"]["scale"] = scale
    return made


def _exact_scales(graph: bytes) -> list[float | None]:
    """Return the scale of each value of a graph; None where it has none, or one for each channel.

    Read from the flatbuffer itself: the text that flatc makes of it has six digits.
    """
    root = Table(graph, encode.Get(number_types.UOffsetTFlags.packer_type, graph, 0))
    values = root.Vector(root.Offset(_XVALUES))
    return [
        _exact_scale(root, values + _OFFSET_BYTES * number)
        for number in range(root.VectorLen(root.Offset(_XVALUES)))
    ]


def _exact_scale(root: Table, place: int) -> float | None:
    value = Table(root.Bytes, root.Indirect(place))
    if value.Get(number_types.Uint8Flags, value.Pos + value.Offset(_FIRST)) != _QUANTIZED_VALUE:
        return None
    quantized = _below(value, _FIRST + 2)
    if quantized.Get(number_types.Uint8Flags, quantized.Pos + quantized.Offset(_FIRST + 2)) != _PER_TENSOR:
        return None
    parameters = _below(quantized, _FIRST + 4)
    return float(parameters.Get(number_types.Float32Flags, parameters.Pos + parameters.Offset(_FIRST)))


def _below(table: Table, field: int) -> Table:
    """Return the table that a field of another refers to."""
    return Table(table.Bytes, table.Indirect(table.Pos + table.Offset(field)))


def _node(one: Mapping[str, Any]) -> FileNode:
    union = one["xnode_union"]
    names = (
        "input_id",
        "input1_id",
        "filter_id",
        "bias_id",
        "input2_id",
        "input3_id",
        "input4_id",
        "input5_id",
    )
    return FileNode(
        kind=str(one["xnode_union_type"]).removeprefix("XNN"),
        handle=int(one["debug_handle"]),
        inputs=tuple(int(union[name]) for name in names if union.get(name, _NONE) != _NONE),
        output=int(union["output_id"]),
    )
