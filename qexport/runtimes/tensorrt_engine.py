"""An engine of TensorRT, loaded: its inputs and outputs, in each generation of the interface.

TensorRT 8.5 and newer give tensors by name (`execute_async_v3`), older ones by number (`execute_async_v2`), and 10
has dropped the older form. Which one a library has is asked of the library, never concluded from its version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from qexport.errors import ArtifactError, TargetUnavailable
from qexport.runtimes.nvidia_device import find_device
from qexport.runtimes.tensorrt_library import TensorrtLibrary, no_collection

_MEBIBYTE = 2**20
_OUT_OF_MEMORY = ("out of memory", "outofmemory", "cudaerrormemoryallocation")
_OLD_DRIVER = "driver version is insufficient"
# By the names of `DataType`: `trt.nptype` of 8.x needs names that numpy has dropped.
_DTYPES: Mapping[str, type[np.generic]] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}


@dataclass(frozen=True, slots=True)
class Port:
    """One input or output of an engine."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_input: bool


class Interface(Protocol):
    """How a generation of TensorRT names tensors and runs."""

    def ports(self, trt: Any, engine: Any) -> list[Port]:
        """Return the engine's inputs and outputs, in its order."""
        ...

    def bind(self, context: Any, addresses: Mapping[str, int]) -> None:
        """Give a context the addresses on the device, by name, in the engine's order; they hold for every run."""
        ...

    def enqueue(self, context: Any, stream: int) -> bool:
        """Enqueue one run on a stream; return whether TensorRT took it."""
        ...


class NamedTensors:
    """TensorRT 8.5 and newer: `execute_async_v3`."""

    def ports(self, trt: Any, engine: Any) -> list[Port]:
        """Return the engine's inputs and outputs."""
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        return [
            Port(
                name,
                tuple(engine.get_tensor_shape(name)),
                _dtype(name, engine.get_tensor_dtype(name)),
                engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
            )
            for name in names
        ]

    def bind(self, context: Any, addresses: Mapping[str, int]) -> None:
        """Set the address of every tensor."""
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise TargetUnavailable(f"TensorRT did not take the memory of tensor {name}.")

    def enqueue(self, context: Any, stream: int) -> bool:
        """Enqueue one run."""
        return bool(context.execute_async_v3(stream))


class NumberedBindings:
    """TensorRT before 8.5: `execute_async_v2`."""

    def __init__(self) -> None:
        self._bindings: list[int] = []

    def ports(self, trt: Any, engine: Any) -> list[Port]:
        """Return the engine's inputs and outputs."""
        return [
            Port(
                engine.get_binding_name(index),
                tuple(engine.get_binding_shape(index)),
                _dtype(engine.get_binding_name(index), engine.get_binding_dtype(index)),
                bool(engine.binding_is_input(index)),
            )
            for index in range(engine.num_bindings)
        ]

    def bind(self, context: Any, addresses: Mapping[str, int]) -> None:
        """Keep the addresses, in the order of the bindings, for every run."""
        self._bindings = list(addresses.values())

    def enqueue(self, context: Any, stream: int) -> bool:
        """Enqueue one run."""
        return bool(context.execute_async_v2(self._bindings, stream))


def interface_of(engine: Any) -> Interface:
    """Return the interface that an engine has, the newer one where it has both.

    Raises:
        TargetUnavailable: it has neither.
    """
    if hasattr(engine, "num_io_tensors"):
        return NamedTensors()
    if hasattr(engine, "num_bindings"):
        return NumberedBindings()
    raise TargetUnavailable(
        "this TensorRT gives the inputs of an engine neither by name (8.5 and newer) nor by number (8.4 and older). "
        "`qexport doctor` shows what is installed."
    )


class LoadedEngine:
    """An engine on the device, and what it says of itself.

    Args:
        library: that loads it.
        data: the serialized engine.
        origin: its file, or what else it is, for messages.
        rebuild: how to get one that loads, for messages.

    Raises:
        ArtifactError: TensorRT refuses it: of another version or GPU, or cut off; or its shapes are not fixed.
        TargetUnavailable: TensorRT does not start here, or the device has too little memory.
    """

    def __init__(self, library: TensorrtLibrary, data: bytes, *, origin: str, rebuild: str) -> None:
        self.library, self.origin, trt = library, origin, library.trt
        self.errors: list[str] = []
        self._logger = _error_logger(trt, self.errors)
        if hasattr(trt, "init_libnvinfer_plugins"):
            trt.init_libnvinfer_plugins(self._logger, "")
        try:
            with no_collection():
                self._runtime = trt.Runtime(self._logger)
        except TypeError as error:  # the bindings' word for a null pointer
            raise TargetUnavailable(f"{library.name} does not start here: {self._said()}") from error
        with no_collection():
            self.engine = self._runtime.deserialize_cuda_engine(data)
        if self.engine is None:
            said = self._said()
            if _OLD_DRIVER in said and find_device() is not None:
                raise TargetUnavailable(f"{library.name} needs a newer driver than this machine's: {said}")
            if is_out_of_memory(said):
                raise TargetUnavailable(f"{origin}: the device has too little memory to load it: {said}")
            raise ArtifactError(f"{origin}: {library.name} does not load it: {said}. {rebuild}")
        self.ports = tuple(self.interface().ports(trt, self.engine))
        check_ports(self.ports, origin)

    def interface(self) -> Interface:
        """Return an interface for one context."""
        return interface_of(self.engine)

    def make_context(self, free_bytes: int) -> Any:
        """Return a context: the memory of one run at a time.

        Args:
            free_bytes: of the device, for the message.

        Raises:
            TargetUnavailable: the device has too little memory for it.
        """
        self.errors.clear()
        context = self.engine.create_execution_context()
        if context is None or any(is_out_of_memory(text) for text in self.errors):
            raise TargetUnavailable(
                f"{self.origin}: a run needs {memory_needed(self.engine) / _MEBIBYTE:.0f} MiB of the device's memory, "
                f"{free_bytes / _MEBIBYTE:.0f} MiB are free: {self._said()}. Close what runs there, or build with "
                "less for kernels: workspace_mb."
            )
        return context

    def refused_run(self) -> str:
        """Say that TensorRT did not take a run."""
        return f"{self.origin}: {self.library.name} did not run it: {self._said()}"

    def describe_layers(self) -> str:
        """Return the inspector's JSON.

        Raises:
            TargetUnavailable: TensorRT is older than its inspector.
        """
        if not hasattr(self.engine, "create_engine_inspector"):
            raise TargetUnavailable(
                f"{self.library.name} has no engine inspector (8.2 and newer have): layers cannot be mapped to modules."
            )
        inspector = self.engine.create_engine_inspector()
        text = inspector.get_engine_information(self.library.trt.LayerInformationFormat.JSON)
        return without_control_characters(str(text))

    def _said(self) -> str:
        return "; ".join(text.strip() for text in self.errors[-3:]) or "it did not say why"


def check_ports(ports: Sequence[Port], origin: str) -> None:
    """Refuse an engine with another number of inputs than one, or of which a size is left open.

    Raises:
        ArtifactError: names the tensor.
    """
    inputs = [port.name for port in ports if port.is_input]
    if len(inputs) != 1:
        raise ArtifactError(
            f"{origin}: an engine of a detector has one input, the frame; this one has {len(inputs)}: "
            f"{', '.join(inputs) or 'none'}. Export again."
        )
    for port in ports:
        if any(size < 0 for size in port.shape):
            raise ArtifactError(
                f"{origin}: {port.name} has the shape {port.shape}; every size must be fixed, buffers are made once. "
                "Export with a fixed frame: qexport inspect --frame HEIGHTxWIDTH."
            )


def without_control_characters(text: str) -> str:
    """Return text with blanks for control characters: they stand between a layer's nodes, and JSON allows none."""
    return text.translate(dict.fromkeys(range(32), " "))


def memory_needed(engine: Any) -> int:
    """Return what a context takes of the device's memory, bytes."""
    if hasattr(engine, "device_memory_size_v2"):
        return int(engine.device_memory_size_v2)
    return int(engine.device_memory_size)


def is_out_of_memory(text: str) -> bool:
    """Say whether an error of TensorRT is about memory."""
    return any(sign in text.lower() for sign in _OUT_OF_MEMORY)


def _dtype(name: str, given: Any) -> np.dtype[Any]:
    kind = str(given).rpartition(".")[2]
    if kind not in _DTYPES:
        raise ArtifactError(
            f"tensor {name} is of type {kind}, which numpy does not have; an engine of this detector reads and writes "
            f"{', '.join(_DTYPES)}. Export again."
        )
    return np.dtype(_DTYPES[kind])


def _error_logger(trt: Any, errors: list[str]) -> Any:
    severe = (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity in severe:
                errors.append(text)

    return Logger()
