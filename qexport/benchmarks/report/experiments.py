"""Several runs in one table: a row per run and target, and a warning where rows cannot be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from qexport.benchmarks.report.csvs import Cell, csv_bytes
from qexport.benchmarks.report.document import VerdictState
from qexport.benchmarks.report.render import render
from qexport.benchmarks.report.stages import RunResults, TargetResults, read_run
from qexport.benchmarks.report.verdict import parity_verdict, run_verdict, timed_verdict
from qexport.errors import RunFolderError
from qexport.files import write_bytes
from qexport.results import Accuracy


@dataclass(frozen=True, slots=True)
class ExperimentFiles:
    """Where the table's files lie."""

    html: Path
    csv: Path


@dataclass(frozen=True, slots=True)
class Experiment:
    """One row: one target of one run. None or empty where it was not measured."""

    run: str
    detector: str
    backbone: str
    dataset: str
    dataset_version: str
    """First 12 digits of the dataset's SHA-256."""
    split: str
    input_px: str
    """Height and width of the padded image."""
    method: str
    target: str
    size_mb: float | None
    """Artifact on disk, MB of 1,000,000 bytes."""
    parameters: int
    macs: int
    sparsity: float | None
    """Share of int8 weight codes that are zero."""
    peak_memory_mb: float | None
    parity: str
    latency_mean_ms: float | None
    latency_std_ms: float | None
    fps: float | None
    voc_map50: float | None
    coco_map: float | None
    verdict: VerdictState
    why: str
    """The verdict in one line."""


def build_experiments(runs: Sequence[Path], out: Path) -> ExperimentFiles:
    """Write `experiments.html` and `experiments.csv` into `out`.

    Args:
        runs: run folders, in the order of the rows.
        out: folder to write into; made where it is missing.

    Raises:
        RunFolderError: no run was given, a folder is not a run, or `out` cannot be written.
        TargetUnavailable: jinja2 is not installed.
    """
    if not runs:
        raise RunFolderError(
            "no run folder was given. Give one or more folders that `qexport run --out` wrote."
        )
    results = [read_run(run) for run in runs]
    rows = [row for one in results for row in _rows(one)]
    page = render(
        "experiments.html", {"rows": rows, "warnings": comparability_warnings(results), "runs": len(runs)}
    )
    columns = [field.name for field in fields(Experiment)]
    cells: list[list[Cell]] = [[getattr(row, column) for column in columns] for row in rows]
    return ExperimentFiles(
        html=write_bytes(out / "experiments.html", page.encode()),
        csv=write_bytes(out / "experiments.csv", csv_bytes(columns, cells)),
    )


def comparability_warnings(runs: Sequence[RunResults]) -> tuple[str, ...]:
    """Return one sentence per thing that differs between runs and that the figures depend on."""
    checks: tuple[tuple[str, str, Callable[[RunResults], str | None]], ...] = (
        ("accuracy", "dataset", lambda run: f"{run.record.dataset_name} {run.record.dataset_sha256[:12]}"),
        ("accuracy", "split", lambda run: run.record.settings.split),
        ("accuracy", "classes", lambda run: ", ".join(run.detector.labels[1:])),
        ("accuracy", "number of images and objects", _counted),
        ("accuracy and latency", "frame size", lambda run: _size(run.detector.frame_px)),
        ("accuracy and latency", "input size", lambda run: _size(run.detector.padded_px)),
        ("latency", "machine", lambda run: _measured_on(run, "machine")),
        ("latency", "threads", lambda run: _measured_on(run, "threads")),
    )
    sentences = []
    for what, name, value_of in checks:
        groups: dict[str, list[str]] = {}
        for run in runs:
            value = value_of(run)
            if value is not None:
                groups.setdefault(value, []).append(run.folder.name)
        if len(groups) > 1:
            listed = "; ".join(f"{value} ({', '.join(names)})" for value, names in groups.items())
            sentences.append(f"Not comparable in {what}: {name} differs. {listed}")
    return tuple(sentences)


def _size(size_px: tuple[int, int]) -> str:
    return f"{size_px[0]}x{size_px[1]}"


def _counted(run: RunResults) -> str | None:
    if run.accuracy is None:
        return None
    return f"{run.accuracy.images} images, {run.accuracy.objects} objects"


def _measured_on(run: RunResults, what: str) -> str | None:
    found = dict.fromkeys(
        f"{one.latency.machine.processor}, {one.latency.machine.measured_on}"
        if what == "machine"
        else f"{one.latency.threads}"
        for one in run.targets
        if one.latency is not None
    )
    return " and ".join(found) or None


def _rows(run: RunResults) -> Sequence[Experiment]:
    nothing = TargetResults(target="", artifact=None, parity=None, latency=None, complexity=None, memory=None)
    return [_row(run, target) for target in run.targets or (nothing,)]


def _row(run: RunResults, target: TargetResults) -> Experiment:
    whole = target.latency.whole.get("artifact") if target.latency else None
    size = target.complexity
    accuracy = _accuracy_of(run, target.target)
    parity = parity_verdict(target.parity)
    alone = replace(
        run,
        targets=(target,),
        missing=tuple(one for one in run.missing if one.target in ("", target.target)),
    )
    verdict, timed = run_verdict(alone), timed_verdict(alone)
    # A failed latency gate fails the row; it never hides a failure of parity or accuracy.
    shown = timed if verdict.state == "ok" and timed.state == "failed" else verdict
    return Experiment(
        run=run.folder.name,
        detector=run.detector.source,
        backbone=run.detector.backbone,
        dataset=run.record.dataset_name,
        dataset_version=run.record.dataset_sha256[:12],
        split=run.record.settings.split or "",
        input_px=_size(run.detector.padded_px),
        method=_method(run),
        target=target.target,
        size_mb=size.artifact_bytes / 1e6 if size else None,
        parameters=run.detector.parameters,
        macs=run.detector.macs,
        sparsity=size.average_sparsity_quantized if size else None,
        peak_memory_mb=_peak_memory_mb(target),
        parity=parity.state if target.parity else "not measured",
        latency_mean_ms=whole.mean_ms if whole else None,
        latency_std_ms=whole.std_ms if whole else None,
        fps=target.latency.fps if target.latency else None,
        voc_map50=accuracy.voc_map50 if accuracy else None,
        coco_map=accuracy.coco_map if accuracy else None,
        verdict=shown.state,
        why=shown.text,
    )


def _accuracy_of(run: RunResults, subject: str) -> Accuracy | None:
    subjects = run.accuracy.subjects if run.accuracy else ()
    return next((one for one in subjects if one.subject == subject), None)


def _peak_memory_mb(target: TargetResults) -> float | None:
    names = {"artifact", "int8", target.target}
    found = [one.peak_bytes for one in target.memory or () if one.subject in names]
    return found[0] / 1e6 if found else None


def _method(run: RunResults) -> str:
    settings = run.record.settings
    observer: str = settings.observer
    if run.encodings is not None:
        observer = str(run.encodings.calibration.get("observer", observer))
    text = f"{observer} {settings.percentile:g}" if observer == "percentile" else observer
    kept = run.encodings.keep_float if run.encodings is not None else settings.keep_float
    return f"{text}, float: {', '.join(kept)}" if kept else text
