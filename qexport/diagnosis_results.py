"""Who did it, when accuracy falls: the stage, the layers, the kind of cause, the evidence, and what mends it."""

from __future__ import annotations

from typing import Literal

import msgspec

from qexport.layers import Stage

Cause = Literal[
    "outliers",
    "unequal channels",
    "saturation",
    "too few calibration images",
    "weights with outliers",
    "rounding",
    "runtime",
]
"""`outliers`: a few activations take the range, the rest has few steps. `unequal channels`: one scale for channels of
very different range. `saturation`: values beyond the range. `too few calibration images`: the same, and the
calibration saw little. `weights with outliers`: as the first, within the weights of a channel. `rounding`: none of
these, 8 bits are too few here. `runtime`: the quantized reference keeps its accuracy, the runtime does not."""


class Suspect(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One layer that costs accuracy."""

    path: str
    stage: Stage
    row: str
    """Key of the row of the encodings whose noise is the loudest of the layer's; of `runtime`, the layer's output."""
    noise_db: float | None
    """Signal to noise at the heads' outputs with that row alone; None for `runtime`."""
    cause: Cause
    evidence: str
    """What was measured, with its numbers."""
    mend: str
    """The option that mends it."""


class Diagnosis(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`diagnosis.json`."""

    subject: str
    """Who fell: `reference` or a target."""
    drop: float
    """The larger of the two drops of mAP, as a fraction."""
    stage: Stage
    """The loudest stage."""
    share: float | None
    """Of the noise of the whole int8 detector that goes when this stage is left float; None for `runtime`."""
    suspects: tuple[Suspect, ...]
    """The worst first."""

    @property
    def sentence(self) -> str:
        """The whole in one line."""
        worst = self.suspects[0]
        others = ", ".join(suspect.path for suspect in self.suspects[1:])
        more = f" (then {others})" if others else ""
        return (
            f"{self.subject} lost {100 * self.drop:.1f} points of mAP in the {self.stage}, at {worst.path}{more}: "
            f"{worst.cause}, {worst.evidence}. Try {worst.mend}"
        )
