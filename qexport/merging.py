"""Measurements that boards made, taken up into the run whose artifact they are of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qexport.artifact import Artifact, load_artifact
from qexport.errors import RunFolderError
from qexport.files import read_json, write_json
from qexport.layers import DetectorReport
from qexport.run_folder import RunFolder, open_run
from qexport.target import find_target
from qexport.work import exported_targets

if TYPE_CHECKING:
    from qexport.benchmarks.trtexec_profile import Measurement


def merge(path: Path, files: Sequence[Path]) -> Path:
    """Take up what a board measured of an artifact of this run: `TARGET/measurements/BOARD.json`.

    Args:
        path: the run's folder.
        files: of one measurement, in any order: `deploy/jetson/measure.sh` writes four.

    Raises:
        ArtifactError: a file is missing, cut off, of no known kind, or of another engine than the run's.
    """
    from qexport.benchmarks.trtexec_profile import latency_profile, read_measurement  # noqa: PLC0415

    run = open_run(path)
    measurement = read_measurement(files)
    detector = read_json(run.file("detector.json"), DetectorReport, RunFolderError)
    target, artifact = _measured_artifact(run, measurement)
    profile = latency_profile(
        measurement,
        artifact=artifact,
        detector_layers=detector.layers,
        min_accounted=run.settings.min_accounted,
    )
    name = re.sub(r"[^a-z0-9]+", "-", profile.machine.processor.lower()).strip("-")
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
