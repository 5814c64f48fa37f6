"""When accuracy fell by more than its gate: who did it, as `diagnosis.json`."""

from __future__ import annotations

from collections.abc import Sequence

from qexport.artifact import MANIFEST
from qexport.diagnosis_results import Diagnosis
from qexport.errors import RunFolderError
from qexport.files import read_json, write_json
from qexport.results import AccuracyReport, ParityReport
from qexport.steps import CHECKPOINT
from qexport.work import Work

FILE = "diagnosis.json"
IMAGES = 4
"""That the noise is measured on."""


def diagnose(work: Work, accuracy: AccuracyReport) -> Diagnosis | None:
    """Name the culprit of the first gate on accuracy that failed; None where none did, and then there is no file.

    None, too, where a QAT checkpoint's own floats lost it: training did that. Where the quantized reference keeps its
    accuracy and a target does not, the runtime did it; else the quantization.
    """
    fallen = [gate.subject for gate in accuracy.gates if not gate.passed]
    subject = "reference" if "reference" in fallen or not fallen else fallen[0]
    drop = _drop(accuracy, subject)
    if not fallen or (_float_of(accuracy) == CHECKPOINT and drop <= work.settings.max_drop):
        work.folder.discard("diagnose")
        return None

    def write() -> None:
        found = _runtime(work, subject, drop) if subject != "reference" else None
        write_json(work.folder.file(FILE), found or _quantization(work, subject, drop))

    inputs = {
        "of": [subject, drop, work.encodings.rows_sha256, work.folder.digest(f"{subject}/parity.json")],
        "artifact": work.folder.digest(f"{subject}/{MANIFEST}"),
        "images": [IMAGES, work.subject.evaluation.sha256, work.settings.seed],
    }
    work.folder.stage("diagnose", inputs, [FILE], write)
    return read_json(work.folder.file(FILE), Diagnosis, RunFolderError)


def _runtime(work: Work, subject: str, drop: float) -> Diagnosis | None:
    from qexport.benchmarks.diagnosis import blame_runtime  # noqa: PLC0415 - torch begins here

    path = work.path / subject / "parity.json"
    return (
        blame_runtime(subject, drop, read_json(path, ParityReport, RunFolderError))
        if path.is_file()
        else None
    )


def _quantization(work: Work, subject: str, drop: float) -> Diagnosis:
    from qexport.benchmarks.diagnosis import diagnose as measure  # noqa: PLC0415 - torch begins here
    from qexport.quantization.partial import PartlyQuantized  # noqa: PLC0415

    quantized = work.quantized
    frames = list(work.subject.inputs(work.subject.parity_samples()[:IMAGES]))
    with work.progress("find the culprit", 1) as step:
        found = measure(
            subject, drop, quantized, PartlyQuantized(quantized), work.encodings, work.subject.layers, frames
        )
        step()
    return found


def _drop(accuracy: AccuracyReport, subject: str) -> float:
    eager, mine = (_of(accuracy, name) for name in (_float_of(accuracy), subject))
    return max(eager[0] - mine[0], eager[1] - mine[1])


def _float_of(accuracy: AccuracyReport) -> str:
    """Return the subject that has the weights of the quantized ones, in float."""
    names = [one.subject for one in accuracy.subjects]
    return CHECKPOINT if CHECKPOINT in names else names[0]


def _of(accuracy: AccuracyReport, subject: str) -> Sequence[float]:
    found = next(each for each in accuracy.subjects if each.subject == subject)
    return found.voc_map50, found.coco_map
