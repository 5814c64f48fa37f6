"""What a format of QAT checkpoints is: how it is recognised, and how it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from qexport.calibration.checkpoints.content import Content
from qexport.calibration.checkpoints.ranges import QatCheckpoint, QatRange


@dataclass(frozen=True, slots=True)
class Detector:
    """What a reader needs to know of the detector."""

    norms: Mapping[str, str]
    """The BatchNorm behind each convolution or linear that has one."""
    modules: frozenset[str]
    """Module paths."""

    def checkpoint(
        self,
        name: str,
        path: Path,
        state: Mapping[str, Tensor] | None,
        ranges: tuple[QatRange, ...],
        notes: tuple[str, ...] = (),
    ) -> QatCheckpoint:
        """Return what was read of a checkpoint of this detector."""
        return QatCheckpoint(name, path, state, ranges, self.norms, self.modules, notes)


@dataclass(frozen=True, slots=True)
class Format:
    """A format of QAT checkpoints."""

    name: str
    looks: str
    """What it is recognised by."""
    recognised: Callable[[Content], bool]
    read: Callable[[Content, Detector, str | None], QatCheckpoint]
    """Takes the file, the detector, and the value of --qat-prepare."""
    takes_prepare: bool = True
    """--qat-prepare says something that the file does not."""
    has_weights: bool = True
    """The file holds the weights; otherwise --weights gives them."""
