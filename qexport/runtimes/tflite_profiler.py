"""LiteRT's C profiler: how long every operator of a run took.

The Python interface does not offer it; the C functions in the library that the package brings do. They are called
through ctypes, with the layouts of structures that the header files of one version have: another version is refused,
and so is a library that does not answer as that one does.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from qexport.errors import TargetUnavailable
from qexport.runtimes.tflite_library import LITERT, TfliteLibrary, quiet

KNOWN_VERSIONS = ("2.3.0",)
"""Of ai-edge-litert, whose structures are as below."""
OPERATOR, DELEGATE_NODE = 2, 8
"""Types of events: an operator of the file, a node of XNNPACK's (`litert_profiler_event.h`)."""
_WHOLE, _WHOLE_TYPE = "Invoke", 1
_EVENT = struct.Struct("<QIIQQ3q3qQQII")
"""tag, type, start and duration in us, memory before and after, two numbers, source: `ProfiledEventData`."""
_CPU = 1
_HOST_MEMORY = 1
_READ, _WRITE = 0, 1
_TYPES = {"bool": 6, "float32": 1, "int32": 2, "uint8": 3, "int64": 4, "int8": 9}
"""`LiteRtElementType`, by NumPy's names."""
_RANK = 8
_Pointer = ctypes.c_void_p


class _TensorType(ctypes.Structure):
    _fields_ = (
        ("element_type", ctypes.c_int32),
        ("rank", ctypes.c_uint32),  # its highest bit says whether there are strides
        ("dimensions", ctypes.c_int32 * _RANK),
        ("strides", ctypes.c_uint32 * _RANK),
    )


@dataclass(frozen=True, slots=True)
class Port:
    """An input or an output of the model."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True, slots=True)
class Event:
    """An operator of the file, or a node of XNNPACK's, in one run."""

    tag: str
    """`CONV_2D`, or `Convolution (NHWC, QC8) IGEMM`."""
    type: int
    """`OPERATOR` or `DELEGATE_NODE`."""
    index: int
    """Of the operator in the file, or of the node in its piece of the graph."""
    duration_ms: float


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """The events of one run, in the order in which they ran."""

    whole_ms: float
    events: tuple[Event, ...]


def version_refusal(library: TfliteLibrary) -> str:
    """Return why this version's profiler is not used; empty where its layout is known."""
    if library.package == LITERT and library.version in KNOWN_VERSIONS:
        return ""
    known = " or ".join(KNOWN_VERSIONS)
    return (
        f"{library.package} {library.version} is installed; the profiler's layout is known of {LITERT} {known}: "
        f"pip install {LITERT}=={KNOWN_VERSIONS[-1]}"
    )


class ProfiledModel:
    """A model in LiteRT's own executor with its profiler, a context manager.

    Args:
        library: whose C functions are called.
        path: of the file.
        threads: of the kernels.
        builtin: run TFLite's own kernels, none of XNNPACK's.
        inputs: in the file's order.
        outputs: likewise.

    Raises:
        TargetUnavailable: the version is not a known one, or the library refuses a call.
    """

    def __init__(
        self,
        library: TfliteLibrary,
        path: Path,
        *,
        threads: int,
        builtin: bool,
        inputs: Sequence[Port],
        outputs: Sequence[Port],
    ) -> None:
        refusal = version_refusal(library)
        if refusal:
            raise TargetUnavailable(f"{path}: operators cannot be timed: {refusal}")
        self._path, self._threads, self._builtin = path, threads, builtin
        self._inputs, self._outputs = inputs, outputs
        self._c = ctypes.CDLL(str(Path(library.module.__file__).parent / "libLiteRt.so"))
        self._resources = ExitStack()
        self._payloads: list[ctypes.Array[ctypes.c_char]] = []

    def __enter__(self) -> Self:
        with quiet(), ExitStack() as stack:
            self._resources = stack
            environment = self._make("Environment", 0, None)
            model = self._make("ModelFromFile", environment, str(self._path).encode(), kind="Model")
            self._model = self._make("CompiledModel", environment, model, self._options())
            self._sources = self._buffers(environment, self._inputs)
            self._results = self._buffers(environment, self._outputs)
            self._profiler = _Pointer()
            self._call("LiteRtCompiledModelGetProfiler", self._model, ctypes.byref(self._profiler))
            self._resources = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with quiet():
            self._resources.close()

    def write(self, arrays: Sequence[NDArray[np.generic]]) -> None:
        """Set the inputs of the runs to come."""
        for buffer, array in zip(self._sources, arrays, strict=True):
            data = np.ascontiguousarray(array)
            ctypes.memmove(self._lock(buffer, _WRITE), data.ctypes.data, data.nbytes)
            self._call("LiteRtUnlockTensorBuffer", buffer)

    def read(self) -> list[NDArray[np.generic]]:
        """Return the outputs of the last run."""
        found = []
        for buffer, port in zip(self._results, self._outputs, strict=True):
            array: NDArray[np.generic] = np.empty(port.shape, port.dtype)
            ctypes.memmove(array.ctypes.data, self._lock(buffer, _READ), array.nbytes)
            self._call("LiteRtUnlockTensorBuffer", buffer)
            found.append(array)
        return found

    def run(self) -> None:
        """Run once, untimed."""
        self._call(
            "LiteRtRunCompiledModel",
            self._model,
            ctypes.c_size_t(0),
            ctypes.c_size_t(len(self._sources)),
            (_Pointer * len(self._sources))(*self._sources),
            ctypes.c_size_t(len(self._results)),
            (_Pointer * len(self._results))(*self._results),
        )

    def record(self) -> RecordedRun:
        """Run once with the profiler on.

        Raises:
            TargetUnavailable: what the profiler answers is not what this version's does.
        """
        self._call("LiteRtStartProfiler", self._profiler)
        self.run()
        self._call("LiteRtStopProfiler", self._profiler)
        count = ctypes.c_int()
        self._call("LiteRtGetNumProfilerEvents", self._profiler, ctypes.byref(count))
        data = (ctypes.c_char * (_EVENT.size * count.value))()
        self._call("LiteRtGetProfilerEvents", self._profiler, count, data)
        return _recorded(bytes(data), str(self._path))

    def _options(self) -> ctypes.c_void_p:
        options = self._make("Options")
        self._call("LiteRtSetOptionsHardwareAccelerators", options, _CPU)
        own = 'kernel_mode = "builtin"\n' if self._builtin else ""
        texts = {
            "runtime_options_string": "enable_profiling = true\n",
            "xnnpack": f"{own}num_threads = {self._threads}\n",  # the CPU's options, whatever its kernels
        }
        for identifier, text in texts.items():
            payload = ctypes.create_string_buffer(text.encode())
            self._payloads.append(payload)  # lives as long as what points to it
            opaque, free = _Pointer(), _DELETER
            address = ctypes.cast(payload, _Pointer)
            self._call("LiteRtCreateOpaqueOptions", identifier.encode(), address, free, ctypes.byref(opaque))
            self._call("LiteRtAddOpaqueOptions", options, opaque)
        return options

    def _buffers(self, environment: ctypes.c_void_p, ports: Sequence[Port]) -> list[ctypes.c_void_p]:
        buffers = []
        for port in ports:
            kind = _TensorType(_TYPES[port.dtype.name], len(port.shape))
            kind.dimensions[: len(port.shape)] = port.shape
            size = ctypes.c_size_t(int(np.prod(port.shape, dtype=np.int64)) * port.dtype.itemsize)
            buffers.append(
                self._make(
                    "ManagedTensorBuffer",
                    environment,
                    _HOST_MEMORY,
                    ctypes.byref(kind),
                    size,
                    kind="TensorBuffer",
                )
            )
        return buffers

    def _lock(self, buffer: ctypes.c_void_p, mode: int) -> int:
        address = _Pointer()
        self._call("LiteRtLockTensorBuffer", buffer, ctypes.byref(address), mode)
        return int(address.value or 0)

    def _make(self, name: str, *arguments: object, kind: str = "") -> ctypes.c_void_p:
        """Create one of the library's objects; it is destroyed with this one."""
        made = _Pointer()
        self._call(f"LiteRtCreate{name}", *arguments, ctypes.byref(made))
        destroy = getattr(self._c, f"LiteRtDestroy{kind or name}")
        destroy.restype = None
        self._resources.callback(destroy, made)
        return made

    def _call(self, name: str, *arguments: object) -> None:
        try:
            status = getattr(self._c, name)(*arguments)
        except AttributeError as error:
            raise TargetUnavailable(f"{LITERT}'s library has no {name}. {_REINSTALL}") from error
        if status != 0:
            raise TargetUnavailable(
                f"{self._path}: LiteRT's {name} failed with status {status}. {_REINSTALL}"
            )


_REINSTALL = f"Install it again: pip install --force-reinstall {LITERT}=={KNOWN_VERSIONS[-1]}"
_DELETER = ctypes.CFUNCTYPE(None, _Pointer)(lambda payload: None)  # Python owns the payload


def _recorded(data: bytes, where: str) -> RecordedRun:
    wholes, events = [], []
    for tag, kind, _, _, duration_us, *_, index, _, _, _ in _EVENT.iter_unpack(data):
        if kind in {OPERATOR, DELEGATE_NODE}:
            text = ctypes.string_at(tag).decode() if tag else ""
            events.append(Event(text, kind, index, duration_us / 1000))
        elif kind == _WHOLE_TYPE and tag and ctypes.string_at(tag).decode() == _WHOLE:
            wholes.append(duration_us / 1000)
    if len(wholes) != 1 or not events:
        raise TargetUnavailable(
            f"{where}: LiteRT's profiler names {len(wholes)} whole runs and {len(events)} operators where it is to "
            f"name one and several. {_REINSTALL}"
        )
    return RecordedRun(wholes[0], tuple(events))
