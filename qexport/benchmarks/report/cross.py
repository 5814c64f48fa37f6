"""Targets against each other in the report: a picture with a cell for each pair, and what each cell stands for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qexport.benchmarks.report.figure import BAD, INK, SERIES, drawn_figure
from qexport.cross_results import CrossPair, CrossReport, CrossSum

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CELL_IN, _MARGIN_IN, _LEGEND_IN, _PAGE_IN = 0.95, 1.0, 0.75, 9.6
_FAINTEST, _PER_DECADE, _DARKEST = 0.10, 0.085, 0.55
"""Opacity of a cell where next to nothing differs, more of it for ten times as many values, and the most there is."""
_MOST_STEPS = 1


def matrix(report: CrossReport, name: str) -> str:
    """Draw how many values differ between any two targets, and by how many steps at most.

    Args:
        report: what is drawn.
        name: prefix of the identifiers in the SVG, unique in the page.
    """
    names = [target.name for target in report.targets]
    panels: list[tuple[str, Callable[[CrossPair], CrossSum | None]]] = [
        ("Convolutions, linears and adds, per million", lambda pair: pair.promised)
    ]
    if any("roi_align" in pair.kinds for pair in report.pairs):
        panels.append(("RoIAlign, whose forms differ, per million", lambda pair: pair.kinds.get("roi_align")))
    side = _CELL_IN * (len(names) - 1)
    width = max(len(panels) * (side + _MARGIN_IN), _PAGE_IN)
    with drawn_figure(name, width=width, height=side + _LEGEND_IN) as (figure, result):
        for place, (title, value) in enumerate(panels, start=1):
            axes = figure.add_subplot(1, len(panels), place)
            _panel(axes, names, {(pair.first, pair.second): value(pair) for pair in report.pairs})
            axes.set_title(title)
    return result[0]


def sentences(report: CrossReport) -> tuple[str, ...]:
    """Return, for each pair of targets, which kinds of layers are identical; then what is not compared, if anything."""
    said = []
    for pair in report.pairs:
        same = [kind for kind, total in pair.kinds.items() if not total.differing]
        other = [
            f"{kind.replace('_', ' ')} {total.differing:,} of {total.values:,}"
            for kind, total in pair.kinds.items()
            if total.differing
        ]
        parts = [f"identical: {', '.join(kind.replace('_', ' ') for kind in same)}"] if same else []
        parts += [f"differing: {', '.join(other)}"] if other else []
        said.append(f"{pair.first} and {pair.second}: {'; '.join(parts)}.")
    most = max(len(pair.layers) for pair in report.pairs)
    fewer = [
        f"{pair.first} and {pair.second} {len(pair.layers)}"
        for pair in report.pairs
        if len(pair.layers) < most
    ]
    if fewer:
        said.append(
            "A tensor that a target leaves unquantized, to fuse it, has no integers to compare, and the layer that "
            f"takes it in computes something else than where it is rounded first: of {most} tensors "
            f"{', '.join(fewer)} are compared."
        )
    return tuple(said)


def _panel(axes: Axes, names: Sequence[str], cells: dict[tuple[str, str], CrossSum | None]) -> None:
    """Draw the lower half: a pair stands once, where the row of one meets the column of the other."""
    from matplotlib.patches import Rectangle  # noqa: PLC0415 - only a report needs matplotlib

    rows, columns = names[1:], names[:-1]
    for row, second in enumerate(rows):
        for column, first in enumerate(columns[: row + 1]):
            found = cells.get((first, second))
            axes.add_patch(
                Rectangle(
                    (column - 0.47, row - 0.47),
                    0.94,
                    0.94,
                    facecolor=BAD if found and found.max_step > _MOST_STEPS else SERIES[2],
                    alpha=_opacity(found),
                    linewidth=0,
                )
            )
            text, small = _words(found)
            axes.text(column, row - 0.1, text, ha="center", va="center", color=INK, fontsize=9)
            axes.text(column, row + 0.2, small, ha="center", va="center", color=INK, fontsize=7)
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5), aspect="equal")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _opacity(found: CrossSum | None) -> float:
    if found is None or not found.differing:
        return _FAINTEST / 2
    return min(_DARKEST, _FAINTEST + _PER_DECADE * math.log10(1 + found.per_million))


def _words(found: CrossSum | None) -> tuple[str, str]:
    if found is None:
        return "\N{EN DASH}", "not compared"
    if not found.differing:
        return "0", "identical"
    shown = f"{found.per_million:,.0f}" if found.per_million >= 100 else f"{found.per_million:.2g}"
    return shown, "1 step" if found.max_step == 1 else f"{found.max_step} steps"
