"""Sensitivity in the report: how loud each unit's integers are, and accuracy against latency of what was tried."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qexport.benchmarks.report.figure import BAD, INK, MUTED, SERIES, STAGE_COLOURS, drawn_figure
from qexport.sensitivity_results import Point, SensitivityReport, UnitNoise

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_BARS = 30
_BAR_IN, _MARGIN_IN, _PAGE_IN = 0.22, 1.1, 9.6


def noise_plot(report: SensitivityReport, name: str) -> str:
    """Draw how much noise each unit makes when it alone is quantized.

    Args:
        report: what is drawn; of many units the loudest.
        name: prefix of the identifiers in the SVG, unique in the page.
    """
    units = loudest(report.units)[:_MOST_BARS][::-1]
    with drawn_figure(name, width=_PAGE_IN, height=_MARGIN_IN + _BAR_IN * len(units)) as (figure, result):
        axes = figure.add_subplot()
        ratios = [0.0 if unit.alone_db is None else 10 ** (-unit.alone_db / 10) for unit in units]
        colours = [STAGE_COLOURS[unit.stage] for unit in units]
        axes.barh(range(len(units)), ratios, color=colours, height=0.7)
        axes.set_yticks(range(len(units)), [unit.name for unit in units])
        axes.set_xlabel("noise over signal at the heads' outputs, this unit alone in int8")
        axes.grid(axis="y", visible=False)
        axes.set_title("What each unit's integers do")
    return result[0]


def trade_plot(report: SensitivityReport, name: str) -> str:
    """Draw the drop of mAP of every configuration against its latency, or its share of float work.

    Args:
        report: what is drawn.
        name: prefix of the identifiers in the SVG, unique in the page.
    """
    with drawn_figure(name, width=_PAGE_IN, height=3.4) as (figure, result):
        axes = figure.add_subplot()
        best = pareto(report.points)
        for index, point in enumerate(report.points):
            colour = SERIES[1] if index in best else MUTED
            axes.plot(_cost(point), 100 * point.drop, "o", color=colour, markersize=5)
        front = sorted(best, key=lambda index: _cost(report.points[index]))
        axes.plot(
            [_cost(report.points[index]) for index in front],
            [100 * report.points[index].drop for index in front],
            color=SERIES[1],
            linewidth=1,
            label="Pareto points",
        )
        _mark(axes, report)
        timed = report.points[0].latency_ms is not None
        axes.set_xlabel(f"predicted latency on {report.target}, ms" if timed else "share of MACs in float")
        axes.set_ylabel("drop of mAP, points")
        axes.set_title("Accuracy against time")
        axes.legend()
    return result[0]


def loudest(units: Sequence[UnitNoise]) -> list[UnitNoise]:
    """Return the units, those first that make most noise alone."""
    return sorted(units, key=lambda unit: float("inf") if unit.alone_db is None else unit.alone_db)


def pareto(points: Sequence[Point]) -> frozenset[int]:
    """Return the indices of the points that no other beats in both accuracy and time."""
    return frozenset(
        index
        for index, point in enumerate(points)
        if not any(
            other.drop <= point.drop
            and _cost(other) <= _cost(point)
            and (other.drop < point.drop or _cost(other) < _cost(point))
            for other in points
        )
    )


def _mark(axes: Axes, report: SensitivityReport) -> None:
    """Name all int8 and the choice, and draw the budget."""
    named = {0: "all int8"}
    if report.chosen is not None:
        named[report.chosen] = "chosen" if report.chosen else "all int8, chosen"
    for index, text in named.items():
        point = report.points[index]
        axes.annotate(
            text,
            (_cost(point), 100 * point.drop),
            xytext=(6, 6),
            textcoords="offset points",
            color=INK,
            fontsize=8,
        )
    if report.max_drop is not None:
        axes.axhline(100 * report.max_drop, color=BAD, linewidth=1, linestyle="--", label="budget")


def _cost(point: Point) -> float:
    return point.float_macs if point.latency_ms is None else point.latency_ms
