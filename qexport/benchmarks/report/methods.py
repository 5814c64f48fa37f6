"""Methods of quantization side by side: float, the others that were asked for, and static on each target."""

from __future__ import annotations

from dataclasses import dataclass

from qexport.benchmarks.report.document import Verdict
from qexport.benchmarks.report.stages import RunResults, TargetResults
from qexport.benchmarks.report.tables import speedup
from qexport.benchmarks.report.verdict import parity_verdict
from qexport.method_results import FLOAT, MethodRow, MethodsLatency, MethodsReport
from qexport.results import Accuracy, Interval, LatencyStats
from qexport.target import latency_note


@dataclass(frozen=True, slots=True)
class MethodLine:
    """One row of the table; mAP and its changes are fractions."""

    method: str
    what: str
    runs_in: str
    size_bytes: int | None
    stats: LatencyStats | None
    speed: float | None
    """Median of eager, measured beside it, over this one's."""
    untimed: str
    """Why there is no latency; empty where there is one."""
    note: str
    """What the latency does not say; empty where there is nothing to note."""
    voc_map50: float | None
    coco_map: float | None
    voc_change: float | None
    coco_change: float | None
    voc_change_interval: Interval | None
    coco_change_interval: Interval | None
    parity: Verdict | None
    """None for a method that is not of the run's encodings and has nothing to be compared with."""


def lines(run: RunResults, report: MethodsReport) -> tuple[MethodLine, ...]:
    """Return a row for each method, float first, static last."""
    before = report.rows[0]
    static = [_static(run, one) for one in run.targets]
    return (*(_line(row, before, run.methods_latency) for row in report.rows), *static)


def _line(row: MethodRow, before: MethodRow, latency: MethodsLatency | None) -> MethodLine:
    whole = latency.whole if latency is not None else {}
    stats, own = whole.get(row.method), row.method == FLOAT
    without = "not measured" if own else "no kernel runs it"
    return MethodLine(
        method=row.method,
        what=row.what,
        runs_in=row.runs_in,
        size_bytes=row.size_bytes,
        stats=stats,
        speed=whole[FLOAT].p50_ms / stats.p50_ms if stats and not own else None,
        untimed="" if stats else without,
        note="",
        voc_map50=row.voc_map50,
        coco_map=row.coco_map,
        voc_change=None if own else row.voc_map50 - before.voc_map50,
        coco_change=None if own else row.coco_map - before.coco_map,
        voc_change_interval=row.voc_change_interval,
        coco_change_interval=row.coco_change_interval,
        parity=None,
    )


def _static(run: RunResults, one: TargetResults) -> MethodLine:
    subjects: dict[str, Accuracy] = (
        {row.subject: row for row in run.accuracy.subjects} if run.accuracy else {}
    )
    found, eager = subjects.get(one.target), subjects.get("eager")
    profile = one.profiles[0] if one.profiles else None
    return MethodLine(
        method="QAT" if run.record.settings.qat else "static",
        what="weights and feature maps"
        + (", the checkpoint's own scales" if run.record.settings.qat else ""),
        runs_in=f"target {one.target}",
        size_bytes=one.complexity.artifact_bytes if one.complexity else None,
        stats=profile.whole.get("artifact") if profile else None,
        speed=speedup(profile, "eager") if profile else None,
        untimed="" if profile else "not measured",
        note=latency_note(one.target, profile.machine.system) if profile else "",
        voc_map50=found.voc_map50 if found else None,
        coco_map=found.coco_map if found else None,
        voc_change=found.voc_map50 - eager.voc_map50 if found and eager else None,
        coco_change=found.coco_map - eager.coco_map if found and eager else None,
        voc_change_interval=found.voc_drop_interval if found else None,
        coco_change_interval=found.coco_drop_interval if found else None,
        parity=parity_verdict(one.parity),
    )
