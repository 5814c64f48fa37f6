"""How a run's scales are decided: from images, or by the checkpoint that they were trained in."""

from __future__ import annotations

from pathlib import Path

import msgspec

from qexport.encodings import Encodings
from qexport.files import sha256_file
from qexport.mend_results import ORIGIN as MENDING
from qexport.mend_results import MendReport
from qexport.observer_results import ObserverReport
from qexport.training_history import ORIGIN as TRAINING
from qexport.training_history import History
from qexport.work import Work


def decide_encodings(work: Work) -> tuple[Encodings, ObserverReport | None]:
    """Return the table of a run, and what --observer auto chose; None for another observer.

    Raises:
        CalibrationError: images that cannot give encodings.
        CheckpointError: a QAT checkpoint that does not fit, or that --strict refuses.
    """
    from qexport.calibration.calibrator import calibrate  # noqa: PLC0415 - torch begins here
    from qexport.calibration.filling import encodings_from_checkpoint  # noqa: PLC0415

    settings, subject = work.settings, work.subject
    chosen: list[ObserverReport] = []
    samples = subject.calibration_samples()
    checkpoint = subject.checkpoint
    notes: dict[str, str | int | float] = {
        "dataset": subject.calibration.name,
        "dataset_sha256": subject.calibration.sha256,
        "split": subject.calibration.split,
        "seed": settings.seed,
    }
    with work.progress("calibrate" if checkpoint is None else "fill scales", len(samples)) as step:
        if checkpoint is None:
            encodings = calibrate(
                subject.static,
                subject.inputs(samples),
                observer=settings.observer,
                percentile=settings.percentile,
                scheme=settings.scheme,
                weight_scales=settings.weight_scales,
                keep_float=settings.keep_float,
                notes=notes,
                on_image=step,
                on_choice=chosen.append,
            )
        else:
            encodings = encodings_from_checkpoint(
                subject.static,
                checkpoint,
                subject.inputs(samples),
                strict=settings.strict,
                observer=settings.observer,
                percentile=settings.percentile,
                scheme=settings.scheme,
                weight_scales=settings.weight_scales,
                keep_float=subject.keep_float,
                notes={"qat sha256": sha256_file(checkpoint.path), **notes},
                on_image=step,
                on_choice=chosen.append,
            )
    if settings.observer != "auto":
        return encodings, None
    report = chosen[0] if chosen else ObserverReport()  # a checkpoint that says every scale
    return encodings, msgspec.structs.replace(report, rows_sha256=encodings.rows_sha256)


def origin_of_checkpoint(work: Work) -> dict[str, History | MendReport]:
    """Return what a checkpoint says of where it comes from, by the file of the run that it is written to."""
    checkpoint = work.subject.checkpoint
    said = {} if checkpoint is None else {TRAINING: checkpoint.history, MENDING: checkpoint.mended}
    return {name: report for name, report in said.items() if report is not None}


def inputs_of_calibrate(work: Work) -> dict[str, object]:
    """Return everything that decides what `decide_encodings` returns."""
    settings, subject = work.settings, work.subject
    inputs: dict[str, object] = {
        "detector": work.folder.digest("detector.json"),
        "images": subject.calibration.sha256,
        "options": [settings.calibration_images, settings.observer, settings.percentile, settings.seed],
    }
    if settings.scheme != "int8":
        inputs["scheme"] = settings.scheme
    if settings.weight_scales != "per-channel":
        inputs["weight scales"] = settings.weight_scales
    if settings.qat:
        place = Path((settings.qat_prepare or "").rpartition(":")[0])
        prepare = sha256_file(place) if place.is_file() else str(place)
        inputs["qat"] = [subject.loaded.weights_sha256, settings.qat_prepare, prepare, settings.strict]
    return inputs
