"""What `sensitivity` says: which layers cost the accuracy, and what it costs to have it back. Saves as JSON."""

from __future__ import annotations

from typing import Literal

import msgspec

from qexport.layers import Stage
from qexport.results import Gate, Interval

Grain = Literal["layer", "block", "stage"]
"""What is made float at a time: a convolution or linear, the modules of one name at the third level
(`backbone.body.layer1`), or a whole stage."""


class _Result(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base: frozen, named fields, unknown fields refused."""


class UnitNoise(_Result, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One unit: what its integers do to the outputs of the two heads, the boxes that are pooled being the same.

    Noise is of the logits and deltas of RPN head and box head: the power of the difference from the float detector
    over the power of the signal, the mean over the four outputs.
    """

    name: str
    """The module path of a layer, the common path of a block, or the stage."""
    stage: Stage
    keep_float: tuple[str, ...]
    """Patterns of module paths that leave it in float."""
    layers: int
    """In it."""
    macs: int
    weight_bytes: int
    """Of its int8 weights."""
    alone_db: float | None
    """Signal to noise when it alone is quantized; None where nothing differs."""
    left_float_db: float | None
    """Signal to noise when all but it is quantized."""
    share: float
    """Of the noise of the whole int8 detector that goes when it is left float; below zero where errors cancelled."""


class Point(_Result, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One configuration whose accuracy was measured."""

    keep_float: tuple[str, ...]
    """Patterns of module paths that stay float; none: all int8."""
    units: int
    """Units that stay float."""
    voc_map50: float
    coco_map: float
    voc_drop: float
    """Of VOC mAP from the float detector; below zero where it is higher."""
    coco_drop: float
    voc_drop_interval: Interval
    """Paired bootstrap of the drop."""
    coco_drop_interval: Interval
    float_macs: float
    """Share of the multiply-accumulates that are computed in float."""
    weight_bytes: int
    """Of all weights as this configuration stores them."""
    latency_ms: float | None
    """Predicted: the target's measured int8 latency, with the measured float32 time in place of the int8 time for every
    float layer. None where the target was not timed."""

    @property
    def drop(self) -> float:
        """The larger of the two drops."""
        return max(self.voc_drop, self.coco_drop)


class SensitivityReport(_Result, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`sensitivity.json`."""

    encodings_sha256: str
    target: str
    """Whose latency the predictions stand on; empty where none was timed."""
    grain: Grain
    noise_images: int
    dataset: str
    dataset_sha256: str
    split: str
    """That accuracy was measured on."""
    images: int
    whole_db: float | None
    """Signal to noise of the whole int8 detector."""
    stages: tuple[UnitNoise, ...]
    units: tuple[UnitNoise, ...]
    """In order of execution."""
    points: tuple[Point, ...]
    """In the order in which they were measured; the first is all int8."""
    max_drop: float | None
    """The budget, as a fraction; None where none was given."""
    smallest_budget: float
    """The smallest drop that this split can tell from noise: half the width of the paired interval of all int8."""
    chosen: int | None
    """The point that keeps the budget with the least latency; None where none was asked or found."""
    gates: tuple[Gate, ...]
