"""Where a run's weights come from, in the report: the history of their training as a plot."""

from __future__ import annotations

from qexport.benchmarks.report.figure import INK, MUTED, SERIES, drawn_figure
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
        label, lines = _figures(history)
        for place, (line, values) in enumerate(lines):
            measured.plot(numbers, values, "o-", color=SERIES[place], markersize=4, label=line)
        if history.float_detector is not None:
            measured.axhline(0, color=INK, linewidth=1, linestyle="--", label="float")
        measured.axvline(history.best.epoch, color=MUTED, linewidth=1, linestyle=":", label="kept")
        measured.set(title=f"Validation split, {label}", xlabel="epoch", xticks=numbers)
        measured.legend()
    return result[0]


def _figures(history: History) -> tuple[str, list[tuple[str, list[float]]]]:
    """Return what the figures after each epoch are, and each with its name: points of mAP, or a distance."""
    before = history.float_detector
    measured = [record.measured for record in history.epochs]
    if any(one.coco_map is None or one.voc_map50 is None for one in measured):
        return "distance to float", [("int8", [one.distance or 0.0 for one in measured])]
    base = (before.voc_map50 or 0.0, before.coco_map or 0.0) if before is not None else (0.0, 0.0)
    lines = [
        ("VOC mAP", [100 * ((one.voc_map50 or 0.0) - base[0]) for one in measured]),
        ("COCO mAP", [100 * ((one.coco_map or 0.0) - base[1]) for one in measured]),
    ]
    return "int8 less float, points" if before is not None else "points", lines
