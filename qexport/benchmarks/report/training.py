"""Where a run's weights come from, in the report: the history of their training as a plot."""

from __future__ import annotations

from qexport.benchmarks.report.figure import MUTED, SERIES, drawn_figure
from qexport.training_history import History

_PAGE_IN, _HEIGHT_IN = 9.6, 3.0


def history_plot(history: History, name: str) -> str:
    """Draw the losses and the validation figures over the epochs.

    Args:
        history: what is drawn; epoch 0 is the calibrated detector.
        name: prefix of the identifiers in the SVG, unique in the page.
    """
    with drawn_figure(name, width=_PAGE_IN, height=_HEIGHT_IN) as (figure, result):
        losses, measured = figure.subplots(1, 2)
        numbers = [record.epoch for record in history.epochs]
        for place, term in enumerate(sorted({term for record in history.epochs for term in record.losses})):
            there = [
                (record.epoch, record.losses[term]) for record in history.epochs if term in record.losses
            ]
            losses.plot(
                *zip(*there, strict=True), "o-", color=SERIES[place % len(SERIES)], markersize=4, label=term
            )
        losses.set(title="Losses, mean of an epoch", xlabel="epoch", xticks=numbers)
        if losses.lines:
            losses.legend()
        for place, (label, values, float_value) in enumerate(_figures(history)):
            colour = SERIES[place]
            measured.plot(numbers, values, "o-", color=colour, markersize=4, label=f"{label}, int8")
            if float_value is not None:
                measured.axhline(
                    float_value, color=colour, linewidth=1, linestyle="--", label=f"{label}, float"
                )
        measured.axvline(history.best.epoch, color=MUTED, linewidth=1, linestyle=":", label="kept")
        measured.set(title="Validation split", xlabel="epoch", xticks=numbers)
        measured.legend()
    return result[0]


def _figures(history: History) -> list[tuple[str, list[float], float | None]]:
    """Return what was measured after each epoch: its name, its values, and that of the float detector."""
    before = history.float_detector
    found = []
    for label, name in (
        ("VOC mAP", "voc_map50"),
        ("COCO mAP", "coco_map"),
        ("distance to float", "distance"),
    ):
        values = [getattr(record.measured, name) for record in history.epochs]
        if None not in values:
            found.append((label, values, getattr(before, name) if before is not None else None))
    return found
