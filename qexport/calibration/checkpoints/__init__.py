"""QAT checkpoints of every format, recognised by their own contents, as float weights and scales."""

from __future__ import annotations

from pathlib import Path

from torch import nn

import qexport.quantization  # noqa: F401 - before torchao: it keeps one of its messages from the screen
from qexport.calibration.checkpoints import (
    aimet,
    eager,
    fx,
    modelopt,
    own,
    pt2e,
    pytorch_quantization,
)
from qexport.calibration.checkpoints.batch_norm import norms_of
from qexport.calibration.checkpoints.content import Content, describe_content, read_content
from qexport.calibration.checkpoints.format import Detector, Format
from qexport.calibration.checkpoints.ranges import QatCheckpoint, QatRange
from qexport.errors import CheckpointError

__all__ = ["FORMATS", "QatCheckpoint", "QatRange", "format_of", "read_checkpoint"]

FORMATS: tuple[Format, ...] = (
    own.CHECKPOINT,
    own.TABLE,
    aimet.FORMAT,
    modelopt.FORMAT,
    pytorch_quantization.FORMAT,
    fx.FORMAT,
    pt2e.FORMAT,
    eager.FORMAT,
)


def read_checkpoint(path: Path, detector: nn.Module, *, prepare: str | None = None) -> QatCheckpoint:
    """Read a QAT checkpoint of any format.

    Nothing in the file is executed. `prepare` names the user's own code, which is run.

    Args:
        path: of the checkpoint.
        detector: that it is of, eager and in eval mode; it is not changed, and its weights do not matter.
        prepare: `FILE:FUNCTION` that returns the model as it was prepared for training.

    Raises:
        CheckpointError: missing or damaged, of no known format, of another detector, without data in its quantizers,
            or with scales that are zero or not finite.
        EncodingsError: a table of qexport that was edited.
    """
    content = read_content(path)
    kind = _format_of(content)
    if prepare is not None and not kind.takes_prepare:
        raise CheckpointError(
            f"--qat-prepare {prepare} is for checkpoints of FX, PT2E and eager QAT; {path} is of format {kind.name}, "
            "which says by itself where its scales belong. Leave --qat-prepare out."
        )
    modules = frozenset(name for name, _ in detector.named_modules())
    return kind.read(content, Detector(norms_of(detector), modules), prepare)


def format_of(path: Path) -> Format:
    """Return the format of a file.

    Raises:
        CheckpointError: missing or damaged, or of no known format.
    """
    return _format_of(read_content(path))


def _format_of(content: Content) -> Format:
    for kind in FORMATS:
        if kind.recognised(content):
            return kind
    known = "\n".join(f"  {kind.name}: {kind.looks}" for kind in FORMATS)
    raise CheckpointError(
        f"{content.path}: no QAT checkpoint of a known format: it holds {describe_content(content)}. Float weights "
        f"belong to --weights. Recognised are\n{known}"
    )
