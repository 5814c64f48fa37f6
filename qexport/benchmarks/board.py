"""The state of a board around a measurement: `board.json`, which `deploy/jetson/board.sh` writes there."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from qexport.errors import ArtifactError
from qexport.files import read_json
from qexport.results import Gate, Machine

FORMAT_VERSION = 1
GATE = "not throttled"


class _Board(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base: frozen, named fields, unknown fields refused."""


class Snapshot(_Board, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The board at one moment; what it does not tell is left out."""

    at: str
    """UTC, ISO 8601."""
    power_mode: str
    """`MAXN (0)`; empty where the board has none."""
    clocks_mhz: dict[str, float]
    """`cpu0`, `cpu0 limit`, `gpu`, `gpu limit`, ..."""
    temperatures_c: dict[str, float]
    """By thermal zone."""
    cooling: dict[str, int]
    """State of each cooling device that is no fan; above 0 it holds a clock back."""
    power_events: dict[str, int]
    """Events of low voltage or over-current since the board was started, `{"oc3": 27}`."""
    memory_available_kib: int | None


class Watched(_Board, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What was seen while the measurement ran, one sample a second."""

    samples: int
    gpu_lowest_mhz: float | None
    gpu_highest_mhz: float | None
    hottest_c: float | None
    throttled_samples: int
    """Samples in which a cooling device held a clock back."""


class MeasuredEngine(_Board, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which engine was measured, and how."""

    precision: str
    """Role of the artifact's file that it was built from, `int8`."""
    onnx_sha256: str
    """Of that file, as it lay on the board."""
    engine_sha256: str
    warmup_ms: float
    flags: str
    """Of trtexec, without those that name files."""


class Board(_Board, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A board and its state before, while and after something was measured on it."""

    kind: Literal["qexport-board"]
    format_version: int
    model: str
    kernel: str
    l4t: str
    """Release of NVIDIA's Linux, `36.4.3`; empty where it is another."""
    jetpack: str
    tensorrt: str
    cuda: str
    cores: int
    memory_kib: int | None
    engine: MeasuredEngine | None
    watched: Watched | None
    before: Snapshot
    after: Snapshot


def read_board(path: Path) -> Board:
    """Read `board.json`.

    Raises:
        ArtifactError: missing, cut off, or of another version.
    """
    board = read_json(path, Board, ArtifactError)
    if board.format_version != FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: a board file of format {board.format_version}, this qexport reads {FORMAT_VERSION}. "
            "Measure again with the scripts of this version (deploy/jetson)."
        )
    return board


def machine_of(board: Board) -> Machine:
    """Describe the board as the machine of a measurement.

    The clock is the highest that the GPU had while it measured, else what it may reach in this power mode; the
    temperature is the highest that was read.
    """
    limit = board.after.clocks_mhz.get("gpu limit")
    watched = board.watched
    system = [
        board.kernel,
        f"power mode {board.after.power_mode}" if board.after.power_mode else "power mode not readable",
    ]
    versions = {
        "jetpack": board.jetpack,
        "l4t": board.l4t,
        "tensorrt": board.tensorrt,
        "cuda": board.cuda,
    }
    return Machine(
        measured_on="device",
        system=", ".join(system),
        processor=board.model or "unknown board",
        cores=board.cores,
        versions={name: version for name, version in versions.items() if version},
        clock_mhz=watched.gpu_highest_mhz if watched and watched.gpu_highest_mhz else limit,
        temperature_c=_hottest_c(board),
    )


def throttling(board: Board) -> tuple[str, ...]:
    """Return what held the board back while it measured, as text; empty for nothing."""
    found = []
    for name, after in board.after.power_events.items():
        events = after - board.before.power_events.get(name, 0)
        if events > 0:
            found.append(f"{events} power events ({name})")
    if board.watched and board.watched.throttled_samples:
        found.append(f"clocks held back in {board.watched.throttled_samples} of {board.watched.samples} s")
    for name, state in board.after.cooling.items():
        if max(state, board.before.cooling.get(name, 0)) > 0:
            found.append(f"{name} in state {max(state, board.before.cooling.get(name, 0))}")
    if board.before.power_mode != board.after.power_mode:
        found.append(f"power mode went from {board.before.power_mode} to {board.after.power_mode}")
    return tuple(found)


def throttle_gate(board: Board, subject: str) -> Gate | None:
    """Return the gate that the board was not held back; None where the board does not tell."""
    if not (board.after.power_events or board.after.cooling):
        return None
    found = throttling(board)
    hottest = _hottest_c(board)
    heat = f", hottest {hottest:.0f} °C" if hottest is not None else ""
    return Gate(
        name=GATE,
        passed=not found,
        measured=("; ".join(found) or "nothing held back") + heat,
        limit="no power event, no clock held back",
        subject=subject,
    )


def _hottest_c(board: Board) -> float | None:
    readings = [*board.before.temperatures_c.values(), *board.after.temperatures_c.values()]
    if board.watched and board.watched.hottest_c is not None:
        readings.append(board.watched.hottest_c)
    return max(readings, default=None)
