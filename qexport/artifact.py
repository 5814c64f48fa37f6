"""An artifact: a folder with the files that a runtime loads, and `artifact.json` that says what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from qexport.errors import ArtifactError
from qexport.files import read_json, sha256_file, sha256_json, write_json

FORMAT_VERSION = 1
MANIFEST = "artifact.json"
LEFT_OUT = "left-out.json"
"""Beside the manifest where the folder has only some of the files: a board needs no float baseline."""


Rung = Literal["structure", "built", "run"]
"""What a finding stands on, from weak to strong: the structure of the file, read back; what the vendor's own builder
made of it on a CPU (its list of layers, its network evaluated in torch); the runtime that ran it."""


class ArtifactFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of the artifact."""

    role: str
    """What it is: `int8` is the file that runs, `fp32` its float baseline; a target may have more."""
    name: str
    sha256: str
    size_bytes: int


class InputSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The camera frame that goes in, and how it becomes the detector's image."""

    frame_height_px: int
    frame_width_px: int
    preprocess: Literal["inside", "outside"]
    """`inside`: the artifact takes the uint8 RGB frame (H, W, 3). `outside`: the runtime's torch-free
    preprocessing resizes and normalises, and the artifact takes float32 (1, 3, padded_h, padded_w)."""
    resized_height_px: int
    resized_width_px: int
    padded_height_px: int
    padded_width_px: int
    mean: tuple[float, float, float]
    """Per RGB channel, of values in 0..1."""
    std: tuple[float, float, float]


class TensorSite(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where a row of the encodings is found in the running artifact."""

    key: str
    """The row's key, `PATH@CALL/PORT`."""
    tensor: str
    """Name of the tensor in the artifact."""
    zero_point: int
    """Zero point of the stored integers; code = stored - zero_point."""
    shape: tuple[int, ...]
    """Shape in the detector, (1, C, H, W) for a feature map."""
    stored_shape: tuple[int, ...] | None = None
    """Shape to which the stored tensor is reshaped before `stored_order`; None where it is `shape`."""
    stored_order: tuple[int, ...] | None = None
    """Axis order that takes the stored tensor to `shape`, as `numpy.transpose` takes it."""


class LayerDecision(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the target runs one layer: read back from the artifact, never assumed."""

    path: str
    call: int
    op: str
    kernels: tuple[str, ...]
    """Kernels of the runtime, `QLinearConv`."""
    integer: bool
    reason: str = ""
    """Why it is not an integer kernel; empty where it is."""
    reformats: int = 0
    """Kernels beside it that only change layout or type."""


class UnquantizedRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A row of the encodings that the target does not apply: the tensor is more exact than the row says."""

    key: str
    reason: str


class Artifact(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `artifact.json` holds."""

    target: str
    qexport_version: str
    versions: dict[str, str]
    """Packages that made it."""
    detector_sha256: str
    encodings_sha256: str
    labels: tuple[str, ...]
    """Class names by label; `labels[0]` is the background."""
    input: InputSpec
    proposals: int
    detections: int
    forms: dict[str, str]
    """Which form of an operator the target uses, `{"roi_align": "int8 gather"}`."""
    files: tuple[ArtifactFile, ...]
    sites: tuple[TensorSite, ...]
    float_sites: dict[str, str]
    """Float tensors that parity needs: name in the detector to name in the artifact, `{"proposals": ...}`."""
    layers: tuple[LayerDecision, ...]
    unquantized: tuple[UnquantizedRow, ...] = ()
    rung: Rung = "run"
    """What `layers` stands on."""
    format_version: int = FORMAT_VERSION

    def file(self, role: str) -> ArtifactFile:
        """Return the file with that role.

        Raises:
            ArtifactError: the artifact has no such file.
        """
        for file in self.files:
            if file.role == role:
                return file
        roles = ", ".join(file.role for file in self.files)
        raise ArtifactError(f"this {self.target} artifact has no file of role {role!r}; it has {roles}")

    @property
    def sha256(self) -> str:
        """Digest of the whole artifact: manifest and, through it, every file."""
        return sha256_json(self)


class LeftOut(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`left-out.json`."""

    roles: tuple[str, ...]
    """Of the files that were not taken along."""


def describe_file(folder: Path, name: str, role: str) -> ArtifactFile:
    """Return the entry for a file that lies in `folder`."""
    path = folder / name
    return ArtifactFile(role=role, name=name, sha256=sha256_file(path), size_bytes=path.stat().st_size)


def save_artifact(artifact: Artifact, folder: Path) -> Path:
    """Write `artifact.json`, last, when every file of the artifact is in place; return its path."""
    return write_json(folder / MANIFEST, artifact)


def load_artifact(path: Path) -> tuple[Artifact, Path]:
    """Read an artifact and check the digest of every file; one that was left out on purpose may be missing.

    Args:
        path: the artifact's folder, its `artifact.json`, or a file in the folder.

    Returns:
        The artifact and its folder.

    Raises:
        ArtifactError: missing, of another format, or a file that was edited or lost after export.
    """
    folder = path if path.is_dir() else path.parent
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(f"{path}: no {MANIFEST} there. Give the folder that `qexport export` wrote.")
    artifact = read_json(folder / MANIFEST, Artifact, ArtifactError)
    if artifact.format_version != FORMAT_VERSION:
        raise ArtifactError(
            f"{folder / MANIFEST}: artifact of format {artifact.format_version}, "
            f"this qexport reads {FORMAT_VERSION}. Export again with this version."
        )
    left_out = _left_out(folder)
    for file in artifact.files:
        found = folder / file.name
        if not found.is_file():
            if file.role in left_out:
                continue
            raise ArtifactError(f"{found}: the artifact's {file.role} file is missing. Export again.")
        if sha256_file(found) != file.sha256:
            raise ArtifactError(
                f"{found}: changed after export (its SHA-256 is not the one in {MANIFEST}). "
                "Export again, or restore the file."
            )
    return artifact, folder


def _left_out(folder: Path) -> tuple[str, ...]:
    path = folder / LEFT_OUT
    return read_json(path, LeftOut, ArtifactError).roles if path.is_file() else ()
