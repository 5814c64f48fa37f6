"""TensorRT engines on a GPU. Needs numpy, TensorRT and cuda-bindings, no torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexport.engines import FOLDER, find_engine
from qexport.errors import ArtifactError, TargetUnavailable
from qexport.layers import Kind
from qexport.runtimes.cuda_memory import Cuda
from qexport.runtimes.nvidia_device import find_device
from qexport.runtimes.runner import OUTPUTS, ProfiledRun, ProfilingRunner, SharedKernel
from qexport.runtimes.tensorrt_builder import TIMING_CACHE, EngineBuilder, identity_here
from qexport.runtimes.tensorrt_engine import LoadedEngine
from qexport.runtimes.tensorrt_execution import Execution
from qexport.runtimes.tensorrt_layers import EngineLayer, kind_of
from qexport.runtimes.tensorrt_library import TensorrtLibrary, installed_flavour, load_library
from qexport.runtimes.tensorrt_owners import owners_of_layers
from qexport.runtimes.tensorrt_profile import LayerProfile, layers_of
from qexport.target_options import BuildOptions


class TensorrtRunner(ProfilingRunner):
    """Runs the engine that was built of a file of an artifact; `threads` are the CPU's and change nothing here."""

    _resources: ExitStack
    _library: TensorrtLibrary
    _cuda: Cuda
    _engine: LoadedEngine
    _execution: Execution
    _probes: dict[tuple[str, ...], Execution]
    _layers: tuple[EngineLayer, ...]
    _profile: LayerProfile | None

    def open(self) -> None:
        """Load the engine, allocate what a run needs, run once, and capture a CUDA graph.

        Raises:
            TargetUnavailable: TensorRT, the GPU, its driver or cuda-bindings are missing, or the device has too
                little memory.
            ArtifactError: there is no engine, or none that loads here; the message names the command that builds it.
        """
        self._library = load_library()
        if find_device() is None:
            raise TargetUnavailable(
                f"{self.folder}: no NVIDIA GPU or driver here; a TensorRT engine runs on a GPU. Copy the folder to the "
                f"device and build there: qexport build {self.folder.name} --precision {self.role}. Without a GPU "
                "qexport evaluates the network instead, and measures no latency. `qexport doctor` shows what is here."
            )
        self._cuda = Cuda()
        self._probes, self._layers, self._profile = {}, (), None
        path = find_engine(self.artifact, self.folder, self.role, identity_here(self._library))
        with ExitStack() as stack:
            self._resources = stack
            self._engine = self._load(path.read_bytes(), str(path))
            self._execution = self._keep(Execution(self._engine, self._cuda))
            self._resources = stack.pop_all()

    def close(self) -> None:
        """Free what lies on the device."""
        self._resources.close()
        self._probes.clear()
        del self._execution, self._engine, self._profile

    @property
    def graph_refusal(self) -> str:
        """Why runs launch no CUDA graph; empty where they do."""
        return self._execution.graph_refusal

    @property
    def input(self) -> NDArray[np.generic]:
        """Pinned memory for the next frame: a camera that writes here, and `run(runner.input)`, spare a copy."""
        return self._execution.input

    def run(self, array: NDArray[np.generic], tensors: Sequence[str] = ()) -> dict[str, NDArray[np.generic]]:
        """Run once; intermediate tensors come from a second engine, built now, that also outputs them.

        Raises:
            DatasetError: the engine does not take the array.
            TargetUnavailable: CUDA or TensorRT refuse.
            ArtifactError: there is no such tensor, or the artifact is of the road that leaves none to ask for.
        """
        execution = self._probe(tuple(tensors)) if tensors else self._execution
        found = execution.run(array)
        return {name: found[name] for name in (*OUTPUTS, *tensors)}

    def profile(self, array: NDArray[np.generic], *, warmup: int, runs: int) -> list[ProfiledRun]:
        """Run with TensorRT's own profiler; a whole run is the engine alone, as the device's clock has it."""
        return self._profiled().run(array, warmup=warmup, runs=runs)

    def kernel_owners(self, rows: Collection[str] | None = None) -> dict[str, str | SharedKernel]:
        """Ask the engine's inspector."""
        return owners_of_layers(self._inspected(), rows)

    def kind_of(self, kernel: str) -> Kind:
        """Look the layer type up."""
        return kind_of(kernel)

    def between_kernels_ms(self) -> float:
        """Measure on the engine itself, with and without the profiler."""
        return self._profiled().between_layers_ms(self._execution)

    def _load(self, data: bytes, origin: str) -> LoadedEngine:
        rebuild = f"Build it here: qexport build {self.folder} --precision {self.role}"
        engine = LoadedEngine(self._library, data, origin=origin, rebuild=rebuild)
        missing = [name for name in OUTPUTS if name not in {port.name for port in engine.ports}]
        if missing:
            raise ArtifactError(f"{origin}: the engine has no output {', '.join(missing)}. {rebuild}")
        return engine

    def _keep(self, execution: Execution) -> Execution:
        self._resources.callback(execution.close)
        return execution

    def _probe(self, tensors: tuple[str, ...]) -> Execution:
        if tensors not in self._probes:
            cache = self.folder / FOLDER / TIMING_CACHE
            data = build_probe(self._library, self.path, tensors, cache=cache)
            engine = self._load(data, f"{self.path} with {len(tensors)} of its tensors as outputs")
            self._probes[tensors] = self._keep(Execution(engine, self._cuda))
        return self._probes[tensors]

    def _inspected(self) -> tuple[EngineLayer, ...]:
        if not self._layers:
            self._layers = layers_of(self._engine)
        return self._layers

    def _profiled(self) -> LayerProfile:
        if self._profile is None:
            self._profile = LayerProfile(self._engine, self._cuda, self._inspected())
            self._resources.callback(self._profile.close)
        return self._profile


def has_device() -> bool:
    """Say whether TensorRT and a GPU are here."""
    return installed_flavour() is not None and find_device() is not None


def build_probe(
    library: TensorrtLibrary, source: Path, tensors: Sequence[str], *, cache: Path | None
) -> bytes:
    """Build the engine of an ONNX file with more outputs; return it serialized.

    What is an output is not fused away: this engine has other kernels than the one that is measured, with the same
    arithmetic. It runs on the GPU, wherever the other runs.

    Args:
        library: that builds.
        source: the file.
        tensors: names of the outputs to add.
        cache: of kernels' timings, as `EngineBuilder.build` takes it.

    Raises:
        ArtifactError: the artifact's file is no ONNX file, or a tensor is not in it.
        ExportError: the builder refused.
    """
    if source.suffix != ".onnx":
        raise ArtifactError(
            f"{source}: on a GPU, tensors inside an engine are only looked at by way of an .onnx file, which this "
            "artifact does not have. Compare layers where no GPU is, or export the target `tensorrt`."
        )
    builder = EngineBuilder(library)
    mark_outputs(builder.parse(source), tensors, source)
    return builder.build(BuildOptions(), cache=cache).data


def mark_outputs(network: Any, tensors: Sequence[str], source: Path) -> None:
    """Make tensors of a network outputs of it.

    Raises:
        ArtifactError: a tensor is not in the network.
    """
    found = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        for port in range(layer.num_outputs):
            tensor = layer.get_output(port)
            if tensor is not None:
                found[tensor.name] = tensor
    missing = [name for name in tensors if name not in found]
    if missing:
        raise ArtifactError(
            f"{source}: TensorRT's network has no tensor {missing[0]} ({len(missing)} of {len(tensors)} are missing). "
            "The file is not the one that the artifact describes: export again."
        )
    for name in tensors:
        if not found[name].is_network_output:
            network.mark_output(found[name])


RUNNER = TensorrtRunner
