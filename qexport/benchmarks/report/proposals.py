"""The number of proposals in the report: its rows, and what the noise of the split lets one say of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qexport.benchmarks.report import formats
from qexport.benchmarks.report.document import Verdict
from qexport.benchmarks.report.verdict import parity_gates_verdict
from qexport.results import Interval, LatencyStats, ProposalCurve, ProposalLatency, ProposalPoint

_DIGITS = 2
"""Of changes of mAP, points of 100."""


@dataclass(frozen=True, slots=True)
class ProposalRow:
    """One number of proposals; changes are from the run's own number, as fractions."""

    point: ProposalPoint
    own: bool
    """It is the run's own number."""
    voc_change: float
    coco_change: float
    parity: Verdict
    stats: LatencyStats | None
    speed: float | None
    """Median with the run's own number over this one's."""


def rows(curve: ProposalCurve, latency: ProposalLatency | None) -> tuple[ProposalRow, ...]:
    """Return a row for each point, most proposals first."""
    own = own_point(curve)
    stats = {time.proposals: time.stats for time in latency.points} if latency else {}
    return tuple(
        ProposalRow(
            point=point,
            own=point is own,
            voc_change=point.voc_map50 - own.voc_map50,
            coco_change=point.coco_map - own.coco_map,
            parity=parity_gates_verdict(point.gates),
            stats=stats.get(point.proposals),
            speed=stats[own.proposals].p50_ms / stats[point.proposals].p50_ms if stats else None,
        )
        for point in curve.points
    )


def own_point(curve: ProposalCurve) -> ProposalPoint:
    """Return the point with the run's own number of proposals."""
    return next(point for point in curve.points if point.proposals == curve.own_proposals)


def sentences(curve: ProposalCurve) -> tuple[str, ...]:
    """Return what may be said of each number, given the noise of the split."""
    own, said, inside = curve.own_proposals, [], []
    for point in curve.points:
        differs = [
            _difference(metric, change)
            for metric, change in (("VOC", point.voc_change_interval), ("COCO", point.coco_change_interval))
            if change is not None and not _holds_zero(change)
        ]
        if differs:
            said.append(
                f"{point.proposals} proposals: {' and '.join(differs)} that with {own}, "
                f"more than the noise of {curve.images} images."
            )
        elif point.proposals != own:
            inside.append(str(point.proposals))
    if inside:
        said.insert(
            0,
            f"{_listed(inside)} proposals: inside the noise of {curve.images} images. No loss is seen on them, "
            "which does not show that there is none.",
        )
    if any(point.proposals > own for point in curve.points):
        said.append(
            f"The encodings were calibrated with {own} proposals: what more of them bring in may lie beyond their "
            "ranges and saturate."
        )
    return tuple(said)


def _difference(metric: str, change: Interval) -> str:
    side = "below" if change.high < 0 else "above"
    near, far = sorted((abs(change.low), abs(change.high)))
    span = f"{formats.decimals(100 * near, _DIGITS)} to {formats.decimals(100 * far, _DIGITS)}"
    return f"{metric} mAP is {span} points {side}"


def _holds_zero(change: Interval) -> bool:
    # To the digits that are shown: "0.00 to 1.09 points below" would be read as an error.
    return round(100 * change.low, _DIGITS) <= 0 <= round(100 * change.high, _DIGITS)


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
