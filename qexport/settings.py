"""What a run is asked to do: the settings that every stage reads, saved as `run.json`."""

from __future__ import annotations

from typing import Literal

import msgspec

ObserverName = Literal["min-max", "percentile", "mse", "auto"]
WeightScales = Literal["per-channel", "per-tensor"]
Scheme = Literal["int8", "activations"]
PreprocessPlace = Literal["inside", "outside"]


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The identity of a run: two runs with equal settings give equal bytes (timings apart)."""

    model: str
    """`file.py:function`, `package.module:function`, `torchvision:NAME` or `demo`."""
    weights: str | None = None
    data: str
    classes: tuple[str, ...] = ()
    """Class names in label order, where the dataset does not give an order; empty: the dataset's own."""
    frame_px: tuple[int, int] | None = None
    """Height and width of the camera frame; None: the commonest size in the dataset."""
    proposals: int | None = None
    """Proposals that the box head sees; None: the detector's own number."""
    detections: int | None = None
    preprocess: PreprocessPlace = "inside"
    calibration_data: str | None = None
    """Images to calibrate with, where they are not those of `data`; they need no annotations."""
    calibration_split: str | None = None
    """None: `train` where there is one."""
    calibration_images: int = 64
    observer: ObserverName = "min-max"
    percentile: float = 99.99
    scheme: Scheme = "int8"
    """`activations`: feature maps alone are int8, weights stay float. No target runs that, the reference does."""
    weight_scales: WeightScales = "per-channel"
    """One scale for each output channel of a weight, or the same for all of them, as older runtimes have it."""
    keep_float: tuple[str, ...] = ()
    qat: str | None = None
    """A QAT checkpoint, whose weights and scales are taken."""
    qat_prepare: str | None = None
    """`FILE:FUNCTION` that prepared the model for training; the user's code, which is run."""
    strict: bool = False
    """Refuse scales that the QAT checkpoint does not say or that the scheme cannot express."""
    target_options: tuple[str, ...] = ()
    """`TARGET.NAME=VALUE`, as given with -O."""
    split: str | None = None
    """The split that accuracy and parity are measured on; None: `test` where there is one, else `val`."""
    parity_images: int = 8
    tolerance_steps: int = 1
    max_unmatched: float = 0.0
    """Largest share of layers that may be unmatched."""
    max_drop: float = 0.01
    """Largest fall of VOC and of COCO mAP from eager, as a fraction (0.01 is one point)."""
    min_accounted: float = 0.9
    """Smallest share of the whole latency that the layers must add up to."""
    seed: int = 0


class RunRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`run.json`."""

    settings: Settings
    weights_sha256: str | None
    dataset_name: str
    dataset_sha256: str
    """Digest of annotations and images of the splits that are used."""
    qexport_version: str
    versions: dict[str, str]
    """Packages, Python, platform."""
    command: str
    """The exact command, as the user gave it."""
