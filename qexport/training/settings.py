"""What a training is asked to do, saved as `settings.json` in its folder."""

from __future__ import annotations

import msgspec

from qexport.settings import Settings


class TrainingSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to train: two trainings with equal settings give equal weights and scales (on a CPU)."""

    epochs: int = 2
    learning_rate: float = 1e-3
    """At its peak, after the warm-up."""
    momentum: float = 0.9
    weight_decay: float = 0.0
    warm_up: float = 0.1
    """Share of all steps."""
    batch: int = 4
    images: int | None = None
    """Images of an epoch, drawn anew for each; None: all."""
    flip: bool = True
    """Mirror every second image, by chance."""
    clip_norm: float = 10.0
    """Largest norm of a step's gradient."""
    freeze: tuple[str, ...] = ()
    """Module paths whose weights stay, with what is below them."""
    freeze_observers_after: float = 0.5
    """Epochs for which the scales follow what is seen; 0 keeps those of the calibration."""
    observer_momentum: float = 0.01
    """Share of the way that a scale goes to what one step saw."""
    distill_features: float = 0.0
    """Weight of the distance to the float detector's feature maps."""
    distill_outputs: float = 0.0
    """Weight of the distance to its outputs."""
    distill_only: bool = False
    """No other loss: images need no boxes."""
    validation_images: int | None = None
    """None: all of the validation split."""
    held_out: float = 0.1
    """Share of the training images that is held out where there is no validation split."""
    patience: int = 2
    """Epochs without a better result after which training stops."""
    max_fall: float = 0.1
    """Fall of the validation mAP below where it began that counts as divergence, as a fraction."""
    device: str = "cpu"

    @property
    def distils(self) -> bool:
        """Whether the float detector is asked."""
        return self.distill_features > 0 or self.distill_outputs > 0


class TrainingRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`settings.json`: what a training folder belongs to."""

    detector: Settings
    """The detector, the data and the calibration that training begins with."""
    training: TrainingSettings
    weights_sha256: str | None
    images_sha256: str
    """Digest of the training split: annotations and images."""
    validation_sha256: str
    """Digest of the validation split and of the images held out."""
    threads: int
    """Of torch: sums are added in another order on another number of them."""
    qexport_version: str
    versions: dict[str, str]
    command: str
