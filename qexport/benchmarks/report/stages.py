"""A run folder, read: what was measured, and which stages have not run.

A result that belongs to another detector or another artifact counts as not run: its figures are not
shown beside the wrong thing.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from qexport import mend_results, training_history
from qexport.artifact import MANIFEST, Artifact
from qexport.benchmarks.report.document import MissingStage
from qexport.cross_results import CrossReport
from qexport.diagnosis_results import Diagnosis
from qexport.encodings import Encodings, load_encodings
from qexport.engines import Engine, load_engines
from qexport.errors import RunFolderError
from qexport.files import read_json, sha256_json
from qexport.layers import DetectorReport
from qexport.method_results import FLOAT, MethodsLatency, MethodsReport
from qexport.observer_results import ObserverReport
from qexport.results import (
    AccuracyReport,
    Complexity,
    DetectionsRecord,
    LatencyProfile,
    MemoryUse,
    ParityReport,
    ProposalCurve,
    ProposalLatency,
)
from qexport.sensitivity_results import SensitivityReport
from qexport.settings import RunRecord

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Stage(Generic[_T]):
    """One file of a run folder: what it is called, what it holds, and which command writes it."""

    name: str
    file: str
    kind: type[_T]
    command: str
    """The subcommand of `qexport` that writes it."""


RECORD = Stage("run", "run.json", RunRecord, "run")
DETECTOR = Stage("detector", "detector.json", DetectorReport, "inspect")
ENCODINGS = Stage("calibration", "encodings.json", Encodings, "calibrate")
ACCURACY = Stage("accuracy", "accuracy.json", AccuracyReport, "evaluate")
DETECTIONS = Stage("detections", "detections.json", DetectionsRecord, "evaluate")
EXPORT = Stage("export", MANIFEST, Artifact, "export")
PARITY = Stage("parity", "parity.json", ParityReport, "compare")
LATENCY = Stage("latency", "latency.json", LatencyProfile, "bench")
COMPLEXITY = Stage("complexity", "complexity.json", Complexity, "export")
PROPOSALS = Stage("proposals", "proposals.json", ProposalCurve, "evaluate")
PROPOSALS_LATENCY = Stage("latency over proposals", "proposals_latency.json", ProposalLatency, "evaluate")
CROSS = Stage("targets against each other", "cross.json", CrossReport, "compare")
METHODS = Stage("methods", "methods.json", MethodsReport, "evaluate")
METHODS_LATENCY = Stage("latency of methods", "methods_latency.json", MethodsLatency, "evaluate")
DIAGNOSIS = Stage("culprit", "diagnosis.json", Diagnosis, "evaluate")
OBSERVERS = Stage("observers", "observers.json", ObserverReport, "calibrate")
TRAINING = Stage("training", training_history.ORIGIN, training_history.History, "calibrate")
MENDING = Stage("mending", mend_results.ORIGIN, mend_results.MendReport, "calibrate")
SENSITIVITY = Stage("sensitivity", "sensitivity.json", SensitivityReport, "sensitivity")
MEMORY = Stage("memory", "memory.json", tuple[MemoryUse, ...], "bench")

MEASUREMENTS = "measurements"
"""Folder of a target's artifact with what boards measured of it."""

_TARGET_FILES = frozenset(stage.file for stage in (EXPORT, PARITY, LATENCY, COMPLEXITY, MEMORY))


@dataclass(frozen=True, slots=True)
class TargetResults:
    """What was measured of one target; None where the stage has not run."""

    target: str
    artifact: Artifact | None
    parity: ParityReport | None
    latency: LatencyProfile | None
    complexity: Complexity | None
    memory: tuple[MemoryUse, ...] | None
    engines: tuple[Engine, ...] = ()
    measurements: tuple[LatencyProfile, ...] = ()
    """Brought back from boards, in the order of their names."""
    proposals: ProposalCurve | None = None
    """None where nobody asked for it: it is no stage of a run."""
    proposals_latency: ProposalLatency | None = None

    @property
    def profiles(self) -> tuple[LatencyProfile, ...]:
        """Every latency: that of this machine first, then those of the boards."""
        return (*((self.latency,) if self.latency else ()), *self.measurements)


@dataclass(frozen=True, slots=True)
class RunResults:
    """What a run folder holds; None where the stage has not run."""

    folder: Path
    record: RunRecord
    detector: DetectorReport
    encodings: Encodings | None
    accuracy: AccuracyReport | None
    detections: DetectionsRecord | None
    targets: tuple[TargetResults, ...]
    missing: tuple[MissingStage, ...]
    cross: CrossReport | None = None
    """None where there is one target, or nobody asked for it: it is no stage of every run."""
    methods: MethodsReport | None = None
    """None where nobody asked for other methods."""
    methods_latency: MethodsLatency | None = None
    diagnosis: Diagnosis | None = None
    """None where accuracy kept its gates."""
    sensitivity: SensitivityReport | None = None
    """None where nobody asked for it."""
    observers: ObserverReport | None = None
    """None where one observer was named for all."""
    training: training_history.History | None = None
    """Of the training that the run's checkpoint comes from."""
    mended: mend_results.MendReport | None = None
    """Of the mending that the run's checkpoint comes from."""


class _Reader:
    """Reads the files of one run folder and remembers what it did not find."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.missing: list[MissingStage] = []

    def optional(self, stage: Stage[_T], target: str = "", *, needs_device: bool = False) -> _T | None:
        path = self.run / target / stage.file
        if not path.is_file():
            why = "was not measured: the device was not here" if needs_device else "has not run"
            self.miss(stage, target, why, needs_device=needs_device)
            return None
        return read_json(path, stage.kind, RunFolderError)

    def miss(
        self,
        stage: Stage[_T],
        target: str,
        why: str,
        *,
        needs_device: bool = False,
        options: Sequence[str] = (),
    ) -> None:
        words = ["qexport", stage.command, str(self.run), *(["--target", target] if target else []), *options]
        if needs_device:
            words = ["qexport", "report", str(self.run), "--merge", "FILE..."]
        self.missing.append(
            MissingStage(
                stage=stage.name,
                target=target,
                file=stage.file,
                why=why,
                command=shlex.join(words),
                needs_device=needs_device,
            )
        )


def read_run(run: Path) -> RunResults:
    """Read every result in a run folder.

    Raises:
        RunFolderError: no such folder, no run.json or detector.json, or a file that is not of this version.
        EncodingsError: an encodings table that was edited.
    """
    if not run.is_dir():
        raise RunFolderError(f"{run}: no such folder. Give the folder that `qexport run --out` wrote.")
    record = read_json(run / RECORD.file, RECORD.kind, RunFolderError)
    detector = read_json(run / DETECTOR.file, DETECTOR.kind, RunFolderError)
    reader = _Reader(run)
    encodings = _read_encodings(reader, detector)
    accuracy = reader.optional(ACCURACY)
    detections = reader.optional(DETECTIONS)
    targets = tuple(_read_target(reader, detector, name) for name in _target_names(run))
    methods = _read_methods(reader, encodings)
    if not targets and record.settings.scheme == "int8":
        reader.miss(EXPORT, "", "no target was exported")
    return RunResults(
        folder=run,
        record=record,
        detector=detector,
        encodings=encodings,
        accuracy=accuracy,
        detections=detections,
        targets=targets,
        cross=_read_cross(reader, targets),
        methods=methods,
        methods_latency=_read_methods_latency(reader, methods) if methods else None,
        diagnosis=_read_diagnosis(reader, accuracy),
        sensitivity=_read_sensitivity(reader, encodings),
        observers=_read_observers(run, encodings),
        training=_read_origin(run, TRAINING, encodings),
        mended=_read_origin(run, MENDING, encodings),
        missing=tuple(reader.missing),
    )


def _read_cross(reader: _Reader, targets: Sequence[TargetResults]) -> CrossReport | None:
    path = reader.run / CROSS.file
    if not path.is_file():
        return None
    cross = read_json(path, CrossReport, RunFolderError)
    artifacts = {one.target: one.artifact for one in targets if one.artifact is not None}
    for target in cross.targets:
        artifact = artifacts.get(target.name)
        if target.artifact_sha256 and (artifact is None or artifact.sha256 != target.artifact_sha256):
            reader.miss(CROSS, "", "was measured on other artifacts", options=["--cross"])
            return None
    return cross


def _read_methods(reader: _Reader, encodings: Encodings | None) -> MethodsReport | None:
    path = reader.run / METHODS.file
    if not path.is_file():
        return None
    methods = read_json(path, MethodsReport, RunFolderError)
    if encodings is None or methods.rows_sha256 == encodings.rows_sha256:
        return methods
    names = [row.method for row in methods.rows if row.method != FLOAT]
    options = [word for name in names for word in ("--method", name)]
    reader.miss(METHODS, "", "were measured with other encodings", options=options)
    return None


def _read_methods_latency(reader: _Reader, methods: MethodsReport) -> MethodsLatency | None:
    path = reader.run / METHODS_LATENCY.file
    if not path.is_file():
        return None
    latency = read_json(path, MethodsLatency, RunFolderError)
    named = {row.method for row in methods.rows}
    of_these = latency.detector_sha256 == methods.detector_sha256 and latency.whole.keys() <= named
    return latency if of_these else None


def _read_diagnosis(reader: _Reader, accuracy: AccuracyReport | None) -> Diagnosis | None:
    path = reader.run / DIAGNOSIS.file
    if accuracy is None or all(gate.passed for gate in accuracy.gates) or not path.is_file():
        return None
    return read_json(path, DIAGNOSIS.kind, RunFolderError)


def _read_sensitivity(reader: _Reader, encodings: Encodings | None) -> SensitivityReport | None:
    path = reader.run / SENSITIVITY.file
    if not path.is_file():
        return None
    found = read_json(path, SENSITIVITY.kind, RunFolderError)
    if encodings is not None and found.encodings_sha256 == sha256_json(encodings):
        return found
    reader.miss(SENSITIVITY, "", "was measured with other encodings")
    return None


def _read_observers(run: Path, encodings: Encodings | None) -> ObserverReport | None:
    path = run / OBSERVERS.file
    if encodings is None or not path.is_file():
        return None
    found = read_json(path, OBSERVERS.kind, RunFolderError)
    return found if found.rows_sha256 == encodings.rows_sha256 else None


def _read_origin(run: Path, stage: Stage[_T], encodings: Encodings | None) -> _T | None:
    """Return what the checkpoint says of itself; `calibrate` writes it with the table, and takes it away with it."""
    path = run / stage.file
    return read_json(path, stage.kind, RunFolderError) if encodings is not None and path.is_file() else None


def _target_names(run: Path) -> Sequence[str]:
    return sorted(
        folder.name
        for folder in run.iterdir()
        if folder.is_dir() and any((folder / name).is_file() for name in _TARGET_FILES)
    )


def _read_encodings(reader: _Reader, detector: DetectorReport) -> Encodings | None:
    path = reader.run / ENCODINGS.file
    if not path.is_file():
        reader.miss(ENCODINGS, "", "has not run")
        return None
    encodings = load_encodings(path)
    if encodings.detector_sha256 != detector.detector_sha256:
        reader.miss(ENCODINGS, "", "was made for another detector")
        return None
    return encodings


def _read_target(reader: _Reader, detector: DetectorReport, target: str) -> TargetResults:
    artifact = reader.optional(EXPORT, target)
    if artifact is not None and artifact.detector_sha256 != detector.detector_sha256:
        reader.miss(EXPORT, target, "was made from another detector")
        artifact = None
    parity = reader.optional(PARITY, target)
    if parity is not None and not _is_of(artifact, parity.artifact_sha256):
        reader.miss(PARITY, target, "was measured on another artifact")
        parity = None
    needs_device = parity is not None and parity.rung != "run"
    measurements = _read_measurements(reader, target, artifact)
    latency = None
    if not (needs_device and measurements):
        latency = reader.optional(LATENCY, target, needs_device=needs_device)
    if latency is not None and not _is_of(artifact, latency.artifact_sha256):
        reader.miss(LATENCY, target, "was measured on another artifact")
        latency = None
    curve = _read_curve(reader, target, artifact)
    return TargetResults(
        target=target,
        artifact=artifact,
        parity=parity,
        latency=latency,
        complexity=reader.optional(COMPLEXITY, target),
        memory=None if needs_device else reader.optional(MEMORY, target),
        engines=load_engines(reader.run / target).engines,
        measurements=measurements,
        proposals=curve,
        proposals_latency=_read_curve_latency(reader, target, curve) if curve else None,
    )


def _read_curve(reader: _Reader, target: str, artifact: Artifact | None) -> ProposalCurve | None:
    path = reader.run / target / PROPOSALS.file
    if not path.is_file():
        return None
    curve = read_json(path, ProposalCurve, RunFolderError)
    if artifact is None or curve.artifact_sha256 == artifact.sha256:
        return curve
    numbers = ",".join(str(point.proposals) for point in curve.points)
    reader.miss(PROPOSALS, target, "was measured on another artifact", options=["--proposals", numbers])
    return None


def _read_curve_latency(reader: _Reader, target: str, curve: ProposalCurve) -> ProposalLatency | None:
    """Return the times of exactly the curve's artifacts; those of others are of a curve that was replaced."""
    path = reader.run / target / PROPOSALS_LATENCY.file
    if not path.is_file():
        return None
    latency = read_json(path, ProposalLatency, RunFolderError)
    timed = {point.artifact_sha256 for point in latency.points}
    return latency if timed == {point.artifact_sha256 for point in curve.points} else None


def _read_measurements(reader: _Reader, target: str, artifact: Artifact | None) -> tuple[LatencyProfile, ...]:
    found = []
    for path in sorted((reader.run / target / MEASUREMENTS).glob("*.json")):
        profile = read_json(path, LatencyProfile, RunFolderError)
        if _is_of(artifact, profile.artifact_sha256):
            found.append(profile)
        else:
            where = f"on {profile.machine.processor}, of another artifact"
            reader.miss(LATENCY, target, f"was measured {where} ({path.name})", needs_device=True)
    return tuple(found)


def _is_of(artifact: Artifact | None, sha256: str) -> bool:
    """Say whether a digest is this artifact's, or one of its files'; yes where there is no artifact."""
    return artifact is None or sha256 in {artifact.sha256, *(file.sha256 for file in artifact.files)}
