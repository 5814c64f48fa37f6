"""The network of a TensorRT artifact, evaluated in torch: what the builder was given, where no GPU can run it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from qexport.artifact import Rung
from qexport.emulation.tensorrt_network import EvaluatedNetwork
from qexport.runtimes.runner import OUTPUTS, Runner
from qexport.runtimes.tensorrt_builder import EngineBuilder
from qexport.runtimes.tensorrt_library import load_library
from qexport.runtimes.tensorrt_network import Network, load_network, read_network


class EvaluatedRunner(Runner):
    """Evaluates the network that the int8 engine was built from; it has no latency."""

    rung: ClassVar[Rung] = "built"
    _network: EvaluatedNetwork
    _threads_before: int

    def open(self) -> None:
        """Load the network.

        Raises:
            TargetUnavailable: there is no TensorRT to read an ONNX file with.
            ArtifactError: the file is damaged.
        """
        self._network = EvaluatedNetwork(self._read())
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(self.threads)

    def close(self) -> None:
        """Free the network, and give torch back the threads that it had."""
        torch.set_num_threads(self._threads_before)
        del self._network

    def _read(self) -> Network:
        if self.path.suffix != ".onnx":
            return load_network(self.path)
        builder = EngineBuilder(load_library())
        return read_network(builder.library.trt, builder.parse(self.path), library=builder.library.name)

    def run(self, array: NDArray[np.generic], tensors: Sequence[str] = ()) -> dict[str, NDArray[np.generic]]:
        """Evaluate once."""
        (name,) = self._network.inputs
        found = self._network.run({name: torch.from_numpy(np.ascontiguousarray(array))}, tensors)
        return {key: found[key].numpy() for key in (*OUTPUTS, *tensors)}


RUNNER = EvaluatedRunner
