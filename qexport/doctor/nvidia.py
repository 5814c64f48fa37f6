"""The NVIDIA driver and its GPUs, asked through the driver's own library; no CUDA toolkit is needed."""

from __future__ import annotations

import ctypes
import json
import re
from dataclasses import dataclass
from pathlib import Path

from qexport.doctor.findings import Finding
from qexport.doctor.requirements import numbers
from qexport.runtimes.nvidia_device import NvidiaDevice, driver_version, find_device

_NVIDIA_VENDOR, _DISPLAY_CLASS = "0x10de", "0x03"
_LIBRARY = "libcuda.so.1"
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE of cuda.h


@dataclass(frozen=True, slots=True)
class Driver:
    """What the NVIDIA driver says."""

    cuda: str | None
    """Newest CUDA that it runs, `12.6`; None where there is no driver."""
    release: str | None
    """Its own number, `540.4.0`, where the kernel module tells it."""
    gpus: tuple[NvidiaDevice, ...]
    error: str
    """Why it gives no GPUs though it is installed; empty where it gives some, or says there are none."""


def find_driver(root: Path) -> Driver:
    """Ask the driver for its version and its GPUs.

    Args:
        root: folder that stands for `/`.
    """
    path = root / "proc/driver/nvidia/version"
    release = parse_driver_release(path.read_text(errors="replace")) if path.is_file() else None
    gpus: list[NvidiaDevice] = []
    while (gpu := find_device(len(gpus))) is not None:
        gpus.append(gpu)
    return Driver(driver_version(), release, tuple(gpus), "" if gpus else _why_none())


def nvidia_findings(
    root: Path, driver: Driver, *, torch_cuda: str | None, jetson: bool
) -> tuple[Finding, ...]:
    """Return the rows of driver, GPUs and CUDA toolkit.

    Args:
        root: folder that stands for `/`.
        driver: what the driver said.
        torch_cuda: CUDA that the installed torch was built with.
        jetson: whether this is a Jetson.
    """
    expected = jetson or bool(driver.cuda) or _has_nvidia_card(root)
    toolkit = find_toolkit(root)
    return (
        _driver_finding(driver, torch_cuda, expected=expected),
        *_gpu_findings(driver, expected=expected),
        Finding(
            group="NVIDIA device",
            name="CUDA toolkit",
            found=toolkit,
            compatible="not needed",
            state="ok" if toolkit else "not applicable",
        ),
    )


def parse_driver_release(text: str) -> str | None:
    """Return the driver's number in `/proc/driver/nvidia/version`, `540.4.0`; None where it has none."""
    for line in text.splitlines():
        if line.startswith("NVRM version:"):
            match = re.search(r"\s(\d{3,}\.\d+(?:\.\d+)?)\s", line + " ")
            return match[1] if match else None
    return None


def find_toolkit(root: Path) -> str | None:
    """Return the version of the CUDA toolkit in `/usr/local/cuda`, `12.6.68`; None where there is none."""
    folder = root / "usr/local/cuda"
    new, old = folder / "version.json", folder / "version.txt"
    if new.is_file():
        match = re.search(r'"cuda"\s*:\s*(\{[^}]*\})', new.read_text(errors="replace"))
        return str(json.loads(match[1]).get("version", "")) or None if match else None
    if old.is_file():
        found = re.search(r"CUDA Version (\d[\d.]*)", old.read_text(errors="replace"))
        return found[1] if found else None
    return None


def _driver_finding(driver: Driver, torch_cuda: str | None, *, expected: bool) -> Finding:
    if driver.cuda is None:
        return Finding(
            group="NVIDIA device",
            name="driver",
            found=driver.error or None,
            state="missing" if expected else "not applicable",
            advice="install NVIDIA's driver for this system, then restart" if expected else "",
        )
    wanted = f"CUDA {numbers(torch_cuda)[0]} or newer: torch was built for {torch_cuda}" if torch_cuda else ""
    old = bool(driver.gpus and torch_cuda and numbers(driver.cuda)[0] < numbers(torch_cuda)[0])
    broken = bool(driver.error)
    return Finding(
        group="NVIDIA device",
        name="driver",
        found=f"{driver.release or 'of unknown release'}, CUDA {driver.cuda}",
        compatible=wanted,
        state="incompatible" if old or broken else "ok",
        advice=(
            f"the driver answers {driver.error}: restart, or install the driver again"
            if broken
            else f"install a driver for CUDA {torch_cuda}, or a torch that was built for CUDA {driver.cuda}"
            if old
            else ""
        ),
    )


def _gpu_findings(driver: Driver, *, expected: bool) -> tuple[Finding, ...]:
    if driver.gpus:
        return tuple(
            Finding(
                group="NVIDIA device",
                name="GPU" if len(driver.gpus) == 1 else f"GPU {index}",
                found=f"{gpu.name}, compute capability {gpu.compute_capability}",
                state="ok",
            )
            for index, gpu in enumerate(driver.gpus)
        )
    return (
        Finding(
            group="NVIDIA device",
            name="GPU",
            found=None,
            state="missing" if expected else "not applicable",
            advice="is it hidden from this process (CUDA_VISIBLE_DEVICES, a container without --gpus all)?"
            if expected
            else "",
        ),
    )


def _why_none() -> str:
    """Return the driver's own name for what keeps it from starting; empty where it starts, or is not there."""
    try:
        cuda = ctypes.CDLL(_LIBRARY)
    except OSError:  # the usual case of a machine without NVIDIA's driver
        return ""
    code = cuda.cuInit(0)
    if code in (0, _NO_DEVICE):
        return ""
    text = ctypes.c_char_p()
    named = cuda.cuGetErrorName(code, ctypes.byref(text)) == 0 and text.value
    return text.value.decode(errors="replace") if named and text.value else f"CUDA error {code}"


def _has_nvidia_card(root: Path) -> bool:
    """Look for a display or 3D controller of NVIDIA on the PCI bus: there whether or not its driver is."""
    for vendor in (root / "sys/bus/pci/devices").glob("*/vendor"):
        kind = vendor.with_name("class")
        if (
            vendor.read_text().strip() == _NVIDIA_VENDOR
            and kind.is_file()
            and kind.read_text().strip().startswith(_DISPLAY_CLASS)
        ):
            return True
    return False
