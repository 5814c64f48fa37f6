"""The plots, as SVG text that stands inside the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qexport.benchmarks.report.figure import (
    BAD,
    GRID,
    INK,
    MUTED,
    SERIES,
    STAGE_COLOURS,
    SURFACE,
    drawn_figure,
)
from qexport.benchmarks.report.proposals import own_point
from qexport.benchmarks.report.verdict import parity_gates_verdict
from qexport.layers import STAGES
from qexport.results import (
    Accuracy,
    AccuracyReport,
    ClassAccuracy,
    LatencyProfile,
    LayerParity,
    ParityReport,
    ProposalCurve,
    ProposalLatency,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_BARS = 40
MAX_CURVES = 12

_ASIDE = 0.006
"""By which share of the axis two metrics of one point stand left and right of it, so that both are seen."""

_STAGE_MARKERS = dict(zip(STAGES, ("X", "o", "s", "^", "P", "D", "v", "*"), strict=True))


def sqnr_by_depth(parity: ParityReport, name: str) -> str:
    """Draw SQNR against fp32, and against the quantized reference below it, layer after layer.

    Args:
        parity: what is drawn.
        name: prefix of the identifiers in the SVG, unique in the page.

    Returns:
        SVG text; empty where no layer has an SQNR.
    """
    fp32 = [layer for layer in parity.layers if layer.sqnr_fp32_db is not None]
    reference = [layer for layer in parity.layers if layer.sqnr_reference_db is not None]
    if not fp32:
        return ""
    rows = 2 if reference else 1
    with drawn_figure(name, width=9.6, height=3.1 * rows) as (figure, result):
        axes = [figure.add_subplot(rows, 1, row + 1) for row in range(rows)]
        _scatter_by_stage(axes[0], fp32, [layer.sqnr_fp32_db or 0.0 for layer in fp32])
        axes[0].set_title("SQNR against the float detector (quantization and everything before the layer)")
        _mark_worst(axes[0], fp32)
        if reference:
            _scatter_by_stage(axes[1], reference, [layer.sqnr_reference_db or 0.0 for layer in reference])
            axes[1].set_title("SQNR against the quantized reference (the runtime; identical layers left out)")
        for one in axes:
            one.set_ylabel("SQNR, dB")
            one.set_xlim(-1, max(layer.order for layer in parity.layers) + 1)
        axes[-1].set_xlabel("layer, in order of execution")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(8, len(labels)))
    return result[0]


def precision_recall(accuracy: AccuracyReport, name: str) -> str:
    """Draw one precision/recall curve per class and subject; the classes with the most objects first.

    Returns:
        SVG text; empty where no class has a curve.
    """
    labels = curve_labels(accuracy)
    if not labels:
        return ""
    columns = min(3, len(labels))
    rows = -(-len(labels) // columns)
    with drawn_figure(name, width=3.2 * columns + 0.4, height=2.8 * rows + 0.4) as (figure, result):
        for position, label in enumerate(labels, start=1):
            axes = figure.add_subplot(rows, columns, position)
            for number, subject in enumerate(accuracy.subjects):
                _curve(axes, subject, label, number)
            axes.set(xlim=(0, 1.01), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
            axes.set_title(label)
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    return result[0]


def curve_labels(accuracy: AccuracyReport) -> tuple[str, ...]:
    """Return the classes that `precision_recall` draws: at most MAX_CURVES, those with the most objects."""
    objects: dict[str, int] = {}
    for subject in accuracy.subjects:
        for one in subject.classes:
            if one.recall:
                objects[one.label] = one.objects
    ranked = sorted(objects, key=lambda label: (-objects[label], label))[:MAX_CURVES]
    return tuple(label for label in objects if label in ranked)


def latency_by_layer(profile: LatencyProfile, name: str, parity: str) -> str:
    """Draw a pair of bars per module path, artifact and eager; beyond MAX_BARS the rest is one pair.

    Args:
        profile: what is drawn.
        name: prefix of the identifiers in the SVG, unique in the page.
        parity: the parity verdict in two words, which stands in the title.
    """
    if not profile.layers:
        return ""
    bars = _bars(profile)
    with drawn_figure(name, width=9.6, height=0.21 * len(bars) + 1.3) as (figure, result):
        axes = figure.add_subplot()
        places = range(len(bars))
        eager = [bar[2] or 0.0 for bar in bars]
        upper, lower = [place - 0.2 for place in places], [place + 0.2 for place in places]
        axes.barh(lower, eager, 0.38, color=SERIES[0], label="PyTorch eager fp32")
        axes.barh(
            upper,
            [bar[1] for bar in bars],
            0.38,
            color=SERIES[2],
            label=f"{profile.target} artifact",
        )
        axes.set_yticks(list(places), [bar[0] for bar in bars], family="monospace", fontsize=7.5)
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("median time, ms")
        axes.set_title(f"Time per module path on {profile.target} ({parity})")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return result[0]


def change_over_proposals(curve: ProposalCurve, name: str, *, alone: bool) -> str:
    """Draw the change of VOC and COCO mAP over the number of proposals, with its interval.

    Args:
        curve: what is drawn.
        name: prefix of the identifiers in the SVG, unique in the page.
        alone: it stands over the whole width of the page, not beside another.
    """
    numbers = [point.proposals for point in curve.points]
    with drawn_figure(name, width=9.6 if alone else 5.6, height=3.4) as (figure, result):
        axes = figure.add_subplot()
        axes.set_xscale("log")  # halving the number is as far anywhere
        axes.set_xticks(numbers, [str(number) for number in numbers])
        axes.set_xticks([], minor=True)
        shift = (max(numbers) / min(numbers)) ** _ASIDE
        _changes(axes, curve, [number / shift for number in numbers], [number * shift for number in numbers])
        axes.set_xlabel("proposals")
        axes.set_title(f"Change of mAP from {curve.own_proposals} proposals")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return result[0]


def change_over_latency(curve: ProposalCurve, latency: ProposalLatency, name: str) -> str:
    """Draw the same change over the median time of a frame; each point is labelled with its number.

    Args:
        curve: what is drawn.
        latency: of its points.
        name: prefix of the identifiers in the SVG, unique in the page.
    """
    stats = {point.proposals: point.stats for point in latency.points}
    medians = [stats[point.proposals].p50_ms for point in curve.points]
    with drawn_figure(name, width=5.6, height=3.4) as (figure, result):
        axes = figure.add_subplot()
        shift = _ASIDE * (max(medians) - min(medians))
        _changes(axes, curve, [median - shift for median in medians], [median + shift for median in medians])
        above = axes.twiny()
        above.set_xlim(axes.get_xlim())
        above.set_xticks(medians, _numbers(curve))
        above.tick_params(length=0)
        above.grid(visible=False)
        above.set_xlabel("proposals")
        axes.set_xlabel("median time of a frame, ms")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return result[0]


def _numbers(curve: ProposalCurve) -> list[str]:
    """Return the labels of a curve's points: no time stands without the parity of what took it."""
    verdicts = [parity_gates_verdict(point.gates).state for point in curve.points]
    return [
        f"{point.proposals}" if verdict == "ok" else f"{point.proposals} (parity {verdict})"
        for point, verdict in zip(curve.points, verdicts, strict=True)
    ]


def _changes(
    axes: Axes, curve: ProposalCurve, voc_places: Sequence[float], coco_places: Sequence[float]
) -> None:
    """Draw both metrics at their places; the run's own number is zero and has no interval."""
    own = own_point(curve)
    axes.axhline(0, color=MUTED, linewidth=0.8)
    for metric, places, colour, marker, value, interval in (
        ("VOC mAP", voc_places, SERIES[2], "o", "voc_map50", "voc_change_interval"),
        ("COCO mAP", coco_places, SERIES[1], "s", "coco_map", "coco_change_interval"),
    ):
        changes = [100 * (getattr(point, value) - getattr(own, value)) for point in curve.points]
        spans = [getattr(point, interval) for point in curve.points]
        # A bootstrap's percentiles need not hold the value itself.
        below = [max(0.0, x - 100 * one.low) if one else 0.0 for x, one in zip(changes, spans, strict=True)]
        over = [max(0.0, 100 * one.high - x) if one else 0.0 for x, one in zip(changes, spans, strict=True)]
        axes.errorbar(
            places,
            changes,
            yerr=(below, over),
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1.2,
            capsize=3,
            label=metric,
        )
    axes.set_ylabel("change of mAP, points")


def _bars(profile: LatencyProfile) -> Sequence[tuple[str, float, float | None]]:
    ranked = sorted(profile.layers, key=lambda row: (-max(row.artifact_ms, row.eager_ms or 0.0), row.order))
    chosen = {row.order for row in ranked[:MAX_BARS]}
    bars = [(row.path, row.artifact_ms, row.eager_ms) for row in profile.layers if row.order in chosen]
    rest = ranked[MAX_BARS:]
    if rest:
        eager = sum(row.eager_ms or 0.0 for row in rest)
        bars.append((f"the other {len(rest)} paths", sum(row.artifact_ms for row in rest), eager))
    return bars


def _scatter_by_stage(axes: Axes, layers: Sequence[LayerParity], values: Sequence[float]) -> None:
    orders = [layer.order for layer in layers]
    axes.plot(orders, values, color=GRID, linewidth=0.8, zorder=1)
    for stage in STAGES:
        chosen = [place for place, layer in enumerate(layers) if layer.stage == stage]
        if chosen:
            axes.plot(
                [orders[place] for place in chosen],
                [values[place] for place in chosen],
                linestyle="none",
                marker=_STAGE_MARKERS[stage],
                markersize=5.5,
                color=STAGE_COLOURS[stage],
                markeredgecolor=SURFACE,
                markeredgewidth=0.5,
                label=stage.replace("_", " "),
            )
    failing = [place for place, layer in enumerate(layers) if layer.failed]
    if failing:
        axes.plot(
            [orders[place] for place in failing],
            [values[place] for place in failing],
            linestyle="none",
            marker="o",
            markersize=11,
            markerfacecolor="none",
            color=BAD,
            markeredgewidth=1.6,
            label="not ok",
        )


def _mark_worst(axes: Axes, layers: Sequence[LayerParity]) -> None:
    worst = min(layers, key=lambda layer: (layer.sqnr_fp32_db or 0.0, layer.order))
    late = worst.order > layers[-1].order / 2
    axes.annotate(
        f"{worst.path} {worst.sqnr_fp32_db:.1f} dB",
        (worst.order, worst.sqnr_fp32_db or 0.0),
        xytext=(-8 if late else 8, -9),
        textcoords="offset points",
        ha="right" if late else "left",
        fontsize=8,
        color=INK,
    )
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.05 * (high - low), high)


def _curve(axes: Axes, subject: Accuracy, label: str, number: int) -> None:
    found: ClassAccuracy | None = next((one for one in subject.classes if one.label == label), None)
    styles = ("-", (0, (4, 2)), (0, (1, 1.2)))
    axes.plot(
        found.recall if found else [],
        found.precision if found else [],
        color=SERIES[number % len(SERIES)],
        linestyle=styles[number % len(styles)],
        linewidth=3.4 if number == 0 else 1.6,
        alpha=0.6 if number == 0 else 1.0,
        label=subject.subject,
    )
