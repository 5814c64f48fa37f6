"""A chain of operators that do next to nothing, to measure LiteRT's profiler with."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from qexport.runtimes.tflite_library import TfliteLibrary
from qexport.runtimes.tflite_profiler import Port, ProfiledModel

_OPERATORS, _RUNS = 200, 40
_FILE_IDENTIFIER, _SCHEMA_VERSION = b"TFL3", 3


def time_between_kernels_ms(library: TfliteLibrary) -> float:
    """Measure what LiteRT spends between two operators while it profiles, ms.

    Args:
        library: one whose profiler's layout is known.

    Raises:
        TargetUnavailable: it is not.
    """
    port = Port((1,), np.dtype(np.bool_))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chain.tflite"
        path.write_bytes(chain_of_operators(_OPERATORS))
        with ProfiledModel(library, path, threads=1, builtin=True, inputs=[port], outputs=[port]) as model:
            model.run()
            recorded = [model.record() for _ in range(_RUNS)]
    return median(
        (run.whole_ms - sum(event.duration_ms for event in run.events)) / _OPERATORS for run in recorded
    )


def chain_of_operators(length: int) -> bytes:
    """Return a model that negates one truth value again and again: XNNPACK has no such kernel."""
    # ai-edge-litert brings both; they take a third of a second to import
    schema: Any = importlib.import_module("ai_edge_litert.schema_py_generated")
    flatbuffers: Any = importlib.import_module("flatbuffers")
    graph = schema.SubGraphT()
    graph.tensors, graph.operators = [], []
    for number in range(length + 1):
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.type = f"v{number}", [1], schema.TensorType.BOOL
        graph.tensors.append(tensor)
    for number in range(length):
        operator = schema.OperatorT()
        operator.opcodeIndex, operator.inputs, operator.outputs = 0, [number], [number + 1]
        graph.operators.append(operator)
    graph.inputs, graph.outputs = [0], [length]
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.LOGICAL_NOT
    model = schema.ModelT()
    model.version, model.description = _SCHEMA_VERSION, "chain"
    model.subgraphs, model.buffers, model.operatorCodes = [graph], [schema.BufferT()], [code]
    builder = flatbuffers.Builder(0)
    builder.Finish(model.Pack(builder), file_identifier=_FILE_IDENTIFIER)
    return bytes(builder.Output())
