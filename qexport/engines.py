"""Built engines: what they are bound to, `engines/engines.json` beside an artifact.

An artifact is the same wherever it was made and is carried from machine to machine. An engine is a build of one
of its files for one machine: it stands in a folder of its own, is made again elsewhere, and belongs to no digest.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from qexport.artifact import Artifact
from qexport.errors import ArtifactError
from qexport.files import read_json, sha256_file, write_json

FOLDER = "engines"
RECORD = "engines.json"


class DeviceIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Software and device that an engine is bound to."""

    library: str
    """`tensorrt 10.3.0`; `tensorrt_rtx 1.7.1` for one that was built without a GPU."""
    gpu: str = ""
    """Name of the GPU; empty where there was none."""
    compute_capability: str = ""
    """`8.7`; empty where there was no GPU."""
    driver: str = ""
    """CUDA version of the driver, `12.6`; empty where there was none."""

    def differences(self, here: DeviceIdentity) -> list[str]:
        """Return in what another machine differs, as text."""
        pairs = (
            ("TensorRT", self.library, here.library),
            ("GPU", self.gpu or "none", here.gpu or "none"),
            ("compute capability", self.compute_capability or "none", here.compute_capability or "none"),
        )
        return [f"{what} {built}, here {found}" for what, built, found in pairs if built != found]


class Engine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One engine."""

    role: str
    """What it computes in, `int8`."""
    source: str
    """Role of the artifact's file that it was built from: `int8`; for a DLA core `fp32`, with the calibration cache."""
    name: str
    sha256: str
    size_bytes: int
    source_sha256: str
    """Digest of the file that it was built from."""
    built_for: DeviceIdentity
    build_s: float
    """Seconds that the build took on that machine."""
    options: dict[str, str]
    """Of the builder, those that were given."""


class EngineRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`engines.json`."""

    engines: tuple[Engine, ...]

    def of(self, role: str) -> Engine | None:
        """Return the engine of a role."""
        return next((engine for engine in self.engines if engine.role == role), None)


def load_engines(folder: Path) -> EngineRecord:
    """Read which engines lie beside an artifact; none is no error.

    Args:
        folder: the artifact's.

    Raises:
        ArtifactError: the record cannot be read.
    """
    path = folder / FOLDER / RECORD
    return read_json(path, EngineRecord, ArtifactError) if path.is_file() else EngineRecord(engines=())


def add_engine(folder: Path, engine: Engine) -> Path:
    """Write an engine into the record, in place of one of the same role; return the record's path."""
    others = [other for other in load_engines(folder).engines if other.role != engine.role]
    engines = tuple(sorted([*others, engine], key=lambda each: each.role))
    return write_json(folder / FOLDER / RECORD, EngineRecord(engines=engines))


def find_engine(artifact: Artifact, folder: Path, role: str, here: DeviceIdentity) -> Path:
    """Return the engine of a role that loads on this machine.

    Args:
        artifact: that it was built from.
        folder: the artifact's.
        role: of the file.
        here: this machine.

    Raises:
        ArtifactError: there is none, it is damaged, of another file, or bound to another machine; the message
            names the command that builds it here.
    """
    rebuild = f"Build it here from {artifact.file(role).name}: qexport build {folder} --precision {role}"
    engine = load_engines(folder).of(role)
    if engine is None:
        raise ArtifactError(f"{folder / FOLDER}: no {role} engine. {rebuild}")
    path = folder / FOLDER / engine.name
    if not path.is_file() or sha256_file(path) != engine.sha256:
        state = "changed or cut off after its build" if path.is_file() else "missing"
        raise ArtifactError(f"{path}: {state}. {rebuild}")
    source = artifact.file(engine.source)
    if engine.source_sha256 != source.sha256:
        raise ArtifactError(f"{path}: built from another {source.name} than lies there. {rebuild}")
    differs = engine.built_for.differences(here)
    if differs:
        raise ArtifactError(
            f"{path}: an engine loads only where it was built: {'; '.join(differs)}. {rebuild}"
        )
    return path
