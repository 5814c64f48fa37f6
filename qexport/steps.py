"""What is done to every artifact alike, the run's own and one that differs in shape alone: export, compare, detect."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qexport.artifact import Artifact
from qexport.devices import runner_for, runners_for
from qexport.engines import load_engines
from qexport.errors import RunFolderError
from qexport.files import read_json, write_json
from qexport.layers import Layer
from qexport.results import DetectionsRecord, ImageDetections, MemoryUse
from qexport.target import find_target
from qexport.target_options import TargetOptions, read_options
from qexport.work import Work

if TYPE_CHECKING:
    from qexport.benchmarks.detect import Detect
    from qexport.detectors.static import StaticDetector
    from qexport.quantization.reference import QuantizedDetector


EAGER, CHECKPOINT = "eager", "checkpoint"
"""Subjects: the float detector that all are compared with, and a QAT checkpoint's own floats where they are not it."""


def options_of(work: Work, target: str) -> TargetOptions:
    """Return what the run's settings choose for a target."""
    return read_options(find_target(target).options, target, work.settings.target_options)


def export_artifact(
    work: Work,
    target: str,
    folder: Path,
    *,
    static: StaticDetector,
    quantized: QuantizedDetector,
    title: str,
) -> Artifact:
    """Lower a quantized detector to a target: the artifact's files and `complexity.json`, in `folder`.

    Args:
        work: the run, for labels, encodings and options.
        target: its name.
        folder: made where it is missing.
        static: the detector.
        quantized: the same with the run's encodings applied.
        title: of the progress.
    """
    from qexport.benchmarks.complexity import count_complexity  # noqa: PLC0415 - torch begins here

    exporter: Any = importlib.import_module(f"qexport.exporters.{target}")
    options = options_of(work, target)
    with work.progress(title, 2) as step:
        artifact: Artifact = exporter.export(
            quantized, work.encodings, folder, labels=work.subject.labels, options=options
        )
        step()
        float_bytes, artifact_bytes = (_size_bytes(artifact, folder, role) for role in ("fp32", "int8"))
        complexity = count_complexity(
            static,
            (static.example_input(),),
            weight_codes=quantized.weight_codes(),
            float_bytes=float_bytes,
            artifact_bytes=artifact_bytes,
        )
        write_json(folder / "complexity.json", complexity)
        step()
    return artifact


def compare_artifact(
    work: Work,
    target: str,
    folder: Path,
    *,
    quantized: QuantizedDetector,
    layers: Sequence[Layer],
    title: str,
) -> None:
    """Compare the artifact in `folder` with its references, layer by layer: `parity.json` beside it.

    Args:
        work: the run, for the images, tolerances and progress.
        target: its name.
        folder: the artifact's.
        quantized: the detector that it was made of.
        layers: of that detector.
        title: of the progress.
    """
    from qexport.benchmarks.parity import compare, with_other_kernels  # noqa: PLC0415 - torch begins here

    settings, samples = work.settings, work.subject.parity_samples()
    kernel_sets = runners_for(target)
    reports = []
    with work.progress(title, len(samples) * len(kernel_sets)) as step:
        for kernels in kernel_sets:
            with kernels(folder, threads=all_threads()) as runner:
                report = compare(
                    quantized,
                    runner,
                    layers,
                    work.subject.frames(samples),
                    split=work.subject.evaluation.split,
                    tolerance_steps=settings.tolerance_steps,
                    max_unmatched=settings.max_unmatched,
                    on_image=step,
                )
            reports.append(report)
    write_json(folder / "parity.json", with_other_kernels(*reports))


def inputs_of_compare(work: Work, artifact: Artifact) -> dict[str, object]:
    """Return everything that decides what `compare_artifact` writes."""
    settings = work.settings
    return {
        "artifact": artifact.sha256,
        "runner": runner_for(artifact.target).rung,
        "images": work.subject.evaluation.sha256,
        "options": [settings.parity_images, settings.tolerance_steps, settings.max_unmatched, settings.seed],
    }


def detect_artifact(
    work: Work, subject: str, artifact: Artifact, folder: Path
) -> tuple[ImageDetections, ...]:
    """Return what the artifact in `folder` detects on the whole split: `detections/SUBJECT.json`."""
    from qexport.benchmarks import detect  # noqa: PLC0415 - torch begins here

    runner = runner_for(artifact.target)
    run = partial(detect.artifact, runner, folder, all_threads())
    return detect_split(work, subject, [artifact.sha256, runner.rung], run)


def detect_floats(work: Work) -> dict[str, tuple[ImageDetections, ...]]:
    """Return what the float detector finds, and where it is not the original what the checkpoint's own floats find."""
    from qexport.benchmarks import detect  # noqa: PLC0415 - torch begins here

    subject, detector = work.subject, work.folder.digest("detector.json")
    loaded = {EAGER: subject.baseline}
    if subject.original is not None:
        loaded[CHECKPOINT] = subject.loaded
    return {
        name: detect_split(work, name, [one.weights_sha256, detector], partial(detect.eager, one))
        for name, one in loaded.items()
    }


def detect_split(
    work: Work,
    subject: str,
    identity: Sequence[str | None],
    source: Callable[[], AbstractContextManager[Detect]],
) -> tuple[ImageDetections, ...]:
    """Return what a subject detects on the whole split: `detections/SUBJECT.json`.

    Args:
        work: the run.
        subject: its name.
        identity: digests of what it is made of.
        source: opens it.
    """
    from qexport.benchmarks import detect  # noqa: PLC0415 - torch begins here

    dataset, name = work.subject.evaluation, detections_file(subject)

    def write() -> None:
        with work.progress(f"detect {subject}", len(dataset.samples)) as step, source() as run:
            images = detect.over(dataset, work.subject.frame_px, run, on_image=step)
        write_json(work.folder.file(name), DetectionsRecord(subjects={subject: images}))

    work.folder.stage(f"detect.{subject}", {"of": identity, "images": dataset.sha256}, [name], write)
    return read_json(work.folder.file(name), DetectionsRecord, RunFolderError).subjects[subject]


def detections_file(subject: str) -> str:
    """Return where a subject's detections lie in the run folder."""
    return f"detections/{subject}.json"


def all_threads() -> int:
    """Return how many threads there are for what is not timed."""
    return os.cpu_count() or 1


def bench_artifact(
    work: Work,
    target: str,
    folder: Path,
    *,
    layers: Sequence[Layer],
    runs: int,
    warmup: int,
    threads: int,
) -> None:
    """Time the artifact in `folder` beside its baselines: `latency.json` and `memory.json` beside it.

    Args:
        work: the run, for the frame, the eager detector and progress.
        target: its name.
        folder: the artifact's.
        layers: of the detector.
        runs: measured runs of each subject.
        warmup: runs before them that do not count.
        threads: of the runtime.
    """
    from qexport.benchmarks.latency import measure_latency  # noqa: PLC0415 - torch begins here

    frame = next(work.subject.frames(work.subject.parity_samples()))
    with work.progress(f"bench {target}", 3 * (runs + warmup) + 2) as step:
        memory = _peak_memory(folder, step)
        profile = measure_latency(
            artifact=folder,
            runner=runner_for(target),
            detector=work.subject.loaded,
            frame=np.ascontiguousarray(frame),
            layers=layers,
            warmup=warmup,
            runs=runs,
            threads=threads,
            min_accounted=work.settings.min_accounted,
            on_run=step,
        )
    write_json(folder / "memory.json", memory)
    write_json(folder / "latency.json", profile)


def _peak_memory(folder: Path, on_run: Callable[[], None]) -> tuple[MemoryUse, ...]:
    """Return what fresh processes take that run the artifact in `folder`, and its float baseline, once."""
    from qexport.benchmarks.complexity import peak_memory as measure  # noqa: PLC0415

    memory = []
    for subject, role in (("artifact", "int8"), ("fp32", "fp32")):
        command = [sys.executable, "-m", "qexport.runtimes.once", str(folder), role]
        memory.append(MemoryUse(subject=subject, peak_bytes=measure(command)))
        on_run()
    return tuple(memory)


def _size_bytes(artifact: Artifact, folder: Path, role: str) -> int:
    """Return the size of what runs: the engine that was built of a file, else the file itself."""
    engine = load_engines(folder).of(role)
    return engine.size_bytes if engine is not None else artifact.file(role).size_bytes
