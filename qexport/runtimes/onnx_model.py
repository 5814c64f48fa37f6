"""Nodes and outputs of an ONNX file, without the onnx package: a board has ONNX Runtime and not that.

Of the Protocol Buffers encoding (protobuf.dev/programming-guides/encoding) as much as this needs, with the field
numbers of onnx.proto. Weights are skipped, never read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from qexport.errors import ArtifactError

_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
_MODEL_IR, _MODEL_GRAPH, _MODEL_OPSETS = 1, 7, 8
_GRAPH_NODE, _GRAPH_NAME, _GRAPH_INPUT, _GRAPH_OUTPUT = 1, 2, 11, 12
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_TYPE = 1, 2, 3, 4
_NAME = 1
_OPSET_VERSION = 2
_IR_VERSION, _OPSET = 10, 18
# TypeProto { tensor_type { elem_type: FLOAT, shape { dim { dim_value: 1 } } } }
_ONE_FLOAT = bytes([0x0A, 8, 0x08, 1, 0x12, 4, 0x0A, 2, 0x08, 1])


class Node(Protocol):
    """What is asked of a node; the onnx package's have it too."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def op_type(self) -> str:
        """Its operator, `Conv`."""

    @property
    def input(self) -> Sequence[str]:
        """Names of the tensors that it takes."""

    @property
    def output(self) -> Sequence[str]:
        """Names of the tensors that it gives."""


@dataclass(frozen=True, slots=True)
class GraphNode:
    """A node of a graph, without its attributes."""

    name: str
    op_type: str
    input: tuple[str, ...]
    output: tuple[str, ...]


def read_nodes(model: bytes) -> list[GraphNode]:
    """Return the nodes of a serialized model in their order.

    Raises:
        ArtifactError: the bytes are cut off or no ONNX.
    """
    nodes = []
    for found in _inside(model, _MODEL_GRAPH, _GRAPH_NODE):
        texts: dict[int, list[str]] = {}
        for field, value in _fields(found):
            if field <= _NODE_TYPE and isinstance(value, memoryview):
                texts.setdefault(field, []).append(_text(value))
        name, op_type = (texts.get(field, [""])[-1] for field in (_NODE_NAME, _NODE_TYPE))
        ends = (tuple(texts.get(field, ())) for field in (_NODE_INPUT, _NODE_OUTPUT))
        nodes.append(GraphNode(name, op_type, *ends))
    return nodes


def add_outputs(model: bytes, tensors: Sequence[str]) -> bytes:
    """Return a serialized model that also puts out the named tensors; those that it does already stay as they are.

    A message of which a field occurs twice is the two merged, and repeated fields are joined: so a second, small
    graph behind the first adds outputs to it, and nothing of the first is touched.

    Raises:
        ArtifactError: the bytes are cut off or no ONNX.
    """
    present = {
        _text(name)
        for output in _inside(model, _MODEL_GRAPH, _GRAPH_OUTPUT)
        for field, name in _fields(output)
        if field == _NAME and isinstance(name, memoryview)
    }
    wanted = [name for name in dict.fromkeys(tensors) if name not in present]
    more = b"".join(_message(_GRAPH_OUTPUT, _message(_NAME, name.encode())) for name in wanted)
    return model + _message(_MODEL_GRAPH, more)


def chain_of(operator: str, length: int) -> bytes:
    """Return a serialized model that applies an operator again and again to one number, `v0` to `vLENGTH`."""
    nodes = [
        _message(_NODE_INPUT, f"v{before}".encode())
        + _message(_NODE_OUTPUT, f"v{after}".encode())
        + _message(_NODE_TYPE, operator.encode())
        for before, after in pairwise(range(length + 1))
    ]
    first, last = (
        _message(_NAME, f"v{end}".encode()) + _message(_NAME + 1, _ONE_FLOAT) for end in (0, length)
    )
    graph = b"".join(_message(_GRAPH_NODE, node) for node in nodes)
    graph += _message(_GRAPH_NAME, b"chain") + _message(_GRAPH_INPUT, first) + _message(_GRAPH_OUTPUT, last)
    opset = _message(_MODEL_OPSETS, bytes([_OPSET_VERSION << 3, _OPSET]))
    return bytes([_MODEL_IR << 3, _IR_VERSION]) + _message(_MODEL_GRAPH, graph) + opset


def _inside(model: bytes, outer: int, inner: int) -> Iterator[memoryview]:
    """Yield the messages in field `inner` of the messages in field `outer`."""
    for field, graph in _fields(memoryview(model)):
        if field == outer and isinstance(graph, memoryview):
            for number, value in _fields(graph):
                if number == inner and isinstance(value, memoryview):
                    yield value


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield number and value of each field of a message; of a number of fixed width, its bytes."""
    at, end = 0, len(data)
    while at < end:
        tag, at = _varint(data, at)
        field, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            number, at = _varint(data, at)
            yield field, number
            continue
        if kind == _LENGTH:
            size, at = _varint(data, at)
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            size = 8 if kind == _EIGHT_BYTES else 4
        else:
            raise _damaged(f"a field of kind {kind}")
        if at + size > end:
            raise _damaged(f"{size} bytes announced where {end - at} are left")
        yield field, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return the number at a place, and the place behind it."""
    value, shift = 0, 0
    while at < len(data) and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _damaged("a number without end")


def _message(field: int, content: bytes) -> bytes:
    """Return a field that holds bytes."""
    size, length = len(content), bytearray()
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    length.append(size)
    return bytes([field << 3 | _LENGTH]) + bytes(length) + content


def _text(value: memoryview) -> str:
    return bytes(value).decode(errors="replace")


def _damaged(what: str) -> ArtifactError:
    return ArtifactError(f"this is no ONNX, or it was cut off: {what}. Export again.")
