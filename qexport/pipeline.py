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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

import qexport
from qexport.artifact import MANIFEST, Artifact, load_artifact
from qexport.encodings import Encodings, load_encodings, save_encodings
from qexport.errors import ArtifactError, EncodingsError, RunFolderError
from qexport.files import read_json, write_json
from qexport.layers import DetectorReport
from qexport.results import (
    AccuracyReport,
    DetectionsRecord,
    Gate,
    ImageDetections,
    LatencyProfile,
    MemoryUse,
    ParityReport,
)
from qexport.run_folder import RunFolder, create_run, open_run
from qexport.settings import RunRecord, Settings
from qexport.subject import Subject
from qexport.target import TARGETS, find_target
from qexport.versions import package_versions

if TYPE_CHECKING:
    from qexport.benchmarks.report import ReportFiles
    from qexport.quantization.reference import QuantizedDetector

Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
"""Called with a title and a number of steps; gives what is called after each step."""

_PACKAGES = ("torch", "torchvision", "torchao", "onnx", "onnxscript", "onnxruntime", "numpy", "pillow", "pycocotools")


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
    def settings(self) -> Settings:
        """What was asked."""
        return self.folder.settings

    @cached_property
    def encodings(self) -> Encodings:
        """The table that `calibrate` wrote, checked to be this detector's."""
        from qexport.detectors.fingerprint import fingerprint  # noqa: PLC0415 - torch begins here

        path = self.folder.require("encodings.json", f"qexport calibrate {self.folder.path}")
        encodings = load_encodings(path)
        own = fingerprint(self.subject.static)
        if encodings.detector_sha256 != own:
            raise EncodingsError(
                f"{path}: made for another detector (fingerprint {encodings.detector_sha256[:12]}, this one's is "
                f"{own[:12]}). Run `qexport calibrate {self.folder.path}` again."
            )
        return encodings

    @cached_property
    def quantized(self) -> QuantizedDetector:
        """The detector with its encodings applied."""
        from qexport.quantization.reference import quantize  # noqa: PLC0415 - torch begins here

        return quantize(self.subject.static, self.encodings)

    def artifact(self, target: str) -> tuple[Artifact, Path]:
        """Return a target's artifact, checked to be made of these encodings."""
        folder = self.folder.path / target
        self.folder.require(f"{target}/{MANIFEST}", f"qexport export {self.folder.path} --target {target}")
        artifact, _ = load_artifact(folder)
        return artifact, folder


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to."""

    gates: tuple[Gate, ...]
    report: ReportFiles

    @property
    def failed(self) -> tuple[Gate, ...]:
        """The gates that failed."""
        return tuple(gate for gate in self.gates if not gate.passed)


def start(path: Path, settings: Settings, *, command: str = "", progress: Progress = silent) -> Work:
    """Make a run's folder, or take up the run in it; detector and data are checked first.

    Raises:
        QexportError: the detector, the data or the folder cannot be used. Nothing was written then.
    """
    subject = Subject(settings)
    record = RunRecord(
        settings=subject.resolved(),
        weights_sha256=subject.weights_sha256,
        dataset_name=subject.evaluation.name,
        dataset_sha256=subject.dataset_sha256,
        qexport_version=qexport.__version__,
        versions={"python": ".".join(map(str, sys.version_info[:3])), **package_versions(*_PACKAGES)},
        command=command,
    )
    _ = subject.static  # a detector that cannot run on such frames is found out before anything is written
    return Work(create_run(path, record), subject, progress)


def resume(path: Path, *, progress: Progress = silent) -> Work:
    """Open a run that was started before.

    Raises:
        RunFolderError: there is none, or its weights changed since.
    """
    folder = open_run(path)
    subject = Subject(folder.settings)
    if subject.weights_sha256 != folder.record.weights_sha256:
        raise RunFolderError(
            f"{folder.settings.weights} changed since {path} was started. Start a new run with another --out."
        )
    return Work(folder, subject, progress)


def inspect(work: Work) -> DetectorReport:
    """Say what the detector is, and what will be quantized: `detector.json`."""
    from qexport.benchmarks.complexity import average_sparsity, count_parameters  # noqa: PLC0415
    from qexport.detectors.fingerprint import fingerprint  # noqa: PLC0415
    from qexport.quantization.inspection import inspect_layers  # noqa: PLC0415

    subject, settings = work.subject, work.settings

    def write() -> None:
        static = subject.static
        layers = inspect_layers(static, keep_float=settings.keep_float)
        report = DetectorReport(
            source=settings.model,
            detector_sha256=fingerprint(static),
            backbone=subject.loaded.backbone,
            labels=subject.labels,
            frame_px=subject.frame_px,
            resized_px=(static.spec.resized_height_px, static.spec.resized_width_px),
            padded_px=(static.spec.padded_height_px, static.spec.padded_width_px),
            proposals=static.proposals,
            detections=static.detections,
            parameters=count_parameters(static),
            macs=sum(layer.macs for layer in layers),
            average_sparsity=average_sparsity(static),
            layers=layers,
        )
        write_json(work.folder.file("detector.json"), report)

    inputs = {
        "weights": work.folder.record.weights_sha256,
        "data": work.folder.record.dataset_sha256,
        "settings": settings,
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
                    "split": subject.calibration.split or "",
                    "seed": settings.seed,
                },
                on_image=step,
            )
        save_encodings(encodings, work.folder.file("encodings.json"))

    inputs = {
        "detector": work.folder.digest("detector.json"),
        "images": subject.calibration.sha256,
        "options": [settings.calibration_images, settings.observer, settings.percentile, settings.seed],
    }
    if work.folder.stage("calibrate", inputs, ["encodings.json"], write):
        for stale in ("encodings", "quantized"):
            work.__dict__.pop(stale, None)
    return work.encodings


def export(work: Work, target: str) -> Artifact:
    """Lower the quantized detector to a target: `TARGET/artifact.json` and its files."""
    from qexport.benchmarks.complexity import count_complexity  # noqa: PLC0415

    find_target(target).require("export")
    exporter: Any = importlib.import_module(f"qexport.exporters.{target}")
    folder = work.folder.path / target

    def write() -> None:
        with work.progress(f"export {target}", 2) as step:
            artifact = exporter.export(work.quantized, work.encodings, folder, labels=work.subject.labels)
            step()
            complexity = count_complexity(
                work.subject.static,
                (work.subject.static.example_input(),),
                weight_codes=work.quantized.weight_codes(),
                float_bytes=artifact.file("fp32").size_bytes,
                artifact_bytes=artifact.file("int8").size_bytes,
            )
            write_json(folder / "complexity.json", complexity)
            step()

    inputs = {"encodings": work.folder.digest("encodings.json"), "detector": work.folder.digest("detector.json")}
    outputs = [f"{target}/{name}" for name in (MANIFEST, "complexity.json")]
    _ = work.encodings  # checked, also where the artifact is there already
    work.folder.stage(f"export.{target}", inputs, outputs, write)
    return work.artifact(target)[0]


def compare(work: Work, target: str) -> ParityReport:
    """Compare an artifact with its references, layer by layer: `TARGET/parity.json`."""
    from qexport.benchmarks.parity import compare as measure  # noqa: PLC0415

    find_target(target).require("measure")
    artifact, folder = work.artifact(target)
    detector = inspect(work)
    settings = work.settings

    def write() -> None:
        samples = work.subject.parity_samples()
        runner = _runner(target)
        with work.progress(f"compare {target}", len(samples)) as step, runner(folder, threads=_threads()) as running:
            report = measure(
                work.quantized,
                running,
                detector.layers,
                work.subject.frames(samples),
                split=work.subject.evaluation.split or "",
                tolerance_steps=settings.tolerance_steps,
                max_unmatched=settings.max_unmatched,
                on_image=step,
            )
        write_json(folder / "parity.json", report)

    inputs = {
        "artifact": artifact.sha256,
        "images": work.subject.evaluation.sha256,
        "options": [settings.parity_images, settings.tolerance_steps, settings.max_unmatched, settings.seed],
    }
    work.folder.stage(f"compare.{target}", inputs, [f"{target}/parity.json"], write)
    return read_json(folder / "parity.json", ParityReport, RunFolderError)


def evaluate(work: Work, targets: Sequence[str]) -> AccuracyReport:
    """Measure mAP of the eager detector, the quantized reference and each artifact: `accuracy.json`."""
    from qexport.benchmarks import detect  # noqa: PLC0415
    from qexport.benchmarks.accuracy import evaluate as measure  # noqa: PLC0415

    dataset, folder = work.subject.evaluation, work.folder
    weights, table = folder.record.weights_sha256, folder.digest("encodings.json")
    sources: dict[str, tuple[list[str | None], Callable[[], AbstractContextManager[detect.Detect]]]] = {
        "eager": ([weights, folder.digest("detector.json")], lambda: detect.eager(work.subject.loaded)),
        "reference": ([weights, table], lambda: detect.reference(work.quantized)),
    }
    for target in targets:
        artifact, place = work.artifact(target)
        sources[target] = (
            [artifact.sha256],
            lambda target=target, place=place: detect.artifact(_runner(target), place, _threads()),  # type: ignore[misc]
        )
    found: dict[str, tuple[ImageDetections, ...]] = {}
    for subject, (identity, source) in sources.items():
        name = f"detections/{subject}.json"

        def write(subject: str = subject, name: str = name, source: Any = source) -> None:
            with work.progress(f"evaluate {subject}", len(dataset.samples)) as step, source() as run:
                images = detect.over(dataset, work.subject.frame_px, run, on_image=step)
            write_json(folder.file(name), DetectionsRecord(subjects={subject: images}))

        folder.stage(f"detect.{subject}", {"of": identity, "images": dataset.sha256}, [name], write)
        found |= read_json(folder.file(name), DetectionsRecord, RunFolderError).subjects

    def write_accuracy() -> None:
        write_json(folder.file("detections.json"), DetectionsRecord(subjects=found))
        with work.progress("evaluate mAP", 1) as step:
            boxes = {subject: [detect.to_arrays(image) for image in images] for subject, images in found.items()}
            report = measure(dataset, boxes, seed=work.settings.seed, max_drop=work.settings.max_drop)
            step()
        write_json(folder.file("accuracy.json"), report)

    inputs = {
        "detections": [folder.digest(f"detections/{subject}.json") for subject in found],
        "options": [dataset.sha256, work.settings.max_drop, work.settings.seed],
    }
    folder.stage("evaluate", inputs, ["detections.json", "accuracy.json"], write_accuracy)
    return read_json(folder.file("accuracy.json"), AccuracyReport, RunFolderError)


def bench(work: Work, target: str, *, runs: int = 30, warmup: int = 3, threads: int = 1) -> LatencyProfile:
    """Measure latency, whole and per module path, and memory: `TARGET/latency.json`, `TARGET/memory.json`."""
    from qexport.benchmarks.complexity import peak_memory  # noqa: PLC0415
    from qexport.benchmarks.latency import measure_latency  # noqa: PLC0415

    find_target(target).require("measure")
    artifact, folder = work.artifact(target)
    detector = inspect(work)

    def write() -> None:
        frame = next(work.subject.frames(work.subject.parity_samples()))
        with work.progress(f"bench {target}", 3 * (runs + warmup) + 2) as step:
            memory = []
            for subject, role in (("artifact", "int8"), ("fp32", "fp32")):
                command = [sys.executable, "-m", "qexport.runtimes.once", str(folder), role]
                memory.append(MemoryUse(subject=subject, peak_bytes=peak_memory(command)))
                step()
            profile = measure_latency(
                artifact=folder,
                runner=_runner(target),
                detector=work.subject.loaded,
                frame=np.ascontiguousarray(frame),
                layers=detector.layers,
                warmup=warmup,
                runs=runs,
                threads=threads,
                min_accounted=work.settings.min_accounted,
                on_run=step,
            )
        write_json(folder / "memory.json", tuple(memory))
        write_json(folder / "latency.json", profile)

    inputs = {"artifact": artifact.sha256, "options": [runs, warmup, threads, work.settings.min_accounted]}
    outputs = [f"{target}/latency.json", f"{target}/memory.json"]
    work.folder.stage(f"bench.{target}", inputs, outputs, write)
    return read_json(folder / "latency.json", LatencyProfile, RunFolderError)


def report(work: Work) -> ReportFiles:
    """Write the report: `report.html`, `report.json`, tables for spreadsheets."""
    from qexport.benchmarks.report import build_report  # noqa: PLC0415

    return build_report(work.folder.path, dataset_root=work.subject.evaluation.root)


def run_all(
    work: Work, targets: Sequence[str], *, runs: int = 30, warmup: int = 3, threads: int = 1
) -> Outcome:
    """Run every stage that is not complete."""
    for target in targets:
        find_target(target).require("measure")
    inspect(work)
    calibrate(work)
    gates: list[Gate] = []
    for target in targets:
        export(work, target)
        gates += compare(work, target).gates
    gates += evaluate(work, targets).gates
    for target in targets:
        gates += bench(work, target, runs=runs, warmup=warmup, threads=threads).gates
    return Outcome(tuple(gates), report(work))


def exported_targets(path: Path) -> list[str]:
    """Return the targets that a run holds artifacts of."""
    return [target.name for target in TARGETS if (path / target.name / MANIFEST).is_file()]


def runner_of(artifact: Path) -> Any:
    """Return the class that runs an artifact.

    Raises:
        ArtifactError: there is no artifact, or one of a target that this version does not know.
        TargetUnavailable: its runtime is not installed.
    """
    target = load_artifact(artifact)[0].target
    if target not in {known.name for known in TARGETS}:
        raise ArtifactError(f"{artifact}: made for target {target!r}, which this qexport does not know.")
    find_target(target).require("run")
    return _runner(target)


def _runner(target: str) -> Any:
    return importlib.import_module(f"qexport.runtimes.{target}").RUNNER


def _threads() -> int:
    return os.cpu_count() or 1
