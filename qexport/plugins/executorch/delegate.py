"""A segment as one operator of the exported program, which ExecuTorch hands to XNNPACK as it stands.

ExecuTorch's own road, quantize and dequantize nodes that its partitioner recognises, decides by itself what XNNPACK
gets: it has no nearest upsampling and no strided slices, and turns maps at every border. Here the segment is decided
before, node for node, in XNNPACK's own terms; ExecuTorch's back end writes what it is told. What is written is read
back from the file (readback.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from executorch.backends.xnnpack.operators.node_visitor import NodeVisitor, register_node_visitor
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema
from executorch.backends.xnnpack.utils.utils import get_param_tensor
from executorch.backends.xnnpack.utils.xnnpack_constants import UINT64_MAX, XNN_INVALID_VALUE_ID
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir.backend.partitioner import DelegationSpec, Partitioner, PartitionResult
from executorch.exir.backend.utils import tag_constant_data
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from qexport.plugins.executorch.nodes import make_node
from qexport.plugins.executorch.segments import Segment
from qexport.plugins.executorch.steps import DTYPES

OPERATOR = "qexport.xnnpack_segment.default"
ALIGNMENT = 16
_DATATYPES = {
    "float32": schema.XNNDatatype.xnn_datatype_fp32,
    "int8": schema.XNNDatatype.xnn_datatype_qint8,
    "uint8": schema.XNNDatatype.xnn_datatype_quint8,
}


@torch.library.custom_op("qexport::xnnpack_segment", mutates_args=())
def xnnpack_segment(inputs: list[Tensor], constants: list[Tensor], program: str) -> list[Tensor]:
    """Stand for a segment; XNNPACK computes it, PyTorch does not.

    Args:
        inputs: what it reads.
        constants: weights and tables.
        program: what `describe` returns.
    """
    raise NotImplementedError("a segment of an ExecuTorch program runs in XNNPACK alone")


@xnnpack_segment.register_fake
def _(inputs: list[Tensor], constants: list[Tensor], program: str) -> list[Tensor]:
    made = json.loads(program)
    values = {value["id"]: value for value in made["values"]}
    return [
        torch.empty(values[place]["shape"], dtype=DTYPES[values[place]["dtype"]], device=inputs[0].device)
        for place in made["outputs"]
    ]


def describe(segment: Segment, handles: Mapping[int, int]) -> str:
    """Return a segment as text: its values, its nodes, which values come from outside and which go there.

    Args:
        segment: what is described.
        handles: number by which each node is found again in the file, by the node's identity.
    """
    everything = [*segment.inputs, *segment.constants, *segment.values]
    numbers = {id(value): number for number, value in enumerate(everything)}
    first_made = len(everything) - len(segment.values)
    nodes = [
        {
            "kind": node.kind,
            "inputs": [numbers[id(value)] for value in node.inputs],
            "output": first_made + number,
            "handle": handles[id(node)],
            **node.attributes,
        }
        for number, node in enumerate(segment.nodes)
    ]
    return json.dumps(
        {
            "values": [
                {"id": number, "shape": value.shape, "dtype": value.dtype, "scale": value.scale}
                for number, value in enumerate(everything)
            ],
            "inputs": len(segment.inputs),
            "constants": len(segment.constants),
            "nodes": nodes,
            "outputs": [numbers[id(value)] for value in segment.outputs],
        }
    )


class SegmentPartitioner(Partitioner):  # type: ignore[misc]
    """Hands each segment to XNNPACK, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self._delegation = DelegationSpec(XnnpackBackend.__name__, [])

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        """Tag the segments and what they alone read."""
        tags: dict[str, DelegationSpec] = {}
        for node in exported_program.graph_module.graph.nodes:
            if node.op != "call_function" or getattr(node.target, "__name__", "") != OPERATOR:
                continue
            tag = f"segment_{len(tags)}"
            tags[tag] = self._delegation
            for part in (node, *node.users):
                part.meta["delegation_tag"] = tag
        tag_constant_data(exported_program)
        return PartitionResult(tagged_exported_program=exported_program, partition_tags=tags)


@register_node_visitor
class SegmentVisitor(NodeVisitor):  # type: ignore[misc]
    """Writes a segment into the graph that XNNPACK gets."""

    target = OPERATOR

    def define_node(
        self, node: Node, xnn_graph: Any, vals_to_ids: dict[Node, int], debug_handle: int
    ) -> None:
        """Write every value and node of a segment."""
        del vals_to_ids, debug_handle
        inputs, constants, program = node.args
        assert isinstance(inputs, (list, tuple))
        assert isinstance(constants, (list, tuple))
        made = json.loads(str(program))
        writer = _GraphWriter(self, xnn_graph)
        results: dict[int, Node] = {int(str(user.args[1])): user for user in node.users}
        outside = {made["outputs"][place]: self._external_ids[user] for place, user in results.items()}
        outside |= {number: self._external_ids[source] for number, source in enumerate(inputs)}
        tensors = {len(inputs) + number: self._constant(source) for number, source in enumerate(constants)}
        for one in made["nodes"]:
            for number in one["inputs"]:
                if number < len(inputs) and number not in writer.ids:
                    writer.value(made["values"][number], outside[number])
            make_node(writer, one, made["values"], tensors, outside.get(one["output"]))

    def _constant(self, source: Any) -> Tensor:
        tensor = get_param_tensor(self._exported_program, source)
        assert isinstance(tensor, Tensor)
        return tensor

    def keep(self, data: bytes) -> str:
        """Store data once for all methods and segments; return its key."""
        key = hashlib.sha256(data).hexdigest()
        self._named_data_store.add_named_data(key, data, alignment=ALIGNMENT)
        return key


class _GraphWriter:
    """Adds values and nodes to an `XNNGraph`."""

    def __init__(self, visitor: SegmentVisitor, graph: Any) -> None:
        self._visitor, self._graph = visitor, graph
        self.ids: dict[int, int] = {}
        """Of values in the segment's description: their numbers in the graph."""

    def value(self, described: Mapping[str, Any], external: Any = None) -> int:
        """Write a value that is computed, or that comes from outside."""
        scale = described["scale"]
        quantized = None if scale is None else schema.PerTensorQuant(scale=scale, zero_point=0)
        number = self._add(_DATATYPES[described["dtype"]], described["shape"], quantized, 0, external)
        self.ids[described["id"]] = number
        return number

    def number(self, described: Mapping[str, Any], tensors: Mapping[int, Tensor]) -> int:
        """Return the number of a value that a node reads; a table of real values is stored when it is first read."""
        place = described["id"]
        if place not in self.ids:
            tensor = tensors[place]
            self.ids[place] = self._add(
                schema.XNNDatatype.xnn_datatype_fp32, tensor.shape, None, self.buffer(tensor), None
            )
        return self.ids[place]

    def stored(self, tensor: Tensor) -> int:
        """Write a weight or a bias in real values."""
        return self._add(schema.XNNDatatype.xnn_datatype_fp32, tensor.shape, None, self.buffer(tensor), None)

    def stored_integers(self, tensor: Tensor, scales: Tensor, axis: int) -> int:
        """Write an int8 weight or an int32 bias with a scale for each entry of an axis."""
        per_channel = schema.PerChannelQuant(
            scale=[], channel_dim=axis, scale_buffer_idx=self.buffer(scales), num_scales=scales.numel()
        )
        datatype = (
            schema.XNNDatatype.xnn_datatype_qcint8
            if tensor.dtype == torch.int8
            else schema.XNNDatatype.xnn_datatype_qcint32
        )
        return self._add(datatype, tensor.shape, per_channel, self.buffer(tensor), None)

    def node(self, union: Any, handle: int, limits: tuple[float | None, float | None] | None) -> None:
        """Add a node; its result is clamped to the limits, None for no limit."""
        clamp = None
        if limits is not None:
            low, high = limits
            clamp = schema.OutputMinMax(
                output_min="-inf" if low is None else low, output_max="inf" if high is None else high
            )
        self._graph.xnodes.append(schema.XNode(xnode_union=union, debug_handle=handle, output_min_max=clamp))

    def buffer(self, tensor: Tensor) -> int:
        """Store a tensor's data; return its place among the graph's."""
        data = tensor.detach().contiguous().numpy().tobytes()
        key = self._visitor.keep(data)
        self._graph.constant_data.append(
            schema.ConstantDataOffset(offset=UINT64_MAX, size=len(data), named_key=key)
        )
        return len(self._graph.constant_data) - 1

    def _add(self, datatype: Any, shape: Any, quantized: Any, buffer: int, external: Any) -> int:
        number = len(self._graph.xvalues)
        sizes = [int(size) for size in shape] or [1]
        value = schema.XNNTensorValue(
            datatype=datatype,
            num_dims=len(sizes),
            dims=sizes,
            external_id=XNN_INVALID_VALUE_ID if external is None else external.external_id,
            constant_buffer_idx=buffer,
            flags=0 if external is None else external.io_type,
            id_out=number,
        )
        if quantized is None:
            self._graph.xvalues.append(schema.XValue(xvalue_union=value))
        else:
            both = schema.XNNQuantizedTensorValue(tensor_value=value, quant_params=quantized)
            self._graph.xvalues.append(schema.XValue(xvalue_union=both))
        return number
