"""Measurements that boards made, taken up into the run whose artifact they are of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from qexport import measurement as measured
from qexport.artifact import MANIFEST, Artifact, load_artifact
from qexport.errors import ArtifactError, RunFolderError
from qexport.files import read_json, write_json
from qexport.layers import DetectorReport
from qexport.results import LatencyProfile
from qexport.run_folder import RunFolder, open_run
from qexport.target import find_target
from qexport.work import exported_targets

if TYPE_CHECKING:
    from qexport.benchmarks.trtexec_profile import Measurement


def merge(path: Path, files: Sequence[Path]) -> Path:
    """Take up what a board measured of an artifact of this run: `TARGET/measurements/NAME.json`.

    Args:
        path: the run's folder.
        files: of one measurement, in any order: `deploy/jetson/measure.sh` writes four, `qexport bench BUNDLE` one.

    Raises:
        ArtifactError: a file is missing, cut off, of no known kind, or of another engine or artifact than the run's.
    """
    from qexport.benchmarks.trtexec_profile import latency_profile, read_measurement  # noqa: PLC0415

    run = open_run(path)
    for folder in (file for file in files if file.is_dir()):
        raise ArtifactError(
            f"{folder}: is a folder. Give the files of one measurement that lie in it: "
            f"qexport report {path} --merge {folder}/*.json"
        )
    bundled = [file for file in files if measured.is_measurement(file)]
    if bundled:
        if len(files) > 1:
            raise ArtifactError(
                f"{bundled[0]} is a measurement by itself; it was given with {len(files) - 1} other files. "
                "Merge one measurement at a time."
            )
        return _merge_bundled(run, bundled[0])
    measurement = read_measurement(files)
    detector = read_json(run.file("detector.json"), DetectorReport, RunFolderError)
    target, artifact = _measured_artifact(run, measurement)
    profile = latency_profile(
        measurement,
        artifact=artifact,
        detector_layers=detector.layers,
        min_accounted=run.settings.min_accounted,
    )
    return _write(run, target, profile, profile.machine.processor)


def _merge_bundled(run: RunFolder, file: Path) -> Path:
    """Take up what `qexport bench BUNDLE` measured."""
    measurement = measured.read_measurement(file)
    target = measurement.target
    run.require(f"{target}/{MANIFEST}", f"qexport export {run.path} --target {target}")
    artifact, folder = load_artifact(run.path / target)
    own = artifact.file("int8").sha256
    if measurement.file_sha256 != own:
        raise ArtifactError(
            f"{file}: measured on another artifact: the {target} file that ran has SHA-256 {measurement.file_sha256}, "
            f"that of {folder} has {own}. Bundle this run, measure the bundle, or merge into the run it was made of."
        )
    # The same bytes: the artifact's own digest also counts what a version of qexport writes into its manifest.
    profile = msgspec.structs.replace(measurement.profile, artifact_sha256=artifact.sha256)
    threads = f"{profile.threads} thread{'' if profile.threads == 1 else 's'}"
    return _write(run, target, profile, f"{profile.machine.processor} {threads}")


def _write(run: RunFolder, target: str, profile: LatencyProfile, title: str) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    return write_json(run.path / target / "measurements" / f"{name}.json", profile)


def _measured_artifact(run: RunFolder, measurement: Measurement) -> tuple[str, Artifact]:
    """Return the artifact whose engine was measured: by its .onnx, else the one that has the road of trtexec."""
    found = {
        target: load_artifact(run.path / target)[0]
        for target in exported_targets(run.path)
        if find_target(target).runtime == "tensorrt"
    }
    engine = measurement.board.engine
    for target, artifact in found.items():
        if engine is not None and engine.onnx_sha256 == artifact.file("int8").sha256:
            return target, artifact
    if "tensorrt" not in found:
        raise RunFolderError(
            f"{run.path} holds no TensorRT artifact that this can be a measurement of. "
            f"Run `qexport export {run.path} --target tensorrt` first."
        )
    return "tensorrt", found["tensorrt"]
