"""The network of a TensorRT artifact, evaluated in torch: what the builder was given, where no GPU can run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from qexport.artifact import Rung
from qexport.emulation.tensorrt_network import EvaluatedNetwork
from qexport.runtimes.forced import StoredPort, computed_codes, proposals_tensor, site_tensors, stored_codes
from qexport.runtimes.runner import OUTPUTS, ForcedRunner
from qexport.runtimes.tensorrt_builder import EngineBuilder
from qexport.runtimes.tensorrt_library import load_library
from qexport.runtimes.tensorrt_network import Network, load_network, read_network


class EvaluatedRunner(ForcedRunner):
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

    def run_forced(
        self,
        array: NDArray[np.generic],
        codes: Mapping[str, NDArray[np.int8]],
        proposals: NDArray[np.float32],
    ) -> dict[str, NDArray[np.int8]]:
        """Evaluate every layer on the codes that are given."""
        (name,) = self._network.inputs
        # TensorRT's int8 has zero point 0 and the detector's own layout.
        ports = {
            site.tensor: StoredPort(site.stored_shape or site.shape, np.dtype(np.int8))
            for site in self.artifact.sites
        }
        given = stored_codes(self.artifact, codes, ports)
        forced = {tensor: torch.from_numpy(value) for tensor, value in given.items()}
        found = self._network.run_forced(
            {name: torch.from_numpy(np.ascontiguousarray(array))},
            {**forced, proposals_tensor(self.artifact): torch.from_numpy(proposals)},
            site_tensors(self.artifact),
        )
        return computed_codes(
            self.artifact, {tensor: value.numpy() for tensor, value in found.items()}, given
        )


RUNNER = EvaluatedRunner
