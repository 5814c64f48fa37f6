"""Import torch2trt as it stands, also where TensorRT is a newer or another one than it was written for.

torch2trt imports `tensorrt` and, while it is imported, reads names that TensorRT 11 and TensorRT for RTX do not
have any more. What is there is never replaced, and where nothing is missing nothing is touched.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

from qexport.errors import TargetUnavailable
from qexport.runtimes.tensorrt_library import load_library
from qexport.versions import is_importable

REPOSITORY = "https://github.com/NVIDIA-AI-IOT/torch2trt"
INSTALL = (
    f"It is not on the package index. Install: git clone {REPOSITORY} && cd torch2trt && python setup.py install; "
    "or put a checkout on the PYTHONPATH."
)


def import_torch2trt() -> Any:
    """Return the module `torch2trt.torch2trt`.

    Raises:
        TargetUnavailable: torch2trt or TensorRT is not installed, or torch2trt cannot be imported.
    """
    if not is_importable("torch2trt"):
        raise TargetUnavailable(f"torch2trt is not installed. {INSTALL}")
    trt = load_library().trt
    add_missing(trt)
    try:
        # torch2trt's own warnings are nothing that a user of ours could act on.
        with _importable_as_tensorrt(trt), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("torch2trt.torch2trt")
    except (ImportError, AttributeError) as error:
        raise TargetUnavailable(
            f"torch2trt cannot be imported with TensorRT {trt.__version__}: {error}. {INSTALL}"
        ) from error


def add_missing(trt: Any) -> tuple[str, ...]:
    """Add the names that torch2trt reads and TensorRT 11 has no more; return those that were added.

    They stand for nothing: int8 calibrators are gone, every network has an explicit batch and, in TensorRT 11,
    strong types.
    """
    flags = trt.NetworkDefinitionCreationFlag
    missing = {
        "CalibrationAlgoType": (trt, SimpleNamespace(ENTROPY_CALIBRATION=0, ENTROPY_CALIBRATION_2=2)),
        "IInt8Calibrator": (trt, type("IInt8Calibrator", (), {})),
        "EXPLICIT_BATCH": (flags, getattr(flags, "STRONGLY_TYPED", None)),
        "location": (trt.ITensor, property(_device, _nothing)),
    }
    added = []
    for name, (owner, value) in missing.items():
        if not hasattr(owner, name):
            setattr(owner, name, value)
            added.append(name)
    return tuple(added)


def _device(tensor: Any) -> Any:
    del tensor
    return load_library().trt.TensorLocation.DEVICE


def _nothing(tensor: Any, location: Any) -> None:
    """Ignore a location: TensorRT 11 decides it."""
    del tensor, location


@contextmanager
def _importable_as_tensorrt(trt: ModuleType) -> Iterator[None]:
    """Let `import tensorrt` give this module, where that name is not taken."""
    if "tensorrt" in sys.modules or trt.__name__ == "tensorrt":
        yield
        return
    sys.modules["tensorrt"] = trt
    try:
        yield
    finally:
        del sys.modules["tensorrt"]
