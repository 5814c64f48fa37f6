"""The history of a training as a picture."""

from __future__ import annotations

from pathlib import Path

from qexport.files import whole_file
from qexport.training_history import History


def draw_history(history: History, path: Path) -> Path:
    """Draw losses and the validation figure over the epochs; return `path`."""
    import matplotlib as mpl  # noqa: PLC0415 - a training without it could not end otherwise

    mpl.use("Agg")
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, measured = figure.subplots(1, 2)
    numbers = [record.epoch for record in history.epochs]
    for name in sorted({name for record in history.epochs for name in record.losses}):
        there = [(record.epoch, record.losses[name]) for record in history.epochs if name in record.losses]
        losses.plot(*zip(*there, strict=True), marker="o", label=name)
    losses.set(title="Losses, mean of an epoch", xlabel="epoch", xticks=numbers[1:])
    if len(numbers) > 1:
        losses.legend(fontsize="small")
    has_map = history.epochs[0].measured.coco_map is not None
    measured.plot(
        numbers, [abs(record.measured.score) for record in history.epochs], marker="o", label="int8"
    )
    if history.float_detector is not None:
        measured.axhline(abs(history.float_detector.score), color="grey", linestyle="--", label="float")
    measured.plot(history.best.epoch, abs(history.best.measured.score), "*", markersize=14, label="kept")
    name = "Mean of COCO and VOC mAP" if has_map else "Distance to float"
    measured.set(title=f"{name}, validation split", xlabel="epoch", xticks=numbers)
    measured.legend(fontsize="small")
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=110, metadata={"Software": None})
    return path
