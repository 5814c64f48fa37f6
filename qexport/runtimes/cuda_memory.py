"""CUDA as an engine needs it: a stream, a clock, and buffers that every run reuses.

NVIDIA's own `cuda-bindings` make the calls; they are imported when they are first needed. Each call goes through
`Cuda.call`, which checks its status. Whatever is made is given an `ExitStack` that frees it.
"""

from __future__ import annotations

import ctypes
import importlib
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexport.errors import TargetUnavailable
from qexport.runtimes.nvidia_device import driver_version

INSTALL = "pip install 'qexport[device]'"
_BINDINGS = "cuda.bindings.runtime"


class Cuda:
    """CUDA's runtime, every call checked.

    Raises:
        TargetUnavailable: `cuda-bindings` are not installed.
    """

    def __init__(self) -> None:
        try:
            self._runtime: Any = importlib.import_module(_BINDINGS)
        except ImportError as error:
            raise TargetUnavailable(
                f"cuda-bindings cannot be loaded ({error}); they hold the memory that an engine reads and writes. "
                f"Install: {INSTALL}"
            ) from error

    def call(self, name: str, *arguments: object) -> Any:
        """Make one call and return what it gives beside its status: nothing, one value, or a tuple.

        Raises:
            TargetUnavailable: CUDA refused; names the call, CUDA's error, and what helps.
        """
        status, *results = getattr(self._runtime, name)(*arguments)
        if int(status) != 0:
            self._runtime.cudaGetLastError()  # else the next call that asks is told of this one
            raise TargetUnavailable(self._refusal(name, status))
        return results[0] if len(results) == 1 else tuple(results) or None

    def constant(self, name: str) -> Any:
        """Return one of CUDA's constants, `cudaMemcpyKind.cudaMemcpyHostToDevice`."""
        found = self._runtime
        for part in name.split("."):
            found = getattr(found, part)
        return found

    def free_bytes(self) -> int:
        """Return how much of the device's memory is free, as its driver counts it."""
        free, _ = self.call("cudaMemGetInfo")
        return int(free)

    def make(self, stack: ExitStack, create: str, destroy: str, *arguments: object) -> Any:
        """Make one of CUDA's objects, and have `stack` destroy it."""
        made = self.call(create, *arguments)
        stack.callback(self.call, destroy, made)
        return made

    def _refusal(self, name: str, status: Any) -> str:
        texts = (getattr(self._runtime, ask)(status)[1] for ask in ("cudaGetErrorName", "cudaGetErrorString"))
        error, meaning = (text.decode() if isinstance(text, bytes) else str(text) for text in texts)
        hint = _HINTS.get(error)
        return f"CUDA: {name} failed with {error}: {meaning}." + (f" {hint()}" if hint else "")


def _older_bindings() -> str:
    driver = driver_version() or "none"
    major = driver.partition(".")[0]
    newer = f"pip install 'cuda-bindings<{int(major) + 1}'" if major.isdigit() else "install NVIDIA's driver"
    return f"The driver serves CUDA {driver}; cuda-bindings must not be of a newer major version: {newer}."


_HINTS: dict[str, Callable[[], str]] = {
    "cudaErrorMemoryAllocation": lambda: "The device has too little memory: close what runs there.",
    "cudaErrorInsufficientDriver": _older_bindings,
}


@dataclass(frozen=True, slots=True)
class Buffer:
    """One input or output of an engine: pinned memory of the host, and as much on the device."""

    host: NDArray[np.generic]
    """The pinned memory, of the tensor's shape and type."""
    device: int
    """Address on the device."""


class Stream:
    """A stream of work on the device.

    Args:
        cuda: that makes it.
        stack: frees it, and what is allocated through it.
    """

    def __init__(self, cuda: Cuda, stack: ExitStack) -> None:
        self.cuda, self._stack = cuda, stack
        # Work on the default stream, of whatever else is in this process, does not wait for it.
        flags = cuda.constant("cudaStreamNonBlocking")
        self._stream = cuda.make(stack, "cudaStreamCreateWithFlags", "cudaStreamDestroy", flags)
        self._began, self._ended = (cuda.make(stack, "cudaEventCreate", "cudaEventDestroy") for _ in range(2))

    @property
    def handle(self) -> int:
        """What TensorRT takes for the stream."""
        return int(self._stream)

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Buffer:
        """Return a buffer for a tensor, filled with zeros on the host.

        Raises:
            TargetUnavailable: there is not enough memory.
        """
        size = math.prod(shape) * dtype.itemsize
        device = self.cuda.make(self._stack, "cudaMalloc", "cudaFree", size)
        pinned = self.cuda.make(self._stack, "cudaMallocHost", "cudaFreeHost", size)
        host = np.ndarray(shape, dtype, buffer=memoryview((ctypes.c_byte * size).from_address(int(pinned))))
        host.fill(0)
        return Buffer(host, int(device))

    def upload(self, buffer: Buffer) -> None:
        """Enqueue the copy from the host to the device."""
        kind = self.cuda.constant("cudaMemcpyKind.cudaMemcpyHostToDevice")
        host = buffer.host.ctypes.data
        self.cuda.call("cudaMemcpyAsync", buffer.device, host, buffer.host.nbytes, kind, self._stream)

    def download(self, buffer: Buffer) -> None:
        """Enqueue the copy from the device to the host."""
        kind = self.cuda.constant("cudaMemcpyKind.cudaMemcpyDeviceToHost")
        host = buffer.host.ctypes.data
        self.cuda.call("cudaMemcpyAsync", host, buffer.device, buffer.host.nbytes, kind, self._stream)

    def synchronize(self) -> None:
        """Wait for everything that was enqueued."""
        self.cuda.call("cudaStreamSynchronize", self._stream)

    def time_ms(self, work: Callable[[], None]) -> float:
        """Return how long the device takes for what `work` enqueues, by two events on the stream, and wait for it."""
        self.cuda.call("cudaEventRecord", self._began, self._stream)
        work()
        self.cuda.call("cudaEventRecord", self._ended, self._stream)
        self.synchronize()
        return float(self.cuda.call("cudaEventElapsedTime", self._began, self._ended))

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` enqueues as a CUDA graph; return what launches all of it at once.

        Raises:
            TargetUnavailable: `work` has a part that cannot be recorded: it waits for the device, or allocates.
        """
        # Of this thread alone, as trtexec captures: other threads may go on allocating.
        mode = self.cuda.constant("cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal")
        self.cuda.call("cudaStreamBeginCapture", self._stream, mode)
        try:
            work()
        except TargetUnavailable:
            self._end_broken_capture()
            raise
        graph = self.cuda.call("cudaStreamEndCapture", self._stream)
        try:
            ready = self.cuda.make(
                self._stack, "cudaGraphInstantiateWithFlags", "cudaGraphExecDestroy", graph, 0
            )
        finally:
            self.cuda.call("cudaGraphDestroy", graph)
        return lambda: self.cuda.call("cudaGraphLaunch", ready, self._stream)

    def _end_broken_capture(self) -> None:
        """Bring the stream out of capture: only then does it take work again."""
        try:
            graph = self.cuda.call("cudaStreamEndCapture", self._stream)
        except TargetUnavailable:
            return  # it says again that the capture is broken; the stream is free all the same
        self.cuda.call("cudaGraphDestroy", graph)
