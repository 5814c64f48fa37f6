"""Which images a training learns from, and which decide how good an epoch is. Never the test split."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from qexport.dataset import check_classes, check_names, splits_of
from qexport.errors import DatasetError
from qexport.files import sha256_json
from qexport.samples import Dataset, Sample
from qexport.settings import Settings
from qexport.subject import Subject

if TYPE_CHECKING:
    from qexport.training.settings import TrainingSettings

_TRAINING_SPLITS = ("train", "trainval")
_VALIDATION_SPLITS = ("val", "valid", "validation")
FEWEST_IMAGES = 4


@dataclass(frozen=True, slots=True, eq=False)
class TrainingData:
    """Which images are trained on, and which decide how good an epoch is."""

    samples: tuple[Sample, ...]
    validation: Dataset
    sha256: str

    @property
    def has_boxes(self) -> bool:
        """Whether mAP can be measured."""
        return _counts_boxes(self.validation.samples)


def choose_images(subject: Subject, training: TrainingSettings, split: str | None) -> TrainingData:
    """Return what is trained on and what is validated on.

    Args:
        subject: its calibration split is trained on.
        training: how.
        split: to validate on; None: a part of the images is held out.

    Raises:
        DatasetError: no boxes, classes that are not the detector's, or too few images.
    """
    whole = subject.calibration
    _check(subject, training, whole)
    if split is None:
        samples, validation = _hold_out(whole, training.held_out, subject.settings.seed)
    else:
        samples, validation = whole.samples, _load(subject, split)
        _check(subject, training, validation)
    least = max(FEWEST_IMAGES, training.batch)
    if len(samples) < least:
        raise DatasetError(
            f"{whole.root}: split {whole.split!r} has {len(samples)} images to train on"
            + (f" ({len(validation.samples)} are held out for validation)" if split is None else "")
            + f"; expected at least {least}. Add images, or give a smaller --batch."
        )
    if training.validation_images is not None:
        count = min(training.validation_images, len(validation.samples))
        kept = random.Random(subject.settings.seed).sample(range(len(validation.samples)), count)
        chosen = tuple(validation.samples[index] for index in sorted(kept))
        validation = dataclasses.replace(validation, samples=chosen)
    names = [validation.name_of(sample) for sample in validation.samples]
    return TrainingData(samples, validation, sha256_json([validation.sha256, names]))


def _check(subject: Subject, training: TrainingSettings, dataset: Dataset) -> None:
    """Check that the detector can be trained on a split."""
    settings, loaded = subject.settings, subject.loaded
    if not _counts_boxes(dataset.samples):
        if training.distill_only:
            return
        raise DatasetError(
            f"{dataset.root}: split {dataset.split!r} has no annotated boxes in its {len(dataset.samples)} "
            "images, and the detector's own losses need them. Annotate them, or give --distill-only: then the "
            "float detector is the teacher."
        )
    check_classes(dataset, loaded.num_classes, settings.model)
    if loaded.named_labels and not settings.classes:
        check_names(dataset, loaded.labels, settings.model)


def _load(subject: Subject, split: str) -> Dataset:
    """Return a split, with boxes or without."""
    other = Subject(msgspec.structs.replace(subject.settings, calibration_split=split))
    other.loaded = subject.loaded
    return other.calibration


def choose_splits(settings: Settings) -> tuple[str | None, str | None]:
    """Return the names of the training and the validation split; None: the only one, or none.

    Raises:
        DatasetError: the test split was named, or one split for both.
    """
    there = splits_of(Path(settings.data))
    train = settings.calibration_split or next((name for name in _TRAINING_SPLITS if name in there), None)
    validation = settings.split or next((name for name in _VALIDATION_SPLITS if name in there), None)
    if "test" in (train, validation):
        raise DatasetError(
            f"{settings.data}: split 'test' is for the figure at the end, not for training and not for choosing "
            f"an epoch. The splits there are: {', '.join(there)}."
        )
    if train is None and there and there != ("test",):
        train = next(name for name in there if name not in ("test", validation))
    if there == ("test",) or (train is None and there):
        raise DatasetError(f"{settings.data}: has only split {there[0]!r}; there is none to train on.")
    if train == validation and train is not None:
        raise DatasetError(
            f"{settings.data}: {train!r} cannot be trained on and validated on. Leave out --val-split: a part of "
            "the training images is then held out."
        )
    return train, validation


def _hold_out(whole: Dataset, share: float, seed: int) -> tuple[tuple[Sample, ...], Dataset]:
    """Return the samples to train on, and a dataset of those held out."""
    count = max(1, round(len(whole.samples) * share))
    held = set(random.Random(seed).sample(range(len(whole.samples)), count))
    validation = tuple(whole.samples[index] for index in sorted(held))
    training = tuple(sample for index, sample in enumerate(whole.samples) if index not in held)
    return training, dataclasses.replace(whole, samples=validation)


def _counts_boxes(samples: tuple[Sample, ...]) -> bool:
    return any(not box.ignored for sample in samples for box in sample.boxes)
