"""Find NVIDIA's TensorRT: the library of this machine, or the builder that works without a GPU.

Two packages have the same interface. `tensorrt` is what a Jetson or a machine with an NVIDIA GPU has.
`tensorrt_rtx_bindings`, over the libraries of `onnxruntime_ep_nv_tensorrt_rtx`, parses and builds without GPU
and driver. Bindings over a library of another version import without a word and then create other layers than
those that were asked for; hence the check before the first use.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from qexport.errors import TargetUnavailable
from qexport.versions import is_importable

CLASSIC, RTX = "tensorrt", "tensorrt_rtx"
_RTX_BINDINGS, _RTX_LIBRARIES = "tensorrt_rtx_bindings", "onnxruntime_ep_nv_tensorrt_rtx"
_RTX_LIBRARY_FILES = ("libtensorrt_rtx.so*", "libtensorrt_onnxparser_rtx.so*")
INSTALL = (
    "On a Jetson it is part of JetPack (python3-libnvinfer); on a machine with an NVIDIA GPU: pip install tensorrt. "
    "To build and check networks without a GPU (Linux, x86-64): pip install 'qexport[tensorrt-cpu]'"
)


@dataclass(frozen=True, slots=True)
class TensorrtLibrary:
    """A TensorRT that was checked."""

    trt: Any
    """The module, used as `import tensorrt as trt` would be."""
    flavour: str
    """`tensorrt`, or `tensorrt_rtx`."""

    @property
    def version(self) -> str:
        """The library's own version, `10.3.0`."""
        return str(self.trt.__version__)

    @property
    def name(self) -> str:
        """Both in one, `tensorrt 10.3.0`."""
        return f"{self.flavour} {self.version}"


def installed_flavour() -> str | None:
    """Return which TensorRT can be imported, without importing it; None where there is none."""
    if is_importable("tensorrt"):
        return CLASSIC
    both = all(is_importable(name) for name in (_RTX_BINDINGS, _RTX_LIBRARIES))
    return RTX if both else None


@functools.cache
def load_library() -> TensorrtLibrary:
    """Import TensorRT and check that bindings and library belong together.

    Raises:
        TargetUnavailable: there is none, or bindings and library are of different versions.
    """
    flavour = installed_flavour()
    if flavour is None:
        raise TargetUnavailable(f"TensorRT is not installed. {INSTALL}")
    try:
        module = _import_rtx() if flavour == RTX else importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:
        raise TargetUnavailable(f"TensorRT ({flavour}) cannot be loaded: {error}. {INSTALL}") from error
    check_bindings(module)
    return TensorrtLibrary(module, flavour)


def check_bindings(trt: Any) -> None:
    """Refuse bindings whose calls do not reach the functions of the library that they name.

    One convolution and one pool are added to an empty network: shifted tables give layers of other types, or
    none. Nothing is built.

    Raises:
        TargetUnavailable: says what came back.
    """
    import numpy as np  # noqa: PLC0415 - only here

    builder = start_builder(trt, trt.Logger(trt.Logger.INTERNAL_ERROR))
    network = builder.create_network(network_flags(trt))
    given = network.add_input("x", trt.float32, (1, 3, 16, 16))
    weights = np.zeros((8, 3, 3, 3), np.float32)
    network.add_convolution_nd(given, 8, (3, 3), weights, np.zeros(8, np.float32))
    network.add_pooling_nd(given, trt.PoolingType.MAX, (2, 2))
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    found = [(str(layer.type), tuple(layer.get_output(0).shape)) for layer in layers]
    expected = [
        (str(trt.LayerType.CONVOLUTION), (1, 8, 14, 14)),
        (str(trt.LayerType.POOLING), (1, 3, 15, 15)),
    ]
    if found != expected:
        raise TargetUnavailable(
            f"TensorRT's Python bindings ({trt.__version__}) and the library they load are of different versions: "
            f"asked for {expected}, got {found}. Install both from one release; `qexport doctor` shows what is there."
        )


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep Python's garbage collector away while TensorRT works.

    TensorRT holds a lock while it tells a logger of ours what it does. If Python collects garbage just then, and a
    builder is among it, that builder's end waits for the same lock: for ever.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def start_builder(trt: Any, logger: Any) -> Any:
    """Return a `tensorrt.Builder`.

    Raises:
        TargetUnavailable: there is no GPU or driver, which classic TensorRT needs to build as well.
    """
    try:
        with no_collection():
            builder = trt.Builder(logger)
    except TypeError as error:  # "factory function returned nullptr"
        builder, reason = None, str(error)
    else:
        reason = "no builder came back"
    if builder is None:
        raise TargetUnavailable(
            f"TensorRT {trt.__version__} cannot start here ({reason}): classic TensorRT needs an NVIDIA GPU and its "
            "driver, to build as well; `qexport doctor` shows what is there. Without a GPU (Linux, x86-64): "
            "pip install 'qexport[tensorrt-cpu]', in an environment without the package tensorrt."
        )
    return builder


def network_flags(trt: Any, *, weakly_typed: bool = False) -> int:
    """Return flags of a strongly typed network; with explicit batch, and without types of its own, where asked."""
    names = getattr(trt.NetworkDefinitionCreationFlag, "__members__", {})
    flags = 0
    for name in ("STRONGLY_TYPED", "EXPLICIT_BATCH"):
        if name in names and not (weakly_typed and name == "STRONGLY_TYPED"):
            flags |= 1 << int(names[name])
    return flags


def _import_rtx() -> ModuleType:
    # Importing the package of libraries would write symlinks into it: it is only looked at.
    spec = importlib.util.find_spec(_RTX_LIBRARIES)
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    for pattern in _RTX_LIBRARY_FILES:
        for path in sorted(folder.glob(pattern))[:1]:
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    return importlib.import_module(_RTX_BINDINGS)
