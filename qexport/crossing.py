"""Every target of a run against every other: `cross.json`, the table where all of them meet."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from qexport import steps
from qexport.cross_results import CrossReport
from qexport.devices import runner_for
from qexport.errors import QexportError, RunFolderError, TargetUnavailable
from qexport.files import read_json, write_json
from qexport.layers import Layer
from qexport.runtimes.runner import ForcedRunner
from qexport.target import find_target
from qexport.work import Work

CROSS = "cross.json"
STAGE = "cross"


def check_cross_targets(targets: Sequence[str]) -> None:
    """Refuse targets that no table can be made of here.

    Raises:
        QexportError: fewer than two, or one given twice.
        TargetUnavailable: packages are missing, or a target's layers cannot be run one by one here.
    """
    if len(targets) < 2:
        given = f"only {targets[0]} was" if targets else "none was"
        raise QexportError(
            f"a table of targets against each other takes two or more, and {given} given or exported. Export another "
            "one: qexport export RUN --target NAME"
        )
    twice = sorted({name for name in targets if targets.count(name) > 1})
    if twice:
        raise QexportError(
            f"--target {twice[0]} is given more than once; a target meets the others, not itself."
        )
    for name in targets:
        find_target(name).require("measure")
        refusal = why_not_crossed(name)
        if refusal:
            raise TargetUnavailable(refusal)


def why_not_crossed(target: str) -> str:
    """Return why a target's layers cannot be given their inputs here; empty where they can."""
    if issubclass(runner_for(target), ForcedRunner):
        return ""
    return (
        f"{target}: inside an engine on a GPU no layer can be given its inputs, so it is not in the table of targets "
        "against each other. Where no GPU is its network is evaluated, layer by layer: make the table there "
        "(qexport compare RUN --cross)."
    )


def cross(work: Work, targets: Sequence[str], layers: Sequence[Layer]) -> CrossReport:
    """Compare each target with each other, layer by layer, on what the quantized reference computes.

    Args:
        work: the run.
        targets: their names, as `check_cross_targets` lets them pass.
        layers: of the detector.

    Raises:
        RunFolderError: a target was not exported.
        ArtifactError: an artifact is of other encodings, or of another frame, than the others.
    """
    artifacts = [work.artifact(target) for target in targets]
    samples = work.subject.parity_samples()

    def write() -> None:
        from qexport.benchmarks.cross import compare_all  # noqa: PLC0415 - torch begins here

        with work.progress("compare targets", len(samples)) as step, ExitStack() as stack:
            runners = [
                stack.enter_context(runner_for(artifact.target)(folder, threads=steps.all_threads()))
                for artifact, folder in artifacts
            ]
            report = compare_all(
                work.quantized,
                runners,
                layers,
                work.subject.frames(samples),
                split=work.subject.evaluation.split,
                on_image=step,
            )
        write_json(work.folder.file(CROSS), report)

    inputs = {
        "artifacts": [[artifact.sha256, runner_for(artifact.target).rung] for artifact, _ in artifacts],
        "images": work.subject.evaluation.sha256,
        "options": [work.settings.parity_images, work.settings.seed],
    }
    work.folder.stage(STAGE, inputs, [CROSS], write)
    return read_json(work.folder.file(CROSS), CrossReport, RunFolderError)
