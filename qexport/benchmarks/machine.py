"""Where a figure was measured: processor, clock, temperature and versions, as far as the system tells."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from qexport.results import Machine
from qexport.versions import package_versions

_PACKAGES = ("torch", "torchvision", "onnxruntime", "numpy")
_CPU_INFO = Path("/proc/cpuinfo")
_CLOCK = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")
_THERMAL = Path("/sys/class/thermal")
# Keys of /proc/cpuinfo by architecture: x86, then 32-bit and older 64-bit Arm, then the board's own name.
_NAME_KEYS = ("model name", "Model", "Hardware", "Processor")


def describe_machine() -> Machine:
    """Describe this machine; what it does not tell is left out, never guessed."""
    info = _cpu_info(_CPU_INFO)
    return Machine(
        measured_on="host",
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=processor_name(info),
        cores=os.cpu_count() or 1,
        versions={"python": platform.python_version(), **package_versions(*_PACKAGES)},
        clock_mhz=_clock_mhz(info),
        temperature_c=temperature_c(_THERMAL),
    )


def processor_name(info: dict[str, str]) -> str:
    """Return the processor's name from the entries of /proc/cpuinfo, else what Python's platform says."""
    for key in _NAME_KEYS:
        if info.get(key):
            return info[key]
    return platform.processor() or platform.machine() or "unknown"


def temperature_c(folder: Path) -> float | None:
    """Return the highest reading of the thermal zones in `folder`, degrees Celsius; None for none."""
    readings = [
        number / 1000 for zone in sorted(folder.glob("thermal_zone*/temp")) if (number := _number(zone))
    ]
    return max(readings, default=None)


def _cpu_info(path: Path) -> dict[str, str]:
    """Return the first value of each key: that of the first core."""
    entries: dict[str, str] = {}
    for line in (_text(path) or "").splitlines():
        key, _, value = line.partition(":")
        entries.setdefault(key.strip(), value.strip())
    return entries


def _clock_mhz(info: dict[str, str]) -> float | None:
    kilohertz = _number(_CLOCK)
    if kilohertz is not None:
        return kilohertz / 1000
    try:
        return float(info["cpu MHz"])
    except (KeyError, ValueError):
        return None


def _number(path: Path) -> float | None:
    try:
        return float(_text(path) or "")
    except ValueError:
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:  # not Linux, not readable for this user, or a sensor that is off
        return None
