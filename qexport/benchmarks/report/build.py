"""One run folder in, the report's files out, written beside what they were made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qexport.benchmarks.report import (
    cross,
    csvs,
    methods,
    pictures,
    plots,
    proposals,
    sensitivity,
    tables,
    training,
    verdict,
)
from qexport.benchmarks.report.document import (
    ReportDocument,
    TargetDocument,
    TargetTimings,
    TimingsDocument,
    Verdict,
    report_schema,
    summarise_artifact,
    summarise_encodings,
)
from qexport.benchmarks.report.render import render
from qexport.benchmarks.report.stages import RunResults, TargetResults, read_run
from qexport.files import write_bytes, write_json
from qexport.results import LatencyProfile


@dataclass(frozen=True, slots=True)
class ReportFiles:
    """Where the report's files lie."""

    html: Path
    json: Path
    schema: Path
    timings: Path
    layers_csv: Path
    latency_csv: Path
    kinds_csv: Path
    accuracy_csv: Path


def build_report(run: Path, *, dataset_root: Path | None) -> ReportFiles:
    """Write the report of a run folder into that folder.

    Args:
        run: folder with `run.json`, `detector.json` and whatever stages have run.
        dataset_root: folder that the images' paths are relative to; None leaves the images out.

    Returns:
        The paths of the files, all of which exist.

    Raises:
        RunFolderError: no such folder, a file in it that is not of this version, or it cannot be written.
        EncodingsError: an encodings table that was edited.
        TargetUnavailable: jinja2 or matplotlib is not installed.
    """
    results = read_run(run)
    page = render("report.html", _page(results, dataset_root))
    return ReportFiles(
        html=write_bytes(run / "report.html", page.encode()),
        json=write_json(run / "report.json", report_document(results)),
        schema=write_json(run / "report.schema.json", report_schema()),
        timings=write_json(run / "timings.json", timings_document(results)),
        layers_csv=write_bytes(run / "layers.csv", csvs.layers_csv(results)),
        latency_csv=write_bytes(run / "latency.csv", csvs.latency_csv(results)),
        kinds_csv=write_bytes(run / "kinds.csv", csvs.kinds_csv(results)),
        accuracy_csv=write_bytes(run / "accuracy.csv", csvs.accuracy_csv(results)),
    )


def report_document(run: RunResults) -> ReportDocument:
    """Return what `report.json` holds."""
    return ReportDocument(
        verdict=verdict.run_verdict(run),
        run=run.record,
        detector=run.detector,
        calibration=summarise_encodings(run.encodings) if run.encodings else None,
        accuracy=run.accuracy,
        targets=tuple(
            TargetDocument(
                target=one.target,
                artifact=summarise_artifact(one.artifact) if one.artifact else None,
                parity=one.parity,
                complexity=one.complexity,
                proposals=one.proposals,
            )
            for one in run.targets
        ),
        missing=run.missing,
        cross=run.cross,
        diagnosis=run.diagnosis,
        sensitivity=run.sensitivity,
        methods=run.methods,
        observers=run.observers,
        training=run.training,
        mended=run.mended,
    )


def timings_document(run: RunResults) -> TimingsDocument:
    """Return what `timings.json` holds."""
    return TimingsDocument(
        targets=tuple(
            TargetTimings(
                target=one.target,
                parity=verdict.parity_verdict(one.parity),
                latency=one.latency,
                memory=one.memory,
                measurements=one.measurements,
                engines=one.engines,
                proposals=one.proposals_latency,
            )
            for one in run.targets
        ),
        methods=run.methods_latency,
    )


def _page(run: RunResults, dataset_root: Path | None) -> dict[str, object]:
    accuracy = run.accuracy
    subjects = {one.subject: one for one in accuracy.subjects} if accuracy else {}
    lines = verdict.gate_lines(run)
    return {
        "run": run,
        "verdict": verdict.run_verdict(run),
        "timed": verdict.timed_verdict(run),
        "gates": [line for line in lines if not line.timed],
        "timed_gates": [line for line in lines if line.timed],
        "subjects": subjects,
        "noise": tables.noise_sentences(accuracy) if accuracy else (),
        "class_rows": tables.class_rows(accuracy) if accuracy else (),
        "curves": plots.precision_recall(accuracy, "curves") if accuracy else "",
        "curve_labels": plots.curve_labels(accuracy) if accuracy else (),
        "targets": [_target(run, one, number, dataset_root) for number, one in enumerate(run.targets)],
        "scales": tables.scale_origins(run.encodings),
        "cross": _cross(run),
        "sensitivity": _sensitivity(run),
        "methods": _methods(run),
        "observers": run.observers,
        "training_plot": training.history_plot(run.training, "training") if run.training else "",
        "observer_names": tables.observer_names(run.observers) if run.observers else (),
        "shown_score": pictures.SHOWN_SCORE,
        "same_iou": pictures.SAME_IOU,
        "baselines": tables.BASELINES,
        "rungs": tables.RUNGS,
    }


def _target(run: RunResults, one: TargetResults, number: int, dataset_root: Path | None) -> dict[str, object]:
    name, parity = f"t{number}", one.parity
    beside = verdict.parity_verdict(parity)
    differences = pictures.largest_differences(run.detections, one.target) if run.detections else ()
    return {
        "id": name,
        "results": one,
        "untimed": any(missing.target == one.target and missing.needs_device for missing in run.missing),
        "parity": beside,
        "worst": tables.worst_layer(parity) if parity else None,
        "max_step": tables.largest_step(parity) if parity else None,
        "kernels": tables.main_kernels(one.artifact) if one.artifact else "",
        "statuses": tables.status_counts(parity) if parity else {},
        "sqnr_plot": plots.sqnr_by_depth(parity, f"{name}-sqnr") if parity else "",
        "latencies": [
            _latency(profile, f"{name}-latency-{place}", beside) for place, profile in enumerate(one.profiles)
        ],
        "proposals": _proposals(one, f"{name}-proposals"),
        "floats": tables.float_decisions(run.encodings, one.artifact),
        "artifact_sha256": one.artifact.sha256 if one.artifact else None,
        "pictures": [(one, pictures.embed(dataset_root, one.image)) for one in differences],
    }


def _sensitivity(run: RunResults) -> dict[str, object] | None:
    report = run.sensitivity
    if report is None:
        return None
    return {
        "report": report,
        "noise": sensitivity.noise_plot(report, "sensitivity-noise"),
        "trade": sensitivity.trade_plot(report, "sensitivity-trade") if len(report.points) > 1 else None,
    }


def _cross(run: RunResults) -> dict[str, object] | None:
    if run.cross is None:
        return None
    return {
        "report": run.cross,
        "verdict": verdict.cross_verdict(run.cross),
        "plot": cross.matrix(run.cross, "cross-matrix"),
        "sentences": cross.sentences(run.cross),
    }


def _methods(run: RunResults) -> dict[str, object] | None:
    if run.methods is None:
        return None
    return {
        "report": run.methods,
        "lines": methods.lines(run, run.methods),
        "latency": run.methods_latency,
    }


def _proposals(one: TargetResults, name: str) -> dict[str, object] | None:
    curve, latency = one.proposals, one.proposals_latency
    if curve is None:
        return None
    return {
        "curve": curve,
        "latency": latency,
        "rows": proposals.rows(curve, latency),
        "sentences": proposals.sentences(curve),
        "plot": plots.change_over_proposals(curve, f"{name}-number", alone=latency is None),
        "timed_plot": plots.change_over_latency(curve, latency, f"{name}-time") if latency else "",
    }


def _latency(profile: LatencyProfile, name: str, beside: Verdict) -> dict[str, object]:
    return {
        "profile": profile,
        "sums": csvs.latency_sums(profile),
        "reconciliation": tables.reconcile(profile),
        "plot": plots.latency_by_layer(profile, name, f"parity {beside.state}"),
        "speedup": {name: tables.speedup(profile, name) for name in tables.BASELINES},
    }
