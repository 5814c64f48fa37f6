"""TensorRT engines on a GPU."""

from __future__ import annotations

from qexport.runtimes.nvidia_device import find_device
from qexport.runtimes.tensorrt_library import installed_flavour


def has_device() -> bool:
    """Say whether TensorRT and a GPU are here."""
    return installed_flavour() is not None and find_device() is not None
