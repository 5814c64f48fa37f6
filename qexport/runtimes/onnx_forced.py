"""An ONNX file cut at every quantized tensor: each layer runs on integers that are given, by the same kernels."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
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
from qexport.runtimes.onnx_session import make_session, with_outputs

_TYPES: dict[str, np.dtype[np.generic]] = {
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(float)": np.dtype(np.float32),
}


class ForcedSession:
    """One session that runs all layers at once, none on what another of them computed.

    Args:
        path: of the file.
        artifact: that it belongs to.
        threads: of the kernels.

    Raises:
        TargetUnavailable: onnx or onnxruntime is not installed.
        ArtifactError: a tensor of the artifact is not in the file, or holds no codes.
    """

    def __init__(self, path: Path, artifact: Artifact, *, threads: int) -> None:
        self._artifact = artifact
        self._tensors, self._proposals = site_tensors(artifact), proposals_tensor(artifact)
        self.ports = _ports(path, (*self._tensors, self._proposals))
        self.model = cut(path, self.ports, computed=self._tensors)
        self._session = make_session(self.model, threads=threads)
        (self._input,) = (port.name for port in self._session.get_inputs() if port.name not in {*self.ports})

    def run(
        self,
        array: NDArray[np.generic],
        codes: Mapping[str, NDArray[np.int8]],
        proposals: NDArray[np.float32],
    ) -> dict[str, NDArray[np.int8]]:
        """Run once; arguments and result are those of `ForcedRunner.run_forced`."""
        given = stored_codes(self._artifact, codes, self.ports)
        feeds = {**given, self._proposals: proposals, self._input: array}
        names = [tensor + COMPUTED for tensor in self._tensors]
        found = dict(zip(self._tensors, self._session.run(names, feeds), strict=True))
        return computed_codes(self._artifact, found, given)


def cut(path: Path, ports: Mapping[str, StoredPort], *, computed: tuple[str, ...]) -> bytes:
    """Return the model in which these tensors are inputs, and what their layers compute are the outputs.

    A reader keeps the name that it reads; only the node that writes a tensor writes another. Nodes that nothing
    asks for any more are left out, the others stay as they are.

    Args:
        path: of the file.
        ports: of the tensors that are given, by name.
        computed: those of them whose layer's own answer is asked for.

    Raises:
        TargetUnavailable: onnx is not installed.
    """
    try:
        onnx: Any = importlib.import_module("onnx")  # no board runs layers on inputs that are given
    except ImportError as error:
        raise TargetUnavailable(
            "onnx is not installed; it cuts the file into its layers. Install: pip install 'qexport[all]'"
        ) from error
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    for node in graph.node:
        for place, name in enumerate(node.output):
            if name in ports:
                node.output[place] = name + COMPUTED
    del graph.output[:]
    for name, port in ports.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(port.dtype)
        graph.input.append(onnx.helper.make_tensor_value_info(name, kind, port.shape))
        if name in computed:
            graph.output.append(onnx.helper.make_tensor_value_info(name + COMPUTED, kind, port.shape))
    _prune(graph)
    return bytes(model.SerializeToString())


def _ports(path: Path, tensors: tuple[str, ...]) -> dict[str, StoredPort]:
    """Ask ONNX Runtime for shapes and types: the file holds those of inputs and outputs alone."""
    found = {port.name: port for port in make_session(with_outputs(path, tensors)).get_outputs()}
    strange = [name for name in tensors if found[name].type not in _TYPES]
    if strange:
        raise ArtifactError(
            f"{path}: tensor {strange[0]} is {found[strange[0]].type}, no codes; expected one of "
            f"{', '.join(_TYPES)}. Export again."
        )
    return {
        name: StoredPort(tuple(int(size) for size in found[name].shape), _TYPES[found[name].type])
        for name in tensors
    }


def _prune(graph: Any) -> None:
    makers = {name: node for node in graph.node for name in node.output}
    waiting, needed = [port.name for port in graph.output], set()
    while waiting:
        node = makers.get(waiting.pop())
        if node is not None and id(node) not in needed:
            needed.add(id(node))
            waiting += _reads(node)
    kept = [node for node in graph.node if id(node) in needed]
    del graph.node[:]
    graph.node.extend(kept)


def _reads(node: Any) -> Iterator[str]:
    """Yield what a node reads, and what the graphs inside it read."""
    yield from node.input
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            for one in inner.node:
                yield from _reads(one)
