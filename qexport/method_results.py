"""What comes of quantizing the same detector by other methods. Frozen values that save as JSON.

Nothing that is measured in time stands in MethodsReport; the times are in MethodsLatency.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from qexport.results import Interval, LatencyStats, Machine

MethodName = Literal["dynamic", "activations", "ptq"]
METHODS: tuple[MethodName, ...] = ("dynamic", "activations", "ptq")
FLOAT = "fp32"
"""The row that the others are compared with: the detector as it came, in PyTorch."""


class MethodRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The detector quantized by one method; accuracy in 0..1."""

    method: str
    """`fp32`, or the method's name."""
    what: str
    """What is quantized, in words."""
    runs_in: str
    """What ran it."""
    size_bytes: int
    """Of its saved state dict."""
    voc_map50: float
    coco_map: float
    voc_change_interval: Interval | None
    """Paired bootstrap of VOC mAP minus that in float; None for float itself."""
    coco_change_interval: Interval | None


class MethodsReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The same detector by several methods, on one split."""

    detector_sha256: str
    rows_sha256: str
    """Of the encodings that `activations` takes, and that `ptq` stands beside."""
    dataset: str
    dataset_sha256: str
    split: str
    images: int
    rows: tuple[MethodRow, ...]
    """Float first."""


class MethodsLatency(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Latency of the methods that have kernels of their own: run in turns, in one process, on one frame."""

    detector_sha256: str
    machine: Machine
    threads: int
    warmup: int
    measured_at: str
    """UTC, ISO 8601."""
    whole: dict[str, LatencyStats]
    """By method, float among them."""
