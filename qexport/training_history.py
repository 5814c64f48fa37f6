"""What became of a training, epoch by epoch: `history.json`."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

Status = Literal["training", "complete", "stopped early", "diverged"]
HISTORY = "history.json"
NOTE = "history"
"""Under which a checkpoint's notes hold its history."""
ORIGIN = "training.json"
"""The history of the training that a run's checkpoint comes from, in the run's folder."""
_MORE_THAN_DOUBLED = 2.0


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The validation split, as the quantized reference sees it."""

    coco_map: float | None = None
    voc_map50: float | None = None
    distance: float | None = None
    """Distance to the float detector, where there are no boxes to measure mAP with."""

    @property
    def score(self) -> float:
        """What the best epoch has most of: the mean of both mAPs, since a run's gates look at both."""
        if self.coco_map is not None and self.voc_map50 is not None:
            return (self.coco_map + self.voc_map50) / 2
        return -(self.distance or 0.0)

    def has_fallen(self, start: Measured, max_fall: float) -> bool:
        """Tell whether this is divergence: mAP fallen by more than `max_fall`, or the distance more than doubled."""
        if self.coco_map is not None and start.coco_map is not None:
            return start.coco_map - self.coco_map > max_fall
        distance = self.distance or 0.0
        return not math.isfinite(distance) or distance > _MORE_THAN_DOUBLED * (start.distance or 0.0)

    def __str__(self) -> str:
        """Return it for people."""
        if self.coco_map is None:
            return f"distance to float {self.distance:.5f}"
        return f"COCO mAP {self.coco_map:.4f}, VOC mAP {self.voc_map50:.4f}"


class EpochRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One epoch; number 0 is the detector as training began, calibrated and not trained."""

    epoch: int
    steps: int
    """Of all epochs so far."""
    learning_rate: float
    """At the last step."""
    losses: dict[str, float]
    """Mean over the epoch's steps, weights applied."""
    scales_follow: bool
    """Whether the scales still followed what was seen at the epoch's end."""
    measured: Measured
    best: bool
    """Whether it was the best so far."""


class History(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`history.json`."""

    status: Status = "training"
    message: str = ""
    """Why training stopped."""
    float_detector: Measured | None = None
    """The float detector on the same images."""
    epochs: tuple[EpochRecord, ...] = ()

    @property
    def best(self) -> EpochRecord:
        """The epoch whose weights and scales are kept."""
        return [record for record in self.epochs if record.best][-1]
