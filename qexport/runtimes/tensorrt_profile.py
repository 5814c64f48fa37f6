"""A TensorRT engine layer by layer: `IProfiler` times, the engine's inspector says what each layer is."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexport.errors import TargetUnavailable
from qexport.runtimes.cuda_memory import Cuda
from qexport.runtimes.runner import KernelTime, ProfiledRun
from qexport.runtimes.tensorrt_engine import LoadedEngine, without_control_characters
from qexport.runtimes.tensorrt_execution import Execution
from qexport.runtimes.tensorrt_layers import EngineLayer, parse_inspector

_BETWEEN_RUNS = 30
_UNLISTED = "unlisted"


class LayerProfile:
    """An engine under TensorRT's profiler, in a context of its own: one that was given a profiler keeps it.

    Args:
        engine: to profile.
        cuda: of this process.
        layers: of the engine.

    Raises:
        TargetUnavailable: the device has too little memory for a second context.
    """

    def __init__(self, engine: LoadedEngine, cuda: Cuda, layers: Sequence[EngineLayer]) -> None:
        self._layers = layers
        self._times: list[tuple[str, float]] = []
        self._origin = engine.origin
        self._profiler = _collecting_profiler(engine.library.trt, self._times)
        self._execution = Execution(engine, cuda, profiler=self._profiler)

    def close(self) -> None:
        """Free the context."""
        self._execution.close()

    def run(self, array: NDArray[np.generic], *, warmup: int, runs: int) -> list[ProfiledRun]:
        """Run with every layer timed.

        Args:
            array: what the engine takes.
            warmup: runs that are not counted.
            runs: runs that are.

        Raises:
            DatasetError: the engine does not take the array.
            TargetUnavailable: CUDA or TensorRT refuse, or TensorRT timed no layer.
        """
        self._execution.fill(array)
        self._execution.upload()
        return [self._run_once() for _ in range(warmup + runs)][warmup:]

    def between_layers_ms(self, plain: Execution) -> float:
        """Measure what the profiler takes between two layers: the same run with and without it, in turns.

        Args:
            plain: an execution of the same engine without profiler.
        """
        with_ms, without_ms, count = [], [], 1
        plain.fill(self._execution.input)  # how often a loop runs depends on the frame
        plain.upload()
        for _ in range(_BETWEEN_RUNS):
            profiled = self._run_once()
            with_ms.append(profiled.whole_ms)
            without_ms.append(plain.time_ms())
            count = len(profiled.kernels)
        return max(0.0, median(with_ms) - median(without_ms)) / count

    def _run_once(self) -> ProfiledRun:
        self._times.clear()
        whole_ms = self._execution.time_ms()
        self._execution.report_layers()
        if not self._times:
            raise TargetUnavailable(
                f"{self._origin}: TensorRT told its profiler of no layer. Build it again."
            )
        return profiled_run(whole_ms, self._times, self._layers)


def layers_of(engine: LoadedEngine) -> tuple[EngineLayer, ...]:
    """Return the layers of an engine, as its inspector lists them.

    Raises:
        TargetUnavailable: TensorRT has no inspector.
        ArtifactError: the engine was built without the details of its layers.
    """
    return parse_inspector(engine.describe_layers())


def profiled_run(
    whole_ms: float, times: Sequence[tuple[str, float]], layers: Sequence[EngineLayer]
) -> ProfiledRun:
    """Return a run from what the profiler heard.

    Args:
        whole_ms: of the whole run, by events around it.
        times: name and ms of every layer, in order; a layer of a loop may be there several times.
        layers: of the engine, as its inspector lists them.
    """
    kernels = {layer.name: layer.kernel for layer in layers}
    named = [(without_control_characters(name), ms) for name, ms in times]
    return ProfiledRun(
        whole_ms, tuple(KernelTime(name, kernels.get(name, _UNLISTED), ms) for name, ms in named)
    )


def _collecting_profiler(trt: Any, times: list[tuple[str, float]]) -> Any:
    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer: str, ms: float) -> None:
            times.append((layer, ms))

    return Profiler()
