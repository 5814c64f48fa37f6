"""Write a TFLite model: tensors, operators and constants into the flatbuffer that the schema describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

_FILE_IDENTIFIER = b"TFL3"
_SCHEMA_VERSION = 3
_TYPES: dict[str, int] = {
    "float32": schema.TensorType.FLOAT32,
    "float16": schema.TensorType.FLOAT16,
    "int8": schema.TensorType.INT8,
    "uint8": schema.TensorType.UINT8,
    "int32": schema.TensorType.INT32,
    "int64": schema.TensorType.INT64,
    "bool": schema.TensorType.BOOL,
}
_NEW_CODES = 127
"""Operators above this stand in a field of their own; the old field says 127."""


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor of the model."""

    index: int
    shape: tuple[int, ...]
    dtype: str
    """NumPy's name, `int8`."""
    scale: float | None = None
    """Of int8 codes with zero point 0."""


class ModelWriter:
    """Collects one subgraph."""

    def __init__(self) -> None:
        self._graph: Any = schema.SubGraphT()
        self._graph.name, self._graph.tensors, self._graph.operators = "main", [], []
        self._buffers: list[Any] = [schema.BufferT()]  # the first stands for tensors without contents
        self._codes: dict[tuple[int, int], int] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes, tuple[float, ...], int], Value] = {}
        self._names: set[str] = set()
        self.place = ""
        """What names of tensors begin with, `PATH@CALL`."""

    def tensor(
        self,
        shape: Sequence[int],
        dtype: str,
        *,
        name: str,
        scales: Sequence[float] = (),
        axis: int = 0,
    ) -> Value:
        """Return a new tensor that an operator or the caller fills.

        Args:
            shape: fixed sizes.
            dtype: NumPy's name.
            name: made unique by a number.
            scales: of int8 or int32 codes: one, or one for each entry of `axis`.
            axis: of several scales.
        """
        made: Any = schema.TensorT()
        made.name, made.shape, made.type = self._unique(name), list(shape), _TYPES[dtype]
        made.buffer, made.hasRank = 0, True
        if scales:
            quantization: Any = schema.QuantizationParametersT()
            quantization.scale = [float(np.float32(scale)) for scale in scales]
            quantization.zeroPoint = [0] * len(scales)
            quantization.quantizedDimension = axis
            made.quantization = quantization
        self._graph.tensors.append(made)
        scale = float(np.float32(scales[0])) if len(scales) == 1 else None
        return Value(len(self._graph.tensors) - 1, tuple(shape), dtype, scale)

    def constant(
        self,
        array: NDArray[np.generic],
        *,
        name: str = "constant",
        scales: Sequence[float] = (),
        axis: int = 0,
    ) -> Value:
        """Return a tensor with contents; equal ones are stored once."""
        data = np.ascontiguousarray(array).reshape(array.shape)
        key = (data.dtype.name, data.shape, data.tobytes(), tuple(float(scale) for scale in scales), axis)
        if key not in self._constants:
            stored = f"{self.place}/{name}" if self.place else name
            made = self.tensor(data.shape, data.dtype.name, name=stored, scales=scales, axis=axis)
            buffer: Any = schema.BufferT()
            buffer.data = np.frombuffer(data.tobytes(), np.uint8)
            self._buffers.append(buffer)
            self._graph.tensors[made.index].buffer = len(self._buffers) - 1
            self._constants[key] = made
        return self._constants[key]

    def operator(
        self,
        code: str,
        inputs: Sequence[Value | None],
        outputs: Sequence[Value],
        *,
        options: str = "",
        settings: Mapping[str, object] | None = None,
        version: int = 1,
    ) -> None:
        """Add an operator.

        Args:
            code: `CONV_2D`.
            inputs: in the operator's order; None for one that is left out.
            outputs: that it fills.
            options: name of its table of options, `Conv2DOptions`.
            settings: fields of that table.
            version: of the operator: the oldest that does what is asked, so that old runtimes take the file.
        """
        made: Any = schema.OperatorT()
        number = getattr(schema.BuiltinOperator, code)
        made.opcodeIndex = self._codes.setdefault((number, version), len(self._codes))
        made.inputs = [-1 if value is None else value.index for value in inputs]
        made.outputs = [value.index for value in outputs]
        if options:
            table: Any = getattr(schema, f"{options}T")()
            for field, value in (settings or {}).items():
                setattr(table, field, value)
            made.builtinOptionsType, made.builtinOptions = getattr(schema.BuiltinOptions, options), table
        self._graph.operators.append(made)

    def rename(self, value: Value, name: str) -> None:
        """Give a tensor another name; its own is free again."""
        self._names.remove(self.name_of(value))
        self._graph.tensors[value.index].name = self._unique(name)

    def name_of(self, value: Value) -> str:
        """Return a tensor's name."""
        return str(self._graph.tensors[value.index].name)

    def finish(self, inputs: Sequence[Value], outputs: Sequence[Value], *, description: str) -> bytes:
        """Return the file's bytes.

        Args:
            inputs: of the model.
            outputs: of the model.
            description: what made it.
        """
        self._graph.inputs = [value.index for value in inputs]
        self._graph.outputs = [value.index for value in outputs]
        model: Any = schema.ModelT()
        model.version, model.description = _SCHEMA_VERSION, description
        model.subgraphs, model.buffers = [self._graph], self._buffers
        model.operatorCodes = [_operator_code(number, version) for number, version in self._codes]
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), file_identifier=_FILE_IDENTIFIER)
        return bytes(builder.Output())

    def _unique(self, name: str) -> str:
        number, unique = 0, name
        while unique in self._names:
            number += 1
            unique = f"{name}_{number}"
        self._names.add(unique)
        return unique


def _operator_code(number: int, version: int) -> Any:
    made: Any = schema.OperatorCodeT()
    made.builtinCode, made.deprecatedBuiltinCode, made.version = number, min(number, _NEW_CODES), version
    return made
