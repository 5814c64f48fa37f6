"""Look at everything, and say what stands in the way of what was asked."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import qexport
from qexport.artifact import load_artifact
from qexport.doctor.compatibility import Here, check_artifact, check_target
from qexport.doctor.findings import ArtifactFinding, Diagnosis, Finding, TargetFinding
from qexport.doctor.jetson import find_jetson, jetson_findings
from qexport.doctor.nvidia import find_driver, nvidia_findings
from qexport.doctor.packages import package_findings, torch2trt_finding, torch_cuda
from qexport.doctor.requirements import installed_ranges
from qexport.doctor.system import opset_finding, system_findings
from qexport.doctor.tensorrt import find_tensorrt, tensorrt_findings
from qexport.errors import ArtifactError
from qexport.target import TARGETS, find_target

# What `qexport run` does. Whether something runs on its own device is asked of an artifact.
_ASKED = ("export", "measure")


def examine(
    artifact: Path | None = None,
    targets: Sequence[str] = (),
    *,
    root: Path = Path("/"),
) -> Diagnosis:
    """Look at this machine.

    Args:
        artifact: folder of an artifact that should run here.
        targets: names of targets that should be exported and measured here, as `qexport run` does it; without a
            GPU, TensorRT's networks are evaluated in torch.
        root: folder that stands for `/` where files are read.

    Returns:
        What was found. Its problems are those of the artifact and of the targets asked for; where nothing was
        asked for, they are what is installed but does not fit.

    Raises:
        QexportError: no such target.
        ArtifactError: the artifact is missing, or was edited.
    """
    asked = [find_target(name).name for name in targets]
    if artifact is not None and not artifact.exists():
        raise ArtifactError(
            f"{artifact}: no such file or folder. Give the folder that `qexport export` wrote."
        )
    loaded = load_artifact(artifact) if artifact is not None else None

    ranges, tensorrt = installed_ranges(), find_tensorrt()
    driver, jetson = find_driver(root), find_jetson(root)
    python = ".".join(platform.python_version_tuple()[:2])
    findings = (
        *system_findings(root, ranges),
        *package_findings(ranges),
        opset_finding(),
        *tensorrt_findings(root, tensorrt, ranges, jetson),
        torch2trt_finding(ranges),
        *nvidia_findings(root, driver, torch_cuda=torch_cuda(), jetson=jetson is not None),
        *jetson_findings(jetson, python=python, tensorrt_dla=tensorrt.dla_cores if tensorrt else None),
    )
    here = Here(ranges, tensorrt, driver, jetson)
    verdicts = tuple(check_target(target, here) for target in TARGETS)
    of_artifact = check_artifact(*loaded, here) if loaded else None
    problems = _problems(findings, [one for one in verdicts if one.name in asked], of_artifact)
    return Diagnosis(
        qexport=qexport.__version__,
        ok=not problems,
        problems=problems,
        findings=findings,
        targets=verdicts,
        artifact=of_artifact,
    )


def _problems(
    findings: Sequence[Finding], asked: Sequence[TargetFinding], artifact: ArtifactFinding | None
) -> tuple[str, ...]:
    if not asked and artifact is None:
        return tuple(
            f"{one.group}: {one.name} {one.found}: {one.advice}"
            for one in findings
            if one.state == "incompatible"
        )
    of_targets = [
        f"target {target.name}: cannot {one.ability} here: {', '.join(one.problems)}"
        + (f". Install: {one.advice}" if one.advice else "")
        for target in asked
        for one in target.abilities
        if one.ability in _ASKED and not one.possible
    ]
    if artifact is None or artifact.runs:
        return tuple(of_targets)
    return (
        *of_targets,
        f"artifact {artifact.path}: cannot run here: {'; '.join(artifact.problems)}"
        + (f". Do: {artifact.advice}" if artifact.advice else ""),
    )
