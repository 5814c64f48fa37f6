"""A bundle: what a board needs of a run, in one folder or its archive, of which every byte is accounted for.

    bundle.json        what it is, and SHA-256 and size of every other file
    SHA256SUMS         the same digests, and that of bundle.json, for `sha256sum --check`
    artifact/          the artifact of one target, its manifest unchanged
    golden/N/          a frame, the outputs for it, and every quantized tensor inside, as the workstation had them
    layers.json        the detector's layers, for the rows of a measurement
    wheel/             qexport itself
    install.sh         makes an environment on the board, installs, verifies

The digests say that nothing was damaged or changed on the way. They are no signature: whoever makes a bundle can
put anything into it, and its install script runs with your rights.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import msgspec

from qexport.archive import is_archive, unpack_archive
from qexport.artifact import MANIFEST as ARTIFACT_MANIFEST
from qexport.artifact import Artifact, InputSpec
from qexport.errors import BundleError, RunFolderError
from qexport.files import read_json, sha256_file
from qexport.layers import Layer
from qexport.results import Gate

FORMAT_VERSION = 1
MANIFEST = "bundle.json"
SUMS = "SHA256SUMS"
ARTIFACT = "artifact"
LAYERS = "layers.json"
INSTALL = "install.sh"

ImageFit = Literal["letterbox", "refuse"]
"""What becomes of an image that has not the frame's size: scaled with its aspect kept and padded with zeros, or an
error. It is never stretched."""


class BundleFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One file of the bundle."""

    name: str
    """Within the bundle, with `/`."""
    sha256: str
    size_bytes: int


class GoldenFrame(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One frame, and what the workstation computed for it."""

    source: str
    """The image that it was made of, within its dataset."""
    frame: str
    """The frame as PNG."""
    outputs: str
    """`.npz` of the artifact's outputs by name."""
    sites: str | None
    """`.npz` of the stored tensor of every row of the encodings, by the row's key; None: digests alone."""
    digests: dict[str, str]
    """By the row's key, the SHA-256 of the stored tensor's type, shape and bytes."""
    detections: int
    """How many there are in this frame."""


class BundleManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`bundle.json`."""

    kind: Literal["qexport-bundle"] = "qexport-bundle"
    format_version: int = FORMAT_VERSION
    qexport_version: str
    target: str
    artifact_sha256: str
    detector_sha256: str
    encodings_sha256: str
    encodings_rows_sha256: str
    """Of the rows of the table alone, as the table itself has it."""
    labels: tuple[str, ...]
    """Class names by label; `labels[0]` is the background."""
    input: InputSpec
    """The camera frame."""
    image_fit: ImageFit
    versions: dict[str, str]
    """Packages that computed the golden tensors."""
    verdicts: dict[str, str]
    """`parity` and `accuracy`, as text."""
    gates: tuple[Gate, ...]
    """Of parity and accuracy, as they were measured on the workstation."""
    golden: tuple[GoldenFrame, ...]
    wheel: str
    """qexport, within the bundle."""
    extra: str
    """The extra of qexport that installs the runtime."""
    files: tuple[BundleFile, ...]
    """Every file but this one and `SHA256SUMS`, sorted by name."""


class BundleFormat(msgspec.Struct, frozen=True):
    """What every version of the format has: enough to say which one it is."""

    kind: str
    format_version: int
    qexport_version: str = "unknown"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle that was read and checked."""

    folder: Path
    manifest: BundleManifest
    artifact: Artifact
    sha256: str
    """Digest of `bundle.json` and, through it, of every file."""

    @property
    def artifact_folder(self) -> Path:
        """The artifact's folder, for a runner."""
        return self.folder / ARTIFACT

    def layers(self) -> tuple[Layer, ...]:
        """Return the detector's layers."""
        return read_json(self.folder / LAYERS, tuple[Layer, ...], BundleError)


def is_bundle(path: Path) -> bool:
    """Say whether a path is a bundle's folder or manifest, or an archive."""
    if path.is_dir():
        return (path / MANIFEST).is_file()
    return path.name == MANIFEST or is_archive(path)


@contextmanager
def open_bundle(path: Path) -> Iterator[Bundle]:
    """Read a bundle and check every byte of it; an archive is unpacked, and what was unpacked removed at the end.

    Args:
        path: the bundle's folder or `bundle.json`, or its archive. An archive is unpacked beside itself, or where
            temporary files go if that folder cannot be written.

    Raises:
        BundleError: no bundle, a file that was changed, is missing or does not belong to it, a newer format, or an
            archive that is cut off or not as it was written.
    """
    if not path.exists():
        raise BundleError(
            f"{path}: no such bundle. Give the folder or the archive that `qexport bundle` wrote."
        )
    if path.is_dir() or path.name == MANIFEST:
        yield read_bundle(path if path.is_dir() else path.parent)
        return
    beside = path.parent if os.access(path.parent, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".part", dir=beside) as place:
        yield read_bundle(unpack_archive(path, Path(place)))


def require_outside(bundle: Path, path: Path) -> None:
    """Refuse to write into a bundle: it would be another.

    Raises:
        RunFolderError: names both.
    """
    if bundle.is_dir() and path.resolve().is_relative_to(bundle.resolve()):
        raise RunFolderError(
            f"{path} lies in the bundle {bundle}, which would then be another. Write it elsewhere."
        )


def read_bundle(folder: Path) -> Bundle:
    """Read a bundle's folder and check it.

    Raises:
        BundleError: as `open_bundle`.
    """
    manifest = _read_manifest(folder / MANIFEST)
    _check_names(folder, manifest)
    for file in manifest.files:
        path = folder / file.name
        size = path.stat().st_size
        if size != file.size_bytes:
            raise BundleError(f"{path}: {size} bytes, the bundle has {file.size_bytes}. {_COPY_AGAIN}")
        if sha256_file(path) != file.sha256:
            raise BundleError(
                f"{path}: changed since the bundle was made (its SHA-256 is another). {_COPY_AGAIN}"
            )
    sha256 = sha256_file(folder / MANIFEST)
    if (folder / SUMS).read_bytes() != sums_of(manifest, sha256):
        raise BundleError(f"{folder}: {MANIFEST} and {SUMS} do not agree: one was changed. {_COPY_AGAIN}")
    artifact = read_json(folder / ARTIFACT / ARTIFACT_MANIFEST, Artifact, BundleError)
    if artifact.target != manifest.target:
        raise BundleError(
            f"{folder}: {MANIFEST} says target {manifest.target}, the artifact in it is {artifact.target}'s. "
            "Make the bundle again."
        )
    return Bundle(folder, manifest, artifact, sha256)


def sums_of(manifest: BundleManifest, manifest_sha256: str) -> bytes:
    """Return what `SHA256SUMS` holds, as `sha256sum` writes it."""
    digests = {MANIFEST: manifest_sha256, **{file.name: file.sha256 for file in manifest.files}}
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items()).encode()


_COPY_AGAIN = "Copy the bundle again, or make it again on the workstation."


def _read_manifest(path: Path) -> BundleManifest:
    if not path.is_file():
        raise BundleError(
            f"{path}: no such file, so {path.parent} is no bundle, or not all of one. "
            "Give the folder or the archive that `qexport bundle` wrote."
        )
    found = read_json(path, BundleFormat, BundleError)
    if found.kind != "qexport-bundle":
        raise BundleError(f"{path}: the manifest of a {found.kind}, not of a bundle.")
    if found.format_version != FORMAT_VERSION:
        raise BundleError(
            f"{path}: a bundle of format {found.format_version}, made by qexport {found.qexport_version}; this qexport "
            f"reads {FORMAT_VERSION}. Install the qexport that is in the bundle: sh {path.parent / INSTALL}"
        )
    return read_json(path, BundleManifest, BundleError)


def _check_names(folder: Path, manifest: BundleManifest) -> None:
    """Refuse a folder that has other files than its manifest."""
    wanted = {MANIFEST, SUMS}
    for file in manifest.files:
        parts = PurePosixPath(file.name).parts
        if not parts or parts[0] == "/" or ".." in parts or "\0" in file.name:
            raise BundleError(f"{folder / MANIFEST}: the name {file.name} leads out of the bundle.")
        wanted.add(file.name)
    there = set(_names_in(folder))
    missing, extra = sorted(wanted - there), sorted(there - wanted)
    if missing:
        raise BundleError(f"{folder}: {_listed(missing)} missing. {_COPY_AGAIN}")
    if extra:
        raise BundleError(
            f"{folder}: {_listed(extra)} not of this bundle. Remove what was put there: results belong elsewhere."
        )


def _names_in(folder: Path) -> Iterator[str]:
    """Yield the names of all files below a folder, links and empty folders included."""
    for place, folders, files in os.walk(folder):
        for name in folders + files:
            path = Path(place) / name
            own = path.relative_to(folder).as_posix()
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise BundleError(
                    f"{path}: a link or a device; a bundle holds plain files alone. {_COPY_AGAIN}"
                )
            if path.is_file():
                yield own
            elif not any(path.iterdir()):
                yield f"{own}/"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (
        f" and {len(names) - 3} more are" if len(names) > 3 else " is" if len(names) == 1 else " are"
    )
