"""What a board measured of a bundle: `measurement.json`, which `qexport bench BUNDLE` writes there."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from qexport.board_state import BoardIdentity, BoardState
from qexport.errors import ArtifactError
from qexport.files import read_json
from qexport.results import LatencyProfile, MemoryUse

FORMAT_VERSION = 1
KIND = "qexport-measurement"


class Measurement(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`measurement.json`."""

    kind: Literal["qexport-measurement"] = "qexport-measurement"
    format_version: int = FORMAT_VERSION
    qexport_version: str
    target: str
    artifact_sha256: str
    file_sha256: str
    """Of the artifact's int8 file: what ran."""
    bundle_sha256: str
    board: BoardIdentity
    before: BoardState
    after: BoardState
    golden: str
    """What the golden frames came to on this board, as text."""
    verdicts: dict[str, str]
    """The workstation's, of parity and accuracy."""
    cold_start_s: float
    """A fresh process: Python, imports, loading, one frame."""
    memory: tuple[MemoryUse, ...]
    profile: LatencyProfile


class MeasurementFormat(msgspec.Struct, frozen=True):
    """What every version of the file has."""

    kind: str = ""
    format_version: int = 0
    qexport_version: str = "unknown"


def is_measurement(path: Path) -> bool:
    """Say whether a file is a measurement of a bundle, of whatever version."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=MeasurementFormat)
    except (OSError, msgspec.MsgspecError):
        return False
    return found.kind == KIND


def read_measurement(path: Path) -> Measurement:
    """Read a measurement.

    Raises:
        ArtifactError: missing, cut off, of another kind or version.
    """
    found = read_json(path, MeasurementFormat, ArtifactError)
    if found.kind != KIND:
        raise ArtifactError(f"{path}: no measurement; expected the file that `qexport bench BUNDLE` wrote.")
    if found.format_version != FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: a measurement of format {found.format_version}, made by qexport {found.qexport_version}; this "
            f"qexport reads {FORMAT_VERSION}. Measure again with a bundle of this version."
        )
    return read_json(path, Measurement, ArtifactError)
