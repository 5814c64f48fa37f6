"""Make a bundle of one target of a run: its artifact, golden tensors, verdicts, and what installs it."""

from __future__ import annotations

import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path

import msgspec

import qexport
from qexport.archive import SUFFIX, write_archive
from qexport.artifact import LEFT_OUT, Artifact, LeftOut, load_artifact
from qexport.artifact import MANIFEST as ARTIFACT_MANIFEST
from qexport.bundle import (
    ARTIFACT,
    INSTALL,
    LAYERS,
    MANIFEST,
    SUMS,
    BundleFile,
    BundleManifest,
    ImageFit,
    is_bundle,
    sums_of,
)
from qexport.bundling.golden_frames import golden_samples, write_golden
from qexport.bundling.verdicts import gates_of, verdicts_of
from qexport.bundling.wheel import build_wheel
from qexport.devices import has_device
from qexport.encodings import load_encodings
from qexport.errors import BundleError, RunFolderError, TargetUnavailable
from qexport.files import read_json, sha256_file, sha256_json, write_bytes, write_json
from qexport.layers import DetectorReport
from qexport.run_folder import RunFolder, open_run
from qexport.target import Target, find_target
from qexport.target_options import BuildOptions
from qexport.verifying import versions_here

DEVICE_ROLES = ("int8",)
"""Files of an artifact that a board runs."""
BASELINE_ROLE = "fp32"


@dataclass(frozen=True, slots=True)
class WrittenBundle:
    """Where a bundle lies, and what is in it."""

    folder: Path
    archive: Path
    manifest: BundleManifest

    def size_bytes(self, part: str = "") -> int:
        """Return the bytes of a folder of the bundle, or of all of its files."""
        return sum(file.size_bytes for file in self.manifest.files if file.name.startswith(part))


def write_bundle(
    path: Path,
    target: str,
    out: Path,
    *,
    frames: int = 2,
    baseline: bool = False,
    image_fit: ImageFit = "letterbox",
    on_step: Callable[[], None] = lambda: None,
) -> WrittenBundle:
    """Write a bundle's folder, and its archive beside it: both whole or not at all. Needs no torch.

    Args:
        path: the run's folder.
        target: of the run.
        out: the bundle's folder; a bundle that lies there is replaced, and its archive `OUT.tar` with it.
        frames: golden frames, images of the run's evaluation split; inner tensors are kept whole for the first,
            as digests for the others.
        baseline: take the float32 file along, to be measured beside.
        image_fit: what becomes of an image of another size than the frame's.
        on_step: called after each golden frame, and after the archive.

    Raises:
        RunFolderError: no run, a stage is missing, or `out` is something else.
        ArtifactError: the artifact was edited, or made of other encodings than the run has.
        BundleError: the target's artifact does not run from a bundle, or qexport cannot be packed.
        DatasetError: the images are not there.
        TargetUnavailable: the target's runtime is not here, so that nothing golden can be computed.
    """
    found, run = _bundled_target(target), open_run(path)
    artifact, source = _artifact_of(run, target)
    verdicts, gates = verdicts_of(run, artifact), gates_of(run, artifact)
    detector = read_json(
        run.require("detector.json", f"qexport inspect {path}"), DetectorReport, RunFolderError
    )
    encodings = load_encodings(run.file("encodings.json"))
    _require_free(out)
    samples, dataset = golden_samples(run, frames)
    with _replaced(out) as folder:
        _copy_artifact(artifact, source, folder / ARTIFACT, baseline=baseline)
        write_json(folder / LAYERS, detector.layers)
        golden = write_golden(found, samples, dataset, folder, on_step)
        wheel = build_wheel(folder / "wheel").relative_to(folder).as_posix()
        _write_install(folder / INSTALL, wheel, found.extra["run"])
        manifest = seal(
            folder,
            BundleManifest(
                qexport_version=qexport.__version__,
                target=target,
                artifact_sha256=artifact.sha256,
                detector_sha256=artifact.detector_sha256,
                encodings_sha256=artifact.encodings_sha256,
                encodings_rows_sha256=encodings.rows_sha256,
                labels=artifact.labels,
                input=artifact.input,
                image_fit=image_fit,
                versions=versions_here(target),
                verdicts=verdicts,
                gates=gates,
                golden=golden,
                wheel=wheel,
                extra=found.extra["run"],
                files=(),
            ),
        )
    archive = write_archive(out, [MANIFEST, SUMS, *(file.name for file in manifest.files)], archive_of(out))
    on_step()
    return WrittenBundle(out, archive, manifest)


def seal(folder: Path, manifest: BundleManifest) -> BundleManifest:
    """Write a bundle's manifest and its sums over the files that lie in its folder; return the manifest."""
    there = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = tuple(
        BundleFile(name=name, sha256=sha256_file(folder / name), size_bytes=(folder / name).stat().st_size)
        for name in sorted(there)
        if name not in (MANIFEST, SUMS)
    )
    sealed = msgspec.structs.replace(manifest, files=files)
    sha256 = sha256_file(write_json(folder / MANIFEST, sealed))
    write_bytes(folder / SUMS, sums_of(sealed, sha256))
    return sealed


def archive_of(out: Path) -> Path:
    """Return where the archive of a bundle's folder lies."""
    return out.with_name(out.name + SUFFIX)


def _bundled_target(name: str) -> Target:
    target = find_target(name)
    if issubclass(target.options, BuildOptions):
        raise BundleError(
            f"target {name}: its engines are built on the board, so nothing in a bundle could be verified bit for bit. "
            "Copy RUN/TARGET there and use deploy/jetson (docs/jetson.md)."
        )
    target.require("run")
    if not has_device(name):
        raise TargetUnavailable(
            f"target {name}: its runtime cannot run here, and golden tensors come from it."
        )
    return target


def _artifact_of(run: RunFolder, target: str) -> tuple[Artifact, Path]:
    run.require(f"{target}/{ARTIFACT_MANIFEST}", f"qexport export {run.path} --target {target}")
    artifact, folder = load_artifact(run.path / target)
    encodings = load_encodings(run.require("encodings.json", f"qexport calibrate {run.path}"))
    if artifact.encodings_sha256 != sha256_json(encodings):
        raise RunFolderError(
            f"{folder}: made of other encodings than {run.path / 'encodings.json'} holds now. "
            f"Run `qexport export {run.path} --target {target}`."
        )
    return artifact, folder


def _require_free(out: Path) -> None:
    """Refuse to put a bundle where something else is."""
    if out.name.endswith(SUFFIX):
        raise RunFolderError(
            f"{out}: --out is the bundle's folder; its archive will be {out}{SUFFIX}. Leave {SUFFIX} out."
        )
    if out.exists() and not (out.is_dir() and is_bundle(out)):
        raise RunFolderError(f"{out} is there and is no bundle. Choose another --out.")


@contextmanager
def _replaced(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out`; put it in the place of `out` when the block ends without an error."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    except OSError as error:
        raise RunFolderError(f"{out}: cannot be written: {error.strerror}. Choose another --out.") from error
    try:
        made = place / "new"
        made.mkdir()
        yield made
        if out.exists():
            out.rename(place / "old")
        made.rename(out)
    finally:
        shutil.rmtree(place)


def _copy_artifact(artifact: Artifact, source: Path, folder: Path, *, baseline: bool) -> None:
    roles = (*DEVICE_ROLES, BASELINE_ROLE) if baseline else DEVICE_ROLES
    for role in roles:
        artifact.file(role)  # refused by name where there is none
    folder.mkdir()
    for name in [ARTIFACT_MANIFEST, *(file.name for file in artifact.files if file.role in roles)]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    left_out = tuple(file.role for file in artifact.files if file.role not in roles)
    if left_out:
        write_json(folder / LEFT_OUT, LeftOut(left_out))


def _write_install(path: Path, wheel: str, extra: str) -> None:
    text = (package_files("qexport.bundling") / INSTALL).read_text(encoding="utf-8")
    write_bytes(path, text.replace("@WHEEL@", wheel).replace("@EXTRA@", extra).encode())
    path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
