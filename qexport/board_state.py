"""What a board says of itself: model, temperatures, clocks, what held it back, memory. Never guessed, never fatal.

Everything is read below a root folder, so that a board can be made up. Sources: the kernel's documentation of
/sys/class/thermal, cpufreq and hwmon; Raspberry Pi's of `vcgencmd get_throttled` for the bits of the firmware.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import msgspec

ROOT = Path("/")

_NOW = {
    0: "under-voltage",
    1: "Arm frequency capped",
    2: "throttled",
    3: "soft temperature limit",
}
"""Bits of get_throttled; each has its twin 16 bits further up, for since the board was started."""
_SINCE_START = 16
_FIRMWARE = (
    "sys/devices/platform/*firmware*/get_throttled",
    "sys/devices/platform/*/*firmware*/get_throttled",
)
_NAME_KEYS = ("model name", "Model", "Hardware", "Processor")
_VCGENCMD_S = 10


class BoardIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the machine is; empty or None where it does not say."""

    model: str
    """From the device tree, `Raspberry Pi 5 Model B Rev 1.0`."""
    processor: str
    machine: str
    """`aarch64`."""
    cores: int
    kernel: str
    system: str
    """Of /etc/os-release."""
    memory_kib: int | None


class BoardState(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The board at one moment; what it does not tell is left out."""

    at: str
    """UTC, ISO 8601."""
    temperatures_c: dict[str, float]
    """By thermal zone."""
    clocks_mhz: dict[str, float]
    """`cpu0`, `cpu0 limit`, ..."""
    cooling: dict[str, int]
    """State of each cooling device that is no fan; above 0 it holds a clock back."""
    throttled: str | None
    """Bits of the Raspberry Pi's firmware, `0x50005`; None on another board."""
    low_voltage: bool | None
    """Alarm of the Raspberry Pi's voltage sensor."""
    memory_available_kib: int | None

    @property
    def throttled_now(self) -> tuple[str, ...]:
        """What the firmware does at this moment."""
        return _bits(self.throttled, 0)

    @property
    def throttled_since_start(self) -> tuple[str, ...]:
        """What it has done since the board was started."""
        return _bits(self.throttled, _SINCE_START)


def read_identity(root: Path = ROOT) -> BoardIdentity:
    """Return what the machine is."""
    info: dict[str, str] = {}
    cores = 0
    for line in (_text(root / "proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        info.setdefault(key.strip(), value.strip())
        cores += key.strip() == "processor"
    release = dict(
        line.split("=", 1) for line in (_text(root / "etc/os-release") or "").splitlines() if "=" in line
    )
    return BoardIdentity(
        model=(_text(root / "proc/device-tree/model") or "").strip("\0 \n"),
        processor=next((info[key] for key in _NAME_KEYS if info.get(key)), ""),
        machine=platform.machine(),
        cores=cores or os.cpu_count() or 1,
        kernel=f"{platform.system()} {platform.release()}",
        system=release.get("PRETTY_NAME", "").strip('"'),
        memory_kib=_memory_kib(root, "MemTotal"),
    )


def read_state(root: Path = ROOT) -> BoardState:
    """Return the board as it is now."""
    alarms = [
        number
        for sensor in sorted((root / "sys/class/hwmon").glob("hwmon*"))
        if (_text(sensor / "name") or "").strip() == "rpi_volt"
        and (number := _number(sensor / "in0_lcrit_alarm")) is not None
    ]
    return BoardState(
        at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        temperatures_c=dict(_temperatures(root)),
        clocks_mhz=dict(_clocks(root)),
        cooling=dict(_cooling(root)),
        throttled=_throttled(root),
        low_voltage=any(alarms) if alarms else None,
        memory_available_kib=_memory_kib(root, "MemAvailable"),
    )


def held_back(before: BoardState, after: BoardState) -> tuple[str, ...]:
    """Return what held the board back while something was measured between two states, as text; empty for nothing."""
    found = dict.fromkeys(before.throttled_now + after.throttled_now)
    for bit in after.throttled_since_start:
        if bit not in before.throttled_since_start:
            found[f"{bit} in between"] = None
    if before.low_voltage or after.low_voltage:
        found["low voltage"] = None
    for name, state in after.cooling.items():
        highest = max(state, before.cooling.get(name, 0))
        if highest > 0:
            found[f"{name} in state {highest}"] = None
    return tuple(found)


def tells_throttling(state: BoardState) -> bool:
    """Say whether a board tells what holds it back at all."""
    return state.throttled is not None or state.low_voltage is not None or bool(state.cooling)


def hottest_c(*states: BoardState) -> float | None:
    """Return the highest temperature; None where none was read."""
    return max((value for state in states for value in state.temperatures_c.values()), default=None)


def clock_mhz(state: BoardState) -> float | None:
    """Return the highest clock that a core has; None where none was read."""
    clocks = [value for name, value in state.clocks_mhz.items() if not name.endswith(" limit")]
    return max(clocks, default=None)


def _temperatures(root: Path) -> Iterator[tuple[str, float]]:
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        value = _number(zone / "temp")
        if value is not None:
            name = (_text(zone / "type") or "").strip() or zone.name
            yield f"{zone.name} {name}" if name != zone.name else name, value / 1000


def _clocks(root: Path) -> Iterator[tuple[str, float]]:
    for cpu in sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*")):
        for file, name in (("scaling_cur_freq", cpu.name), ("scaling_max_freq", f"{cpu.name} limit")):
            value = _number(cpu / "cpufreq" / file)
            if value is not None:
                yield name, value / 1000


def _cooling(root: Path) -> Iterator[tuple[str, int]]:
    for device in sorted((root / "sys/class/thermal").glob("cooling_device*")):
        name = (_text(device / "type") or "").strip()
        value = _number(device / "cur_state")
        if value is not None and "fan" not in name.lower():
            yield f"{device.name} {name}".strip(), int(value)


def _throttled(root: Path) -> str | None:
    """Return the bits of the Raspberry Pi's firmware."""
    command = shutil.which("vcgencmd") if root == ROOT else None
    if command is not None:
        try:
            done = subprocess.run(
                [command, "get_throttled"], capture_output=True, text=True, timeout=_VCGENCMD_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired):  # not allowed for this user, or a firmware that hangs
            done = None
        if done is not None and done.returncode == 0 and done.stdout.startswith("throttled="):
            return _hexadecimal(done.stdout.strip().removeprefix("throttled="))
    for pattern in _FIRMWARE:
        for path in sorted(root.glob(pattern)):
            return _hexadecimal((_text(path) or "").strip())
    return None


def _hexadecimal(text: str) -> str | None:
    try:
        return hex(int(text, 16))
    except ValueError:
        return None


def _bits(throttled: str | None, first: int) -> tuple[str, ...]:
    value = int(throttled, 16) if throttled is not None else 0
    return tuple(name for bit, name in _NOW.items() if value >> (first + bit) & 1)


def _memory_kib(root: Path, key: str) -> int | None:
    for line in (_text(root / "proc/meminfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name == key and value.split():
            return int(value.split()[0])
    return None


def _number(path: Path) -> float | None:
    try:
        return float(_text(path) or "")
    except ValueError:
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:  # not there, not readable for this user, or a sensor that is off
        return None
