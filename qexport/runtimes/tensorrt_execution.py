"""One engine, ready to run again and again: a context, a stream, buffers in pinned memory, a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexport.errors import DatasetError, TargetUnavailable
from qexport.runtimes.cuda_memory import Cuda, Stream
from qexport.runtimes.tensorrt_engine import LoadedEngine, Port


class Execution:
    """A context of an engine with everything that a run needs, allocated once.

    A run copies the frame into pinned memory, launches the graph (copy to the device, engine, copy back) and waits.
    Where the engine cannot be captured as a graph, the same is enqueued anew each time; `graph_refusal` says why.

    Args:
        engine: to run.
        cuda: of this process.
        profiler: an `IProfiler` that hears of every layer; there is no graph then.

    Raises:
        TargetUnavailable: the device has too little memory, or CUDA or TensorRT refuse the first run.
    """

    graph_refusal: str
    """Why there is no CUDA graph; empty where there is."""

    def __init__(self, engine: LoadedEngine, cuda: Cuda, *, profiler: Any = None) -> None:
        self._engine = engine
        self._interface = engine.interface()
        with ExitStack() as stack:
            self._stream = Stream(cuda, stack)
            self._buffers = {
                port.name: self._stream.allocate(port.shape, port.dtype) for port in engine.ports
            }
            (self._input_port,) = (port for port in engine.ports if port.is_input)
            self._input = self._buffers[self._input_port.name]
            self._outputs = {
                port.name: self._buffers[port.name] for port in engine.ports if not port.is_input
            }
            self._context = engine.make_context(cuda.free_bytes())
            stack.callback(self._drop_context)
            if profiler is not None:
                attach(self._context, profiler)
            addresses = {name: buffer.device for name, buffer in self._buffers.items()}
            self._interface.bind(self._context, addresses)
            self._launch: Callable[[], None] = self._enqueue_with_copies
            self._run_once()  # before a capture: the first run allocates
            self.graph_refusal = "layers are timed one by one" if profiler is not None else self._capture()
            self._resources = stack.pop_all()

    def close(self) -> None:
        """Free the memory, the graph and the context. Arrays of `input` must not be used after it."""
        self._resources.close()

    @property
    def input(self) -> NDArray[np.generic]:
        """The pinned memory of the one input. What is written into it and then run is not copied on the host."""
        return self._input.host

    def fill(self, array: NDArray[np.generic]) -> None:
        """Put what the engine takes into pinned memory.

        Raises:
            DatasetError: it is of another shape or type, several frames at once included.
        """
        host = self._input.host
        check_input(array, self._input_port)
        if array is not host:
            np.copyto(host, array)

    def run(self, array: NDArray[np.generic]) -> dict[str, NDArray[np.generic]]:
        """Run once.

        Returns:
            The outputs by name, copies: they are small, and the buffers belong to the next run.

        Raises:
            DatasetError: as `fill`.
            TargetUnavailable: CUDA or TensorRT refuse.
        """
        self.fill(array)
        self._run_once()
        return {name: buffer.host.copy() for name, buffer in self._outputs.items()}

    def upload(self) -> None:
        """Copy the input to the device, for `time_ms`."""
        self._stream.upload(self._input)
        self._stream.synchronize()

    def time_ms(self) -> float:
        """Run the engine alone, without copies and graph; return what the device takes for it."""
        return self._stream.time_ms(self._enqueue)

    def report_layers(self) -> None:
        """Have the profiler told of the layers of the last run, where it was not told during the run."""
        if hasattr(self._context, "report_to_profiler") and not self._context.report_to_profiler():
            raise TargetUnavailable(self._engine.refused_run())

    def _run_once(self) -> None:
        self._launch()
        self._stream.synchronize()

    def _enqueue(self) -> None:
        self._engine.errors.clear()
        if not self._interface.enqueue(self._context, self._stream.handle):
            raise TargetUnavailable(self._engine.refused_run())

    def _enqueue_with_copies(self) -> None:
        self._stream.upload(self._input)
        self._enqueue()
        for buffer in self._outputs.values():
            self._stream.download(buffer)

    def _capture(self) -> str:
        """Make runs launch a graph; return why they do not."""
        if hasattr(self._context, "is_stream_capturable") and not self._context.is_stream_capturable(
            self._stream.handle
        ):
            return "TensorRT says that this engine cannot be captured"
        try:
            self._launch = self._stream.capture(self._enqueue_with_copies)
        except TargetUnavailable as refusal:  # a loop that looks at its condition on the host, for one
            self._run_once()  # raises where the broken capture has broken the context too
            return str(refusal)
        self._run_once()
        return ""

    def _drop_context(self) -> None:
        del self._context  # before the engine and its memory go


def check_input(array: NDArray[np.generic], port: Port) -> None:
    """Refuse what an engine does not take.

    Raises:
        DatasetError: says what was expected and what was given.
    """
    if array.shape != port.shape or array.dtype != port.dtype:
        raise DatasetError(
            f"the engine takes {port.dtype} of shape {port.shape}, one frame at a time, given {array.dtype} of shape "
            f"{array.shape}. Its one profile is of this size: run several frames one after another."
        )


def attach(context: Any, profiler: Any) -> None:
    """Have a context tell a profiler of its layers, where it can be, after the run instead of during it."""
    context.profiler = profiler
    if hasattr(context, "report_to_profiler"):
        context.enqueue_emits_profile = False
