"""The NVIDIA GPU of this machine, asked through its driver; no CUDA toolkit is needed."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

_DRIVER = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


@dataclass(frozen=True, slots=True)
class NvidiaDevice:
    """A GPU and its driver."""

    name: str
    """`Orin`, `NVIDIA H100 80GB HBM3`."""
    compute_capability: str
    """`8.7`."""
    driver: str
    """Newest CUDA that the driver serves, `12.6`."""
    memory_bytes: int


def driver_version() -> str | None:
    """Return the newest CUDA that the driver serves, `12.6`; None without a driver."""
    cuda = _load()
    number = ctypes.c_int()
    if cuda is None or cuda.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def find_device(ordinal: int = 0) -> NvidiaDevice | None:
    """Return a GPU; None where there is no driver or no device."""
    cuda, handle, count = _load(), ctypes.c_int(), ctypes.c_int()
    if cuda is None or cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return None
    if ordinal >= count.value or cuda.cuDeviceGet(ctypes.byref(handle), ordinal) != 0:
        return None
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    cuda.cuDeviceGetName(name, len(name), handle)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), handle)
    capability = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle)
        capability.append(str(value.value))
    return NvidiaDevice(
        name.value.decode(errors="replace"), ".".join(capability), driver_version() or "", memory.value
    )


def _load() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(_DRIVER)
    except OSError:
        return None
