"""What a detector is made of: its stages, and its layers by module path."""

from __future__ import annotations

from typing import Literal

import msgspec

Stage = Literal["preprocess", "trunk", "fpn", "rpn_head", "proposals", "roi_align", "box_head", "detections"]
STAGES: tuple[Stage, ...] = (
    "preprocess",
    "trunk",
    "fpn",
    "rpn_head",
    "proposals",
    "roi_align",
    "box_head",
    "detections",
)
"""The pipeline of a two-stage detector, in the order in which it runs."""

_STAGE_OF_PREFIX: tuple[tuple[str, Stage], ...] = (
    ("preprocess", "preprocess"),
    ("transform", "preprocess"),
    ("backbone.fpn", "fpn"),
    ("backbone", "trunk"),
    ("rpn.head", "rpn_head"),
    ("rpn", "proposals"),
    ("roi_heads.box_roi_pool", "roi_align"),
    ("roi_heads.box_head", "box_head"),
    ("roi_heads.box_predictor", "box_head"),
    ("roi_heads", "detections"),
)

Kind = Literal[
    "convolution",
    "linear",
    "pooling",
    "elementwise",
    "activation",
    "resize",
    "concatenation",
    "roi_align",
    "nms",
    "reformat",
    "other",
]
"""The kinds by which engineers sum latency."""


class Layer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One operator of the static detector that computes on feature maps or weights."""

    order: int
    """Position in the order of execution, from 0."""
    path: str
    """Module path."""
    call: int
    """Which call of that module, from 0."""
    op: str
    """The operator's name in PyTorch, `conv2d`."""
    kind: Kind
    stage: Stage
    shape: tuple[int, ...]
    """Shape of the output, batch first, channels second."""
    parameters: int
    macs: int
    """Multiply-accumulates of this call."""
    quantized: bool
    reason: str
    """Why it stays float; empty for a quantized layer."""


def stage_of(path: str) -> Stage:
    """Return the stage that a module path belongs to."""
    for prefix, stage in _STAGE_OF_PREFIX:
        if path == prefix or path.startswith(prefix + "."):
            return stage
    return "detections"


class DetectorReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `qexport inspect` finds: `detector.json`."""

    source: str
    """What the user gave: `model.py:build`, `torchvision:fasterrcnn_resnet50_fpn`, `demo`."""
    detector_sha256: str
    backbone: str
    """Short name for tables, `resnet18-fpn`."""
    labels: tuple[str, ...]
    """Class names by label; `labels[0]` is the background."""
    frame_px: tuple[int, int]
    resized_px: tuple[int, int]
    padded_px: tuple[int, int]
    proposals: int
    detections: int
    parameters: int
    macs: int
    average_sparsity: float
    layers: tuple[Layer, ...]
