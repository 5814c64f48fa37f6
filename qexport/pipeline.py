"""From a trained detector to a proven int8 artifact: the whole story.

    checkpoint ─ inspect ─► detector.json ─ calibrate ─► encodings.json ─ export ─► TARGET/artifact.json
        compare ─► TARGET/parity.json     evaluate ─► accuracy.json     bench ─► TARGET/latency.json
        cross ─► cross.json, where there are several targets     compare_methods ─► methods.json, where asked
                                    report ─► report.html

Each stage reads the files of the stages before and writes its own, whole or not at all; one that is complete
is not run again. The command line calls these functions and nothing else. In Python:

    from pathlib import Path
    from qexport import pipeline
    from qexport.settings import Settings

    work = pipeline.start(Path("runs/my"), Settings(model="model.py:build", weights="weights.pt", data="data"))
    outcome = pipeline.run_all(work, targets=["onnx"])
    print(outcome.report.html, [gate.name for gate in outcome.failed])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qexport import crossing, steps
from qexport.artifact import MANIFEST, Artifact
from qexport.calibrating import decide_encodings, inputs_of_calibrate, origin_of_checkpoint
from qexport.cross_results import CrossReport
from qexport.crossing import check_cross_targets
from qexport.dataset import load_dataset
from qexport.devices import has_device, why_untimed
from qexport.diagnosing import diagnose
from qexport.encodings import Encodings, save_encodings
from qexport.errors import RunFolderError, TargetUnavailable
from qexport.files import read_json, write_json
from qexport.layers import DetectorReport
from qexport.mend_results import ORIGIN as MENDING
from qexport.merging import merge
from qexport.method_results import MethodsLatency, MethodsReport
from qexport.methods import check_methods, measure_methods
from qexport.observer_results import OBSERVERS
from qexport.proposals import check_numbers, measure_proposals
from qexport.results import (
    AccuracyReport,
    DetectionsRecord,
    Gate,
    LatencyProfile,
    ParityReport,
    ProposalCurve,
    ProposalLatency,
)
from qexport.run_folder import open_run
from qexport.target import find_target
from qexport.training_history import ORIGIN as TRAINING
from qexport.work import Progress, Work, check_scheme, check_targets, exported_targets, resume, silent, start

if TYPE_CHECKING:
    from qexport.benchmarks.report import ExperimentFiles, ReportFiles

__all__ = [
    "Outcome",
    "Progress",
    "Work",
    "bench",
    "calibrate",
    "check_cross_targets",
    "check_methods",
    "check_scheme",
    "check_targets",
    "compare",
    "compare_methods",
    "cross",
    "evaluate",
    "export",
    "exported_targets",
    "inspect",
    "merge",
    "price_proposals",
    "report",
    "report_experiments",
    "resume",
    "run_all",
    "silent",
    "start",
]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to."""

    gates: tuple[Gate, ...]
    report: ReportFiles
    untimed: tuple[str, ...] = ()
    """For each target whose device is not here: that it was not timed, and how to have it timed."""
    uncrossed: tuple[str, ...] = ()
    """For each target that is not in the table of targets against each other: why."""

    @property
    def failed(self) -> tuple[Gate, ...]:
        """The gates that failed."""
        return tuple(gate for gate in self.gates if not gate.passed)


def inspect(work: Work) -> DetectorReport:
    """Say what the detector is, and what will be quantized: `detector.json`."""
    from qexport.benchmarks.complexity import average_sparsity, count_parameters  # noqa: PLC0415
    from qexport.detectors.fingerprint import fingerprint  # noqa: PLC0415

    subject, static = work.subject, work.subject.static
    identity = fingerprint(static)

    def write() -> None:
        report = DetectorReport(
            source=work.settings.model,
            detector_sha256=identity,
            backbone=subject.loaded.backbone,
            labels=subject.labels,
            frame_px=subject.frame_px,
            resized_px=(static.spec.resized_height_px, static.spec.resized_width_px),
            padded_px=(static.spec.padded_height_px, static.spec.padded_width_px),
            proposals=static.proposals,
            detections=static.detections,
            parameters=count_parameters(static),
            macs=sum(layer.macs for layer in subject.layers),
            average_sparsity=average_sparsity(static),
            layers=subject.layers,
        )
        write_json(work.folder.file("detector.json"), report)

    inputs = {
        "detector": [work.settings.model, identity, subject.labels, subject.frame_px],
        "options": [static.proposals, static.detections, static.spec.preprocess, work.settings.keep_float],
    }
    work.folder.stage("inspect", inputs, ["detector.json"], write)
    return read_json(work.folder.file("detector.json"), DetectorReport, RunFolderError)


def calibrate(work: Work) -> Encodings:
    """Decide every scale, from images or by a QAT checkpoint: `encodings.json`; with `auto` `observers.json` too.

    What a checkpoint of `qexport qat` or `qexport mend` says of itself is kept: `training.json`, `mending.json`.
    """
    inspect(work)
    origins = origin_of_checkpoint(work)

    def write() -> None:
        encodings, observers = decide_encodings(work)
        work.folder.discard()  # a report never holds measurements of two tables
        for name in (OBSERVERS, MENDING, TRAINING):
            work.folder.file(name).unlink(missing_ok=True)
        for name, origin in origins.items():
            write_json(work.folder.file(name), origin)
        if observers is not None:
            write_json(work.folder.file(OBSERVERS), observers)
        save_encodings(encodings, work.folder.file("encodings.json"))

    outputs = ["encodings.json", *origins, *([OBSERVERS] if work.settings.observer == "auto" else [])]
    if work.folder.stage("calibrate", inputs_of_calibrate(work), outputs, write):
        work.forget_encodings()
    return work.encodings


def export(work: Work, target: str) -> Artifact:
    """Lower the quantized detector to a target: `TARGET/artifact.json` and its files."""
    find_target(target).require("export")
    check_scheme(work.settings.scheme, [target])
    options = steps.options_of(work, target)
    _ = work.encodings  # checked, also where the artifact is there already

    def write() -> None:
        quantized = work.quantized
        work.folder.discard(
            f"compare.{target}", f"bench.{target}", f"detect.{target}", "evaluate", crossing.STAGE
        )
        (work.path / target / MANIFEST).unlink(
            missing_ok=True
        )  # the files it names are replaced, one after another
        steps.export_artifact(
            work,
            target,
            work.path / target,
            static=work.subject.static,
            quantized=quantized,
            title=f"export {target}",
        )

    inputs = {
        "encodings": work.folder.digest("encodings.json"),
        "detector": work.folder.digest("detector.json"),
        "options": options,
    }
    outputs = [f"{target}/{MANIFEST}", f"{target}/complexity.json"]
    work.folder.stage(f"export.{target}", inputs, outputs, write)
    return work.artifact(target)[0]


def compare(work: Work, target: str) -> ParityReport:
    """Compare an artifact with its references, layer by layer: `TARGET/parity.json`."""
    find_target(target).require("measure")
    artifact, folder = work.artifact(target)
    layers = inspect(work).layers

    def write() -> None:
        steps.compare_artifact(
            work, target, folder, quantized=work.quantized, layers=layers, title=f"compare {target}"
        )

    inputs = steps.inputs_of_compare(work, artifact)
    work.folder.stage(f"compare.{target}", inputs, [f"{target}/parity.json"], write)
    return read_json(folder / "parity.json", ParityReport, RunFolderError)


def cross(work: Work, targets: Sequence[str]) -> CrossReport:
    """Compare every target with every other, each layer given what the quantized reference computes: `cross.json`.

    Raises:
        QexportError: fewer than two targets, or one given twice.
        TargetUnavailable: a target's layers cannot be run one by one here.
        ArtifactError: artifacts that are not the same model.
    """
    check_cross_targets(targets)
    return crossing.cross(work, targets, inspect(work).layers)


def evaluate(work: Work, targets: Sequence[str]) -> AccuracyReport:
    """Measure mAP of the eager detector, the quantized reference and each artifact: `accuracy.json`.

    Eager is the original detector where its weights are given beside a QAT checkpoint; the checkpoint's own floats have
    a row then, too.
    """
    from qexport.benchmarks import detect  # noqa: PLC0415
    from qexport.benchmarks.accuracy import evaluate as measure  # noqa: PLC0415

    if targets:
        check_scheme(work.settings.scheme, targets)
    folder, dataset, settings = work.folder, work.subject.evaluation, work.settings
    weights = [folder.record.weights_sha256, folder.digest("detector.json")]
    table = [*weights, work.encodings.rows_sha256]
    found = {
        **steps.detect_floats(work),
        "reference": steps.detect_split(work, "reference", table, lambda: detect.reference(work.quantized)),
    }
    for target in targets:
        artifact, place = work.artifact(target)
        found[target] = steps.detect_artifact(work, target, artifact, place)

    def write() -> None:
        write_json(folder.file("detections.json"), DetectionsRecord(subjects=found))
        with work.progress("evaluate mAP", 1) as step:
            boxes = {
                subject: [detect.to_arrays(image) for image in images] for subject, images in found.items()
            }
            accuracy = measure(
                dataset, boxes, seed=settings.seed, max_drop=settings.max_drop, ungated=[steps.CHECKPOINT]
            )
            step()
        write_json(folder.file("accuracy.json"), accuracy)

    inputs = {
        "detections": [[subject, folder.digest(steps.detections_file(subject))] for subject in found],
        "options": [dataset.sha256, settings.max_drop, settings.seed],
    }
    folder.stage("evaluate", inputs, ["detections.json", "accuracy.json"], write)
    accuracy = read_json(folder.file("accuracy.json"), AccuracyReport, RunFolderError)
    diagnose(work, accuracy)
    return accuracy


def compare_methods(
    work: Work, methods: Sequence[str], *, runs: int = 30, warmup: int = 3
) -> tuple[MethodsReport, MethodsLatency | None]:
    """Measure other methods of quantization on the same detector: `methods.json`, `methods_latency.json`.

    The latency is None where no method that has kernels was asked for.

    Raises:
        QexportError: no such method, one given twice, or one that finds nothing to quantize in this detector.
    """
    known = check_methods(methods)
    inspect(work)
    return measure_methods(work, known, runs=runs, warmup=warmup)


def price_proposals(
    work: Work, target: str, numbers: Sequence[int], *, runs: int = 30, warmup: int = 3, threads: int = 1
) -> tuple[ProposalCurve, ProposalLatency | None]:
    """Measure mAP and latency over the number of proposals: `TARGET/proposals.json`, `proposals_latency.json`.

    The latency is None where the target's device is not here.

    Args:
        work: the run.
        target: its name.
        numbers: of proposals; the run's own is always measured too, the changes are taken from it.
        runs: measured runs of each.
        warmup: runs before them that do not count.
        threads: of the runtime.

    Raises:
        QexportError: numbers that the detector cannot be measured with.
        RunFolderError: the target was not exported.
    """
    from qexport.benchmarks.proposals import Variant  # noqa: PLC0415

    artifact, folder = work.artifact(target)
    check_numbers(work, numbers)
    own = Variant(artifact=artifact, folder=folder, macs=inspect(work).macs, parity=compare(work, target))
    found = steps.detect_artifact(work, target, artifact, folder)
    return measure_proposals(
        work, target, numbers, own=own, own_detections=found, runs=runs, warmup=warmup, threads=threads
    )


def bench(
    work: Work, target: str, *, runs: int = 30, warmup: int = 3, threads: int = 1, again: bool = False
) -> LatencyProfile:
    """Measure latency, whole and per module path, and memory: `TARGET/latency.json`, `TARGET/memory.json`.

    Args:
        work: the run.
        target: its name.
        runs: measured runs of each subject.
        warmup: runs before them that do not count.
        threads: of the runtime.
        again: measure also where the stage is complete.

    Raises:
        TargetUnavailable: the target's device is not here.
    """
    find_target(target).require("measure")
    if not has_device(target):
        raise TargetUnavailable(why_untimed(target, work.path))
    artifact, folder = work.artifact(target)
    detector = inspect(work)

    def write() -> None:
        steps.bench_artifact(
            work, target, folder, layers=detector.layers, runs=runs, warmup=warmup, threads=threads
        )

    if again:
        work.folder.forget(f"bench.{target}")
    inputs = {"artifact": artifact.sha256, "options": [runs, warmup, threads, work.settings.min_accounted]}
    outputs = [f"{target}/latency.json", f"{target}/memory.json"]
    work.folder.stage(f"bench.{target}", inputs, outputs, write)
    return read_json(folder / "latency.json", LatencyProfile, RunFolderError)


def report(path: Path) -> ReportFiles:
    """Write a run's report: `report.html`, `report.json`, tables for spreadsheets."""
    from qexport.benchmarks.report import build_report  # noqa: PLC0415

    data = Path(open_run(path).settings.data)
    if data.is_file():
        root: Path | None = load_dataset(data, None).root
    else:
        root = data.resolve() if data.is_dir() else None
    return build_report(path, dataset_root=root)


def report_experiments(runs: Sequence[Path], out: Path) -> ExperimentFiles:
    """Write one table of several runs: `experiments.html`, `experiments.csv`."""
    from qexport.benchmarks.report import build_experiments  # noqa: PLC0415

    return build_experiments([open_run(run).path for run in runs], out)


def run_all(
    work: Work,
    targets: Sequence[str],
    *,
    methods: Sequence[str] = (),
    runs: int = 30,
    warmup: int = 3,
    threads: int = 1,
) -> Outcome:
    """Run every stage that is not complete; `methods` are other ways to quantize, to compare with.

    Raises:
        QexportError: no target, or one for a scheme that none runs.
    """
    check_targets(targets, whole_run=True)
    check_scheme(work.settings.scheme, targets)
    if work.settings.qat and "ptq" not in methods:
        methods = [*methods, "ptq"]  # what the same weights are worth without their own scales
    check_methods(methods)
    calibrate(work)
    gates: list[Gate] = []
    for target in targets:
        export(work, target)
        gates += compare(work, target).gates
    refusals = {target: crossing.why_not_crossed(target) for target in targets} if len(targets) > 1 else {}
    crossed = [target for target, refusal in refusals.items() if not refusal]
    if len(crossed) > 1:
        gates += cross(work, crossed).gates
    gates += evaluate(work, targets).gates
    untimed = []
    for target in targets:
        if has_device(target):
            gates += bench(work, target, runs=runs, warmup=warmup, threads=threads).gates
        else:
            untimed.append(why_untimed(target, work.path))
    if methods:
        compare_methods(work, methods, runs=runs, warmup=warmup)
    return Outcome(tuple(gates), report(work.path), tuple(untimed), tuple(filter(None, refusals.values())))
