"""A `.tflite` cut at every quantized tensor: each layer runs on integers that are given, by the same kernels."""

from __future__ import annotations

import copy
import importlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexport.artifact import Artifact
from qexport.errors import ArtifactError, TargetUnavailable
from qexport.runtimes.forced import (
    COMPUTED,
    StoredPort,
    computed_codes,
    proposals_tensor,
    site_tensors,
    stored_codes,
)

_FILE_IDENTIFIER = b"TFL3"
_LEFT_OUT = -1


class ForcedInterpreter:
    """One interpreter that runs all layers at once, none on what another of them computed.

    Args:
        path: of the file.
        artifact: that it belongs to.
        open_file: returns an interpreter of a file, its tensors allocated.

    Raises:
        TargetUnavailable: the schema that ai-edge-litert brings is not installed.
        ArtifactError: a tensor of the artifact is not in the file.
    """

    def __init__(self, path: Path, artifact: Artifact, open_file: Callable[[Path], Any]) -> None:
        self._artifact, self._path = artifact, path
        self._tensors, self._proposals = site_tensors(artifact), proposals_tensor(artifact)
        given = (*self._tensors, self._proposals)
        with tempfile.TemporaryDirectory() as folder:
            cut_path = Path(folder) / path.name
            cut_path.write_bytes(cut(path, given, computed=self._tensors))
            self._interpreter = open_file(cut_path)  # maps the file: it may be removed
        self._inputs = {str(detail["name"]): detail for detail in self._interpreter.get_input_details()}
        self._outputs = {str(detail["name"]): detail for detail in self._interpreter.get_output_details()}
        (self._input,) = (name for name in self._inputs if name not in given)
        self._ports = {
            name: StoredPort(tuple(int(size) for size in detail["shape"]), np.dtype(detail["dtype"]))
            for name, detail in self._inputs.items()
        }

    def run(
        self,
        array: NDArray[np.generic],
        codes: Mapping[str, NDArray[np.int8]],
        proposals: NDArray[np.float32],
    ) -> dict[str, NDArray[np.int8]]:
        """Run once; arguments and result are those of `ForcedRunner.run_forced`."""
        given = stored_codes(self._artifact, codes, self._ports)
        for name, value in {**given, self._proposals: proposals, self._input: array}.items():
            self._interpreter.set_tensor(self._inputs[name]["index"], value)
        try:
            self._interpreter.invoke()
        except RuntimeError as error:
            raise TargetUnavailable(f"{self._path}, cut into its layers, does not run: {error}") from error
        found = {
            name: self._interpreter.get_tensor(self._outputs[name + COMPUTED]["index"])
            for name in self._tensors
        }
        return computed_codes(self._artifact, found, given)


def cut(path: Path, given: Sequence[str], *, computed: Sequence[str]) -> bytes:
    """Return the model in which these tensors are inputs, and what their layers compute are the outputs.

    A reader keeps the tensor that it reads; only the operator that writes one writes another. Operators that nothing
    asks for any more are left out, the others stay as they are.

    Args:
        path: of the file.
        given: names of the tensors that become inputs.
        computed: those of them whose layer's own answer is asked for.

    Raises:
        TargetUnavailable: the schema that ai-edge-litert brings is not installed.
        ArtifactError: a tensor is not in the file, or no operator writes it.
    """
    try:  # no board runs layers on inputs that are given, so tflite-runtime brings neither
        schema: Any = importlib.import_module("ai_edge_litert.schema_py_generated")
        flatbuffers: Any = importlib.import_module("flatbuffers")
    except ImportError as error:
        raise TargetUnavailable(
            "ai-edge-litert is not installed; its schema cuts the file into its layers. "
            "Install: pip install 'qexport[all]'"
        ) from error
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    graph = model.subgraphs[0]
    index = {bytes(tensor.name).decode(): number for number, tensor in enumerate(graph.tensors)}
    makers = {int(tensor): operator for operator in graph.operators for tensor in operator.outputs}
    missing = [name for name in given if index.get(name) not in makers]
    if missing:
        raise ArtifactError(
            f"{path}: no operator writes tensor {missing[0]} ({len(missing)} of {len(given)} are missing). The file "
            "is not the one that the artifact describes: export again."
        )
    outputs = []
    for name in given:
        place = index[name]
        graph.tensors.append(copy.copy(graph.tensors[place]))
        graph.tensors[-1].name = name + COMPUTED
        maker, new = makers[place], len(graph.tensors) - 1
        maker.outputs = [new if tensor == place else int(tensor) for tensor in maker.outputs]
        if name in computed:
            outputs.append(new)
    graph.inputs = [*graph.inputs, *(index[name] for name in given)]
    graph.outputs = outputs
    graph.operators = _needed(graph)
    model.signatureDefs, model.metadata = None, None  # both name outputs that are gone
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), file_identifier=_FILE_IDENTIFIER)
    return bytes(builder.Output())


def _needed(graph: Any) -> list[Any]:
    makers = {int(tensor): operator for operator in graph.operators for tensor in operator.outputs}
    waiting, needed = list(graph.outputs), set()
    while waiting:
        operator = makers.get(int(waiting.pop()))
        if operator is not None and id(operator) not in needed:
            needed.add(id(operator))
            waiting += [tensor for tensor in operator.inputs if tensor != _LEFT_OUT]
    return [operator for operator in graph.operators if id(operator) in needed]
