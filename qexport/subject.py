"""The detector and the images of a run, loaded when they are first needed and then kept."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from qexport.dataset import check_classes, check_names, load_dataset, require_boxes, splits_of
from qexport.errors import CheckpointError, DatasetError
from qexport.files import sha256_json
from qexport.frames import frame_size, read_sample
from qexport.layers import Layer
from qexport.runtimes.preprocess import normalised_image
from qexport.samples import Dataset, Sample
from qexport.settings import Settings

if TYPE_CHECKING:
    from qexport.calibration.checkpoints import QatCheckpoint
    from qexport.detectors.load import LoadedDetector
    from qexport.detectors.static import StaticDetector

_EVALUATION_SPLITS = ("test", "val", "valid", "validation", "train")
_CALIBRATION_SPLITS = ("train", "val", "valid", "validation", "test")


class Subject:
    """What a run is about."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def resolved(self) -> Settings:
        """Return the settings with what was left open decided: the splits and the frame's size."""
        return msgspec.structs.replace(
            self.settings,
            split=self.evaluation.split,
            calibration_split=self.calibration.split,
            frame_px=self.frame_px,
            keep_float=self.keep_float,
        )

    @property
    def keep_float(self) -> tuple[str, ...]:
        """Patterns of module paths that stay float: the user's, else those that the checkpoint's table has."""
        checkpoint = self.checkpoint
        return self.settings.keep_float or (checkpoint.keep_float if checkpoint is not None else ())

    @cached_property
    def loaded(self) -> LoadedDetector:
        """The eager detector."""
        from qexport.detectors.load import load_detector  # noqa: PLC0415 - torch begins here

        if self.settings.qat:
            return self._trained[0]
        if self.settings.qat_prepare or self.settings.strict:
            option = "--qat-prepare" if self.settings.qat_prepare else "--strict"
            raise CheckpointError(f"{option} is for a QAT checkpoint. Give one with --qat, or leave it out.")
        weights = self.settings.weights
        return load_detector(self.settings.model, Path(weights) if weights else None, seed=self.settings.seed)

    @cached_property
    def original(self) -> LoadedDetector | None:
        """The float detector before training, of the weights that were given beside the checkpoint's own."""
        from qexport.detectors.load import load_detector  # noqa: PLC0415 - torch begins here

        weights, checkpoint = self.settings.weights, self.checkpoint
        if weights is None or checkpoint is None or checkpoint.state is None:
            return None
        return load_detector(self.settings.model, Path(weights), seed=self.settings.seed)

    @property
    def baseline(self) -> LoadedDetector:
        """The float detector that accuracy is compared with: the original where it is given."""
        return self.original or self.loaded

    @property
    def checkpoint(self) -> QatCheckpoint | None:
        """The QAT checkpoint that the scales come from; None where they are calibrated."""
        return self._trained[1] if self.settings.qat else None

    @cached_property
    def _trained(self) -> tuple[LoadedDetector, QatCheckpoint]:
        from qexport.calibration.loading import load_trained  # noqa: PLC0415 - torch begins here

        settings = self.settings
        assert settings.qat is not None  # the callers' condition
        return load_trained(
            settings.model,
            Path(settings.qat),
            weights=Path(settings.weights) if settings.weights else None,
            prepare=settings.qat_prepare,
            seed=settings.seed,
        )

    @cached_property
    def static(self) -> StaticDetector:
        """The static form, for frames of `frame_px`."""
        return self._static(self.loaded)

    @cached_property
    def baseline_static(self) -> StaticDetector:
        """The static form of the float detector that accuracy is compared with."""
        return self.static if self.original is None else self._static(self.original)

    def _static(self, loaded: LoadedDetector) -> StaticDetector:
        from qexport.detectors.static import make_static  # noqa: PLC0415 - torch begins here

        return make_static(
            loaded.module,
            frame_px=self.frame_px,
            proposals=self.settings.proposals,
            detections=self.settings.detections,
            preprocess=self.settings.preprocess,
        )

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of the static form, and what will become of each."""
        from qexport.quantization.inspection import inspect_layers  # noqa: PLC0415 - torch begins here

        return inspect_layers(self.static, keep_float=self.keep_float)

    @cached_property
    def evaluation(self) -> Dataset:
        """The split that accuracy and parity are measured on; its classes are those of the detector."""
        dataset = self._load(self.settings.data, evaluation_split(self.settings))
        require_boxes(dataset)
        check_classes(dataset, self.loaded.num_classes, self.settings.model)
        if self.loaded.named_labels and not self.settings.classes:
            check_names(dataset, self.loaded.labels, self.settings.model)
        return dataset

    @cached_property
    def calibration(self) -> Dataset:
        """The split that scales are decided on; it needs no boxes."""
        root, split = self.settings.calibration_data or self.settings.data, self.settings.calibration_split
        return self._load(root, split or _first(root, _CALIBRATION_SPLITS))

    def split(self, name: str) -> Dataset:
        """Return another split of the run's data.

        Raises:
            DatasetError: there is no such split.
        """
        return self._load(self.settings.data, name)

    @cached_property
    def frame_px(self) -> tuple[int, int]:
        """Height and width of the camera frame."""
        return self.settings.frame_px or frame_size(self.evaluation)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Class names by label: the dataset's, which the detector was checked against."""
        return self.evaluation.classes

    @property
    def dataset_sha256(self) -> str:
        """Digest of the images and annotations that the run uses."""
        return sha256_json([self.evaluation.sha256, self.calibration.sha256])

    def calibration_samples(self) -> list[Sample]:
        """Return the images to calibrate with, drawn by the seed."""
        return self._draw(self.calibration, self.settings.calibration_images)

    def parity_samples(self) -> list[Sample]:
        """Return the images to compare on, drawn by the seed."""
        return self._draw(self.evaluation, self.settings.parity_images)

    def used_samples(self) -> list[Sample]:
        """Return every image that the stages will read, each once."""
        samples = (*self.calibration_samples(), *self.evaluation.samples)
        return list({sample.path: sample for sample in samples}.values())

    def read_all(self, on_image: Callable[[], None]) -> None:
        """Read every image that the stages will read.

        Raises:
            DatasetError: one cannot be read, or its size is not the one that its boxes refer to.
        """
        for _ in self.frames(self.used_samples()):
            on_image()

    def inputs(self, samples: list[Sample]) -> Iterator[NDArray[np.generic]]:
        """Yield what the static form takes for each image: the frame, or the normalised image."""
        outside = self.settings.preprocess == "outside"
        for frame in self.frames(samples):
            yield normalised_image(frame, self.static.spec) if outside else frame

    def frames(self, samples: list[Sample]) -> Iterator[NDArray[np.uint8]]:
        """Yield the camera frame of each image, one at a time."""
        for sample in samples:
            yield read_sample(sample, self.frame_px).pixels

    def _draw(self, dataset: Dataset, count: int) -> list[Sample]:
        if count < 1:
            raise DatasetError(f"{count} images asked for; at least one is needed.")
        there = len(dataset.samples)
        chosen = random.Random(self.settings.seed).sample(range(there), min(count, there))
        return [dataset.samples[index] for index in sorted(chosen)]

    def _load(self, root: str, split: str | None) -> Dataset:
        classes = self.settings.classes
        dataset = load_dataset(Path(root), split, classes=classes)
        if dataset.format == "voc" and not classes and self.loaded.named_labels:
            dataset = load_dataset(Path(root), split, classes=self.loaded.labels[1:])
        return dataset


def evaluation_split(settings: Settings) -> str | None:
    """Return the split that accuracy and parity are measured on; None for a folder that has no splits."""
    return settings.split or _first(settings.data, _EVALUATION_SPLITS)


def _first(root: str, preferred: tuple[str, ...]) -> str | None:
    """Return the split to use where the user named none; None for a folder that has no splits."""
    present = splits_of(Path(root))
    for name in (*preferred, *present):
        if name in present:
            return name
    return None
