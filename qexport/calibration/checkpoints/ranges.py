"""What a QAT checkpoint says: float weights, and the scale of each tensor that was quantized in training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from qexport.errors import CheckpointError
from qexport.mend_results import MendReport
from qexport.training_history import History

Port = Literal["weight", "input", "output"]

_NAMED = 5


@dataclass(frozen=True, slots=True)
class QatRange:
    """One tensor that was quantized in training: `q = clamp(round(x / scale) + zero_point, qmin, qmax)`."""

    path: str
    """Module path in the detector; of a functional module or a stub, the path it has in the checkpoint."""
    port: Port
    """`input`: of the first tensor that the module reads."""
    scale: tuple[float, ...]
    """One value, or one per channel; float32 values."""
    buffer: str
    """Name of what was read in the checkpoint."""
    call: int | None = None
    """Which call of the module; None: every one."""
    op: str = ""
    """The operator of an output, `add`, `add#1`; empty: whatever the module computes."""
    zero_point: tuple[int, ...] = (0,)
    """As many as scales, or one for all."""
    qmin: int = -128
    qmax: int = 127
    axis: int | None = None
    includes_norm: bool | None = False
    """The BatchNorm behind the module is part of it: of the weight that was quantized, of the output. None: unknown."""
    problem: str = ""
    """Why no row can be made of it; raised where a row needs it."""


@dataclass(frozen=True, slots=True)
class QatCheckpoint:
    """A QAT checkpoint, read."""

    format: str
    """`FX QAT`, `NVIDIA ModelOpt`, ..."""
    path: Path
    state: Mapping[str, Tensor] | None
    """Float weights under the detector's own paths; None where the format has none and --weights gives them."""
    ranges: tuple[QatRange, ...]
    norms: Mapping[str, str]
    """The BatchNorm that follows a convolution or a linear, by the path of that."""
    modules: frozenset[str]
    """Module paths of the detector."""
    notes: tuple[str, ...] = ()
    """What the user should know, in sentences."""
    detector_sha256: str = ""
    """Fingerprint of the detector that the scales belong to, where the format has one."""
    keep_float: tuple[str, ...] = ()
    """Patterns of module paths that stay float, where the format has them."""
    history: History | None = None
    """Of the training by `qexport qat` that it comes from."""
    mended: MendReport | None = None
    """Of the `qexport mend` that it comes from."""


def check_scales(
    ranges: Iterable[QatRange], path: Path, state: Mapping[str, Tensor] | None = None
) -> tuple[QatRange, ...]:
    """Return the ranges; refuse scales that are zero, negative or not finite.

    A scale of zero is that of a weight's channel without a value in it, and stays.

    Args:
        ranges: as read.
        path: of the checkpoint.
        state: the weights.

    Raises:
        CheckpointError: names the buffers.
    """
    found = tuple(ranges)
    bad = []
    for entry in found:
        dead = _dead_channels(entry, state)
        for index, scale in enumerate(entry.scale):
            if not math.isfinite(scale) or scale < 0 or (scale == 0 and index not in dead):
                bad.append(
                    f"{entry.buffer} ({scale:g}{f' in channel {index}' if len(entry.scale) > 1 else ''})"
                )
                break
    if bad:
        raise CheckpointError(
            f"{path}: {len(bad)} of {len(found)} scales are zero, negative or not finite: {name_some(bad)}. "
            "The training diverged, or the quantizer saw no data. Give an earlier checkpoint, or calibrate: leave "
            "--qat out and give the float weights with --weights."
        )
    return found


def refuse_unseen(entries: Mapping[str, str], path: Path) -> None:
    """Refuse quantizers that never saw data.

    Args:
        entries: what is known of each, by name.
        path: of the checkpoint.

    Raises:
        CheckpointError: there are any.
    """
    if entries:
        names = name_some([f"{name} ({known})" for name, known in entries.items()])
        raise CheckpointError(
            f"{path}: {len(entries)} quantizers never saw data: {names}. The checkpoint was saved before the first "
            "training step, or before calibration. Train or calibrate it, and save it again."
        )


def name_some(names: list[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _dead_channels(entry: QatRange, state: Mapping[str, Tensor] | None) -> set[int]:
    weight = (state or {}).get(f"{entry.path}.weight") if entry.port == "weight" else None
    if weight is None or weight.shape[0] != len(entry.scale):
        return set()
    empty = weight.flatten(1).abs().amax(1) == 0
    return set(empty.nonzero().flatten().tolist())
