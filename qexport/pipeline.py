"""From a trained detector to a proven int8 artifact: the whole story.

    checkpoint ─ inspect ─► detector.json ─ calibrate ─► encodings.json ─ export ─► TARGET/artifact.json
        compare ─► TARGET/parity.json     evaluate ─► accuracy.json     bench ─► TARGET/latency.json
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

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qexport.artifact import MANIFEST, Artifact
from qexport.dataset import load_dataset
from qexport.devices import has_device, runner_for, why_untimed
from qexport.encodings import Encodings, save_encodings
from qexport.engines import load_engines
from qexport.errors import RunFolderError, TargetUnavailable
from qexport.files import read_json, write_json
from qexport.layers import DetectorReport
from qexport.merging import merge
from qexport.results import (
    AccuracyReport,
    DetectionsRecord,
    Gate,
    ImageDetections,
    LatencyProfile,
    MemoryUse,
    ParityReport,
)
from qexport.run_folder import open_run
from qexport.target import find_target
from qexport.target_options import read_options
from qexport.work import Progress, Work, check_targets, exported_targets, resume, silent, start

if TYPE_CHECKING:
    from qexport.benchmarks.detect import Detect
    from qexport.benchmarks.report import ExperimentFiles, ReportFiles

__all__ = [
    "Outcome",
    "Progress",
    "Work",
    "bench",
    "calibrate",
    "check_targets",
    "compare",
    "evaluate",
    "export",
    "exported_targets",
    "inspect",
    "merge",
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
    """Decide every scale from images: `encodings.json`."""
    from qexport.calibration.calibrator import calibrate as decide  # noqa: PLC0415

    inspect(work)
    settings, subject = work.settings, work.subject

    def write() -> None:
        samples = subject.calibration_samples()
        with work.progress("calibrate", len(samples)) as step:
            encodings = decide(
                subject.static,
                subject.inputs(samples),
                observer=settings.observer,
                percentile=settings.percentile,
                keep_float=settings.keep_float,
                notes={
                    "dataset": subject.calibration.name,
                    "dataset_sha256": subject.calibration.sha256,
                    "split": subject.calibration.split,
                    "seed": settings.seed,
                },
                on_image=step,
            )
        work.folder.discard()  # a report never holds measurements of two tables
        save_encodings(encodings, work.folder.file("encodings.json"))

    inputs = {
        "detector": work.folder.digest("detector.json"),
        "images": subject.calibration.sha256,
        "options": [settings.calibration_images, settings.observer, settings.percentile, settings.seed],
    }
    if work.folder.stage("calibrate", inputs, ["encodings.json"], write):
        work.forget_encodings()
    return work.encodings


def export(work: Work, target: str) -> Artifact:
    """Lower the quantized detector to a target: `TARGET/artifact.json` and its files."""
    from qexport.benchmarks.complexity import count_complexity  # noqa: PLC0415

    found = find_target(target)
    found.require("export")
    options = read_options(found.options, target, work.settings.target_options)
    exporter: Any = importlib.import_module(f"qexport.exporters.{target}")
    folder, subject = work.path / target, work.subject
    encodings = work.encodings  # checked, also where the artifact is there already

    def write() -> None:
        quantized = work.quantized
        work.folder.discard(f"compare.{target}", f"bench.{target}", f"detect.{target}", "evaluate")
        with work.progress(f"export {target}", 2) as step:
            artifact = exporter.export(quantized, encodings, folder, labels=subject.labels, options=options)
            step()
            float_bytes, artifact_bytes = (_size_bytes(artifact, folder, role) for role in ("fp32", "int8"))
            complexity = count_complexity(
                subject.static,
                (subject.static.example_input(),),
                weight_codes=quantized.weight_codes(),
                float_bytes=float_bytes,
                artifact_bytes=artifact_bytes,
            )
            write_json(folder / "complexity.json", complexity)
            step()

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
    from qexport.benchmarks.parity import compare as measure  # noqa: PLC0415

    find_target(target).require("measure")
    artifact, folder = work.artifact(target)
    detector, settings, evaluation = inspect(work), work.settings, work.subject.evaluation

    def write() -> None:
        samples = work.subject.parity_samples()
        with (
            work.progress(f"compare {target}", len(samples)) as step,
            runner_for(target)(folder, threads=_threads()) as runner,
        ):
            parity = measure(
                work.quantized,
                runner,
                detector.layers,
                work.subject.frames(samples),
                split=evaluation.split,
                tolerance_steps=settings.tolerance_steps,
                max_unmatched=settings.max_unmatched,
                on_image=step,
            )
        write_json(folder / "parity.json", parity)

    inputs = {
        "artifact": artifact.sha256,
        "runner": runner_for(target).rung,
        "images": evaluation.sha256,
        "options": [settings.parity_images, settings.tolerance_steps, settings.max_unmatched, settings.seed],
    }
    work.folder.stage(f"compare.{target}", inputs, [f"{target}/parity.json"], write)
    return read_json(folder / "parity.json", ParityReport, RunFolderError)


def evaluate(work: Work, targets: Sequence[str]) -> AccuracyReport:
    """Measure mAP of the eager detector, the quantized reference and each artifact: `accuracy.json`."""
    from qexport.benchmarks import detect  # noqa: PLC0415
    from qexport.benchmarks.accuracy import evaluate as measure  # noqa: PLC0415

    folder, dataset, settings = work.folder, work.subject.evaluation, work.settings
    weights = [folder.record.weights_sha256, folder.digest("detector.json")]
    table = [*weights, work.encodings.rows_sha256]
    found = {
        "eager": _detect(work, "eager", weights, lambda: detect.eager(work.subject.loaded)),
        "reference": _detect(work, "reference", table, lambda: detect.reference(work.quantized)),
    }
    for target in targets:
        artifact, place = work.artifact(target)
        run = partial(detect.artifact, runner_for(target), place, _threads())
        found[target] = _detect(work, target, [artifact.sha256, runner_for(target).rung], run)

    def write() -> None:
        write_json(folder.file("detections.json"), DetectionsRecord(subjects=found))
        with work.progress("evaluate mAP", 1) as step:
            boxes = {
                subject: [detect.to_arrays(image) for image in images] for subject, images in found.items()
            }
            accuracy = measure(dataset, boxes, seed=settings.seed, max_drop=settings.max_drop)
            step()
        write_json(folder.file("accuracy.json"), accuracy)

    inputs = {
        "detections": [[subject, folder.digest(f"detections/{subject}.json")] for subject in found],
        "options": [dataset.sha256, settings.max_drop, settings.seed],
    }
    folder.stage("evaluate", inputs, ["detections.json", "accuracy.json"], write)
    return read_json(folder.file("accuracy.json"), AccuracyReport, RunFolderError)


def _detect(
    work: Work,
    subject: str,
    identity: Sequence[str | None],
    source: Callable[[], AbstractContextManager[Detect]],
) -> tuple[ImageDetections, ...]:
    """Return what a subject detects on the whole split: `detections/SUBJECT.json`."""
    from qexport.benchmarks import detect  # noqa: PLC0415

    dataset, name = work.subject.evaluation, f"detections/{subject}.json"

    def write() -> None:
        with work.progress(f"detect {subject}", len(dataset.samples)) as step, source() as run:
            images = detect.over(dataset, work.subject.frame_px, run, on_image=step)
        write_json(work.folder.file(name), DetectionsRecord(subjects={subject: images}))

    work.folder.stage(f"detect.{subject}", {"of": identity, "images": dataset.sha256}, [name], write)
    return read_json(work.folder.file(name), DetectionsRecord, RunFolderError).subjects[subject]


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
    from qexport.benchmarks.latency import measure_latency  # noqa: PLC0415

    find_target(target).require("measure")
    if not has_device(target):
        raise TargetUnavailable(why_untimed(target, work.path))
    artifact, folder = work.artifact(target)
    detector = inspect(work)

    def write() -> None:
        frame = next(work.subject.frames(work.subject.parity_samples()))
        with work.progress(f"bench {target}", 3 * (runs + warmup) + 2) as step:
            memory = _peak_memory(folder, step)
            profile = measure_latency(
                artifact=folder,
                runner=runner_for(target),
                detector=work.subject.loaded,
                frame=np.ascontiguousarray(frame),
                layers=detector.layers,
                warmup=warmup,
                runs=runs,
                threads=threads,
                min_accounted=work.settings.min_accounted,
                on_run=step,
            )
        write_json(folder / "memory.json", memory)
        write_json(folder / "latency.json", profile)

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
    work: Work, targets: Sequence[str], *, runs: int = 30, warmup: int = 3, threads: int = 1
) -> Outcome:
    """Run every stage that is not complete."""
    check_targets(targets, whole_run=True)
    calibrate(work)
    gates: list[Gate] = []
    for target in targets:
        export(work, target)
        gates += compare(work, target).gates
    gates += evaluate(work, targets).gates
    untimed = []
    for target in targets:
        if has_device(target):
            gates += bench(work, target, runs=runs, warmup=warmup, threads=threads).gates
        else:
            untimed.append(why_untimed(target, work.path))
    return Outcome(tuple(gates), report(work.path), tuple(untimed))


def _size_bytes(artifact: Artifact, folder: Path, role: str) -> int:
    """Return the size of what runs: the engine that was built of a file, else the file itself."""
    engine = load_engines(folder).of(role)
    return engine.size_bytes if engine is not None else artifact.file(role).size_bytes


def _peak_memory(folder: Path, step: Callable[[], None]) -> tuple[MemoryUse, ...]:
    from qexport.benchmarks.complexity import peak_memory  # noqa: PLC0415

    memory = []
    for subject, role in (("artifact", "int8"), ("fp32", "fp32")):
        command = [sys.executable, "-m", "qexport.runtimes.once", str(folder), role]
        memory.append(MemoryUse(subject=subject, peak_bytes=peak_memory(command)))
        step()
    return tuple(memory)


def _threads() -> int:
    return os.cpu_count() or 1
