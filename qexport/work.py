"""A run that is being worked on: started or taken up, with what its stages share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

import qexport
from qexport.artifact import MANIFEST, Artifact, load_artifact
from qexport.encodings import Encodings, load_encodings
from qexport.errors import ArtifactError, EncodingsError, QexportError, RunFolderError, TargetUnavailable
from qexport.files import sha256_json
from qexport.run_folder import RunFolder, change_record, create_run, holds_run, open_run, require_free
from qexport.settings import RunRecord, Scheme, Settings
from qexport.subject import Subject
from qexport.target import TARGETS, find_target
from qexport.target_options import read_options, split_assignment
from qexport.versions import is_importable, package_versions

if TYPE_CHECKING:
    from qexport.quantization.reference import QuantizedDetector

Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
"""Called with a title and a number of steps; gives what is called after each step."""

_PACKAGES = (
    *("torch", "torchvision", "torchao", "onnx", "onnxscript", "onnxruntime"),
    *("numpy", "pillow", "pycocotools"),
)
_REPORT = ("pycocotools", "jinja2", "matplotlib")
_WORKSTATION = ("torch", "torchvision", "torchao", "safetensors")


@contextmanager
def silent(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Show no progress."""
    del title, total
    yield lambda: None


class Work:
    """A run that is being worked on: its folder, and what it is about."""

    def __init__(self, folder: RunFolder, subject: Subject, progress: Progress = silent) -> None:
        self.folder, self.subject, self.progress = folder, subject, progress

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.folder.path

    @property
    def settings(self) -> Settings:
        """What was asked."""
        return self.folder.settings

    @cached_property
    def encodings(self) -> Encodings:
        """The table that `calibrate` wrote, checked to be this detector's."""
        from qexport.detectors.fingerprint import fingerprint  # noqa: PLC0415 - torch begins here

        again = f"qexport calibrate {self.path}"
        path = self.folder.require("encodings.json", again)
        encodings = load_encodings(path)
        own = fingerprint(self.subject.static)
        if encodings.detector_sha256 != own:
            raise EncodingsError(
                f"{path}: made for another detector (fingerprint {encodings.detector_sha256[:12]}, this one's "
                f"is {own[:12]}). Put this run's own table back, or delete the file and run `{again}`."
            )
        return encodings

    @cached_property
    def quantized(self) -> QuantizedDetector:
        """The detector with its encodings applied."""
        from qexport.quantization.reference import quantize  # noqa: PLC0415 - torch begins here

        return quantize(self.subject.static, self.encodings)

    def forget_encodings(self) -> None:
        """Drop what was made of encodings that have just been replaced."""
        for name in ("encodings", "quantized"):
            self.__dict__.pop(name, None)

    def artifact(self, target: str) -> tuple[Artifact, Path]:
        """Return a target's artifact and its folder.

        Raises:
            RunFolderError: there is none yet.
            ArtifactError: it was edited, or made of other encodings than the run has now.
        """
        again = f"qexport export {self.path} --target {target}"
        self.folder.require(f"{target}/{MANIFEST}", again)
        artifact, folder = load_artifact(self.path / target)
        if artifact.encodings_sha256 != sha256_json(self.encodings):
            raise ArtifactError(
                f"{folder}: made of other encodings than {self.path / 'encodings.json'} holds now. "
                f"Run `{again}`."
            )
        return artifact, folder


def check_targets(targets: Sequence[str], *, whole_run: bool = False) -> None:
    """Find out before any work whether the targets can be exported and measured here.

    Args:
        targets: their names.
        whole_run: also check what accuracy and the report need.

    Raises:
        QexportError: an unknown target.
        TargetUnavailable: packages are missing; the message holds the command that installs them.
    """
    for name in targets:
        target = find_target(name)
        target.require("export")
        target.require("measure")
    missing = [name for name in _REPORT if not is_importable(name)]
    if whole_run and missing:
        raise TargetUnavailable(
            f"accuracy and report need {', '.join(missing)}. Install: pip install 'qexport[all]'"
        )


def check_scheme(scheme: Scheme, targets: Sequence[str]) -> None:
    """Refuse targets for a scheme that none of them runs, and a run without a target for one that they do.

    Raises:
        QexportError: names the target, and what can be done.
    """
    if scheme == "activations" and targets:
        raise QexportError(
            f"target {targets[0]} cannot run --scheme activations: float weights on int8 feature maps have no kernel, "
            f"there or at any other target ({', '.join(target.name for target in TARGETS)}). The quantized reference "
            "runs it: leave --target out, and `qexport run` and `qexport evaluate` measure that. For targets: "
            "qexport calibrate RUN --scheme int8."
        )
    if scheme == "int8" and not targets:
        raise QexportError(
            "--target is missing: which runtime? `qexport targets` lists them. Only --scheme activations has none."
        )


def check_target_options(assignments: Sequence[str]) -> None:
    """Refuse an option that no target has, or a value that it does not take.

    Raises:
        QexportError: names it, and what there is.
    """
    for assignment in assignments:
        target = find_target(split_assignment(assignment)[0])
        read_options(target.options, target.name, assignments)


def exported_targets(path: Path) -> list[str]:
    """Return the targets that a run holds artifacts of."""
    return [target.name for target in TARGETS if (path / target.name / MANIFEST).is_file()]


def start(path: Path, settings: Settings, *, command: str = "", progress: Progress = silent) -> Work:
    """Make a run's folder, or take up the run in it.

    Detector, options and every image are checked before anything is written.

    Raises:
        TargetUnavailable: torch is not installed.
        QexportError: the detector, the data or the folder cannot be used.
    """
    require_torch()
    taken_up = holds_run(path)
    if not taken_up:
        require_free(path)  # said before the detector is loaded
    subject = Subject(settings)
    record = RunRecord(
        settings=subject.resolved(),
        weights_sha256=subject.loaded.weights_sha256,
        dataset_name=subject.evaluation.name,
        dataset_sha256=subject.dataset_sha256,
        qexport_version=qexport.__version__,
        versions=used_versions(),
        command=command,
    )
    if not taken_up:
        _check(subject, progress)
    folder = create_run(path, record)
    return Work(change_record(folder, _in_these_versions(folder.record)), subject, progress)


def resume(
    path: Path, *, settings: Settings | None = None, command: str = "", progress: Progress = silent
) -> Work:
    """Open a run that was started before.

    Args:
        path: the run's folder.
        settings: replace the run's own; stages that depend on what changed are no longer complete.
        command: the command that changes them, for the record.
        progress: shown while stages run.

    Raises:
        TargetUnavailable: torch is not installed.
        RunFolderError: there is no run, or its weights or data changed since.
        QexportError: the new settings cannot be used; the run keeps its own.
    """
    require_torch()
    folder = open_run(path)
    record = folder.record
    changed = settings is not None and settings != record.settings
    subject = Subject(settings if settings is not None else record.settings)
    others_asked = changed and subject.settings.qat != record.settings.qat
    if subject.loaded.weights_sha256 != record.weights_sha256 and not others_asked:
        given = subject.settings.qat or subject.settings.weights or subject.settings.model
        raise RunFolderError(
            f"{given}: the weights changed since {path} was "
            "started. Put them back, or start a new run with another --out."
        )
    if changed:
        _check(subject, progress, layers=subject.settings.keep_float != record.settings.keep_float)
        record = msgspec.structs.replace(
            record,
            settings=subject.settings,
            weights_sha256=subject.loaded.weights_sha256,
            dataset_sha256=subject.dataset_sha256,
            command=" && ".join(filter(None, (record.command, command))),
        )
    elif subject.dataset_sha256 != record.dataset_sha256:
        raise RunFolderError(
            f"{subject.evaluation.root}: images or annotations changed since {path} was started. "
            "Put them back, or start a new run with another --out."
        )
    return Work(change_record(folder, _in_these_versions(record)), subject, progress)


def _check(subject: Subject, progress: Progress, *, layers: bool = True) -> None:
    """Find out now what would otherwise stop a stage in the middle of the run."""
    check_target_options(subject.settings.target_options)
    if layers:
        _ = subject.layers
    _ = subject.original
    samples = subject.used_samples()
    subject.parity_samples()
    with progress("read images", len(samples)) as step:
        subject.read_all(step)


def require_torch() -> None:
    """Find out before any work whether the float detector can be loaded here.

    Raises:
        TargetUnavailable: packages are missing; the message holds the command that installs them.
    """
    missing = [name for name in _WORKSTATION if not is_importable(name)]
    if missing:
        raise TargetUnavailable(
            f"this command works on the float detector and needs {', '.join(missing)}. "
            "Install: pip install 'qexport[all]'. On a board, `qexport detect` runs what a workstation exported."
        )


def used_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide what comes out."""
    return {"python": ".".join(map(str, sys.version_info[:3])), **package_versions(*_PACKAGES)}


def _in_these_versions(record: RunRecord) -> RunRecord:
    """Return the record with the versions that are at work now."""
    return msgspec.structs.replace(record, qexport_version=qexport.__version__, versions=used_versions())
