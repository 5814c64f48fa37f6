"""The options that bring a QAT checkpoint in, and the table of where its scales went."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec
import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from qexport.encodings import Encodings, Origin, origin_of
from qexport.settings import Settings

_PANEL = "QAT checkpoint"
_MEANING: dict[Origin, str] = {
    "checkpoint": "the checkpoint's own, bit for bit",
    "requantized": "not as in training: the row says what was given away",
    "shared": "of the tensor that the operator moves or selects from",
    "calibrated": "not in the checkpoint: decided on images or from the weights",
}

Qat: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--qat",
        metavar="FILE",
        rich_help_panel=_PANEL,
        help="A checkpoint of quantization-aware training: its weights and its own scales are taken. PyTorch eager, FX "
        "and PT2E QAT, NVIDIA ModelOpt and pytorch-quantization, AIMET encodings, `qexport qat`; recognised by itself. "
        "With --weights beside it, accuracy is held to the float detector that has those: the one before training.",
        show_default=False,
    ),
]
QatPrepare: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--qat-prepare",
        metavar="FILE:FUNCTION",
        rich_help_panel=_PANEL,
        help="The function that prepared the model for training, which FX and PT2E checkpoints need: their scales "
        "belong to nodes of a graph that it builds. [bold]Your file is run[/bold], with your rights.",
        show_default=False,
    ),
]
_STRICT = "Refuse scales that the checkpoint does not say, or that int8 with zero point 0 cannot express."
Strict: TypeAlias = Annotated[bool, typer.Option("--strict", rich_help_panel=_PANEL, help=_STRICT)]
StrictChange: TypeAlias = Annotated[
    bool | None,
    typer.Option("--strict/--no-strict", rich_help_panel=_PANEL, help=_STRICT, show_default=False),
]


def with_qat(settings: Settings, qat: Path | None, prepare: str | None, *, strict: bool) -> Settings:
    """Return settings with a QAT checkpoint."""
    return msgspec.structs.replace(
        settings, qat=str(qat) if qat else None, qat_prepare=prepare, strict=strict
    )


def following_run(checkpoint: Path, settings: Settings, *, out: str) -> str:
    """Return the command that runs a checkpoint that a command of this detector made, complete as it stands.

    Args:
        checkpoint: `qat.pt` or `mended.pt`.
        settings: that it was made with; with their weights beside it, accuracy is held to the detector before.
        out: the folder that the command names.
    """
    words = ["qexport", "run", "--qat", str(checkpoint), "--model", settings.model]
    words += ["--weights", settings.weights] if settings.weights else []
    words += ["--data", settings.data]
    for pattern in settings.keep_float:
        words += ["--keep-float", pattern]
    words += ["--classes", ",".join(settings.classes)] if settings.classes else []
    words += ["--preprocess", "outside"] if settings.preprocess == "outside" else []
    words += ["--frame", "{}x{}".format(*settings.frame_px)] if settings.frame_px else []
    for name in ("proposals", "detections"):
        number = getattr(settings, name)
        words += [f"--{name}", str(number)] if number is not None else []
    return shlex.join([*words, "--target", "onnx", "--out", out])


def origin_table(encodings: Encodings) -> Table:
    """Return how many scales came from where."""
    table = Table(box=box.SIMPLE_HEAD, title=f"Scales of {escape(str(encodings.calibration['qat']))}")
    for name, right in (("from", False), ("rows", True), ("meaning", False), ("first", False)):
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    origins = [origin_of(row) for row in encodings.rows]
    for origin, count in Counter(origins).most_common():
        first = encodings.rows[origins.index(origin)]
        table.add_row(origin, str(count), _MEANING[origin], escape(f"{first.key}: {first.source}"))
    return table
