"""What a choice of observers by error came to. Frozen values that save as JSON."""

from __future__ import annotations

import msgspec

from qexport.layers import Stage

OBSERVERS = "observers.json"
MIN_MAX = "min-max"
"""The observer that the others are measured against."""


class TensorChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The observers of one tensor, measured at what reads it.

    Signal over noise, in dB, at the outputs of the layers that read the tensor, when it alone is quantized; None
    where nothing differs.
    """

    key: str
    """Of its row in the encodings."""
    sqnr_db: dict[str, float | None]
    """By observer; one that comes to the scale of min-max is not repeated."""
    best: str
    """The observer that its readers lose least by, if the gain is clear, else min-max."""
    chosen: str
    """The same, or min-max where the choices of its stage do not help the heads."""
    why: str
    """Why another than the loudest gain was taken, in words; empty where the best one is."""

    @property
    def gain_db(self) -> float:
        """What the chosen observer gives over min-max."""
        before, after = self.sqnr_db.get(MIN_MAX), self.sqnr_db.get(self.chosen)
        return 0.0 if before is None or after is None else after - before


class StageChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The choices of one stage, taken or left together."""

    stage: Stage
    tensors: int
    """For which another observer than min-max is best."""
    sqnr_db: float | None
    """Signal over noise at the heads' outputs with them, and with those of the stages before that were taken."""
    taken: bool


class ObserverReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`observers.json`: which observer every tensor got, and what that gave."""

    rows_sha256: str = ""
    """Of the encodings that came of it."""
    images: int = 0
    """That the ranges of the comparison come from."""
    held_out: int = 0
    """That the errors are measured on."""
    min_max_db: float | None = None
    """Signal over noise at the heads' outputs, all int8, every tensor by min-max."""
    chosen_db: float | None = None
    """The same by the chosen observers."""
    stages: tuple[StageChoice, ...] = ()
    tensors: tuple[TensorChoice, ...] = ()
    """In order of execution."""
