"""Detections of a whole split, by whoever detects: the eager detector, the quantized reference, an artifact."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from qexport.artifact import InputSpec
from qexport.detections import Detections
from qexport.detectors.load import LoadedDetector
from qexport.frames import read_sample
from qexport.quantization.partial import PartlyQuantized
from qexport.quantization.reference import QuantizedDetector
from qexport.results import ImageDetections
from qexport.runtimes.runner import Runner, input_of
from qexport.samples import Dataset

Detect = Callable[[NDArray[np.uint8]], Detections]
"""A (H, W, 3) uint8 RGB frame to detections in its pixels."""


@contextmanager
def eager(detector: LoadedDetector) -> Iterator[Detect]:
    """Detect with torchvision's own detector."""

    def run(frame: NDArray[np.uint8]) -> Detections:
        image = torch.from_numpy(frame).permute(2, 0, 1).to(torch.float32) / 255
        with torch.inference_mode():
            found = detector.module([image])[0]
        return Detections(found["boxes"].numpy(), found["scores"].numpy(), found["labels"].numpy())

    yield run


@contextmanager
def reference(quantized: QuantizedDetector) -> Iterator[Detect]:
    """Detect with the quantized reference."""
    spec = quantized.static.spec

    def run(frame: NDArray[np.uint8]) -> Detections:
        with torch.no_grad():
            boxes, scores, labels, count = quantized.graph(torch.from_numpy(input_of(frame, spec)))
        number = int(count)
        return Detections(boxes[:number].numpy(), scores[:number].numpy(), labels[:number].numpy())

    yield run


@contextmanager
def partly(quantized: PartlyQuantized, keys: Collection[str], spec: InputSpec) -> Iterator[Detect]:
    """Detect with some of the rows of the quantized reference; with none of them it is the float detector."""

    def run(frame: NDArray[np.uint8]) -> Detections:
        values = quantized.run(torch.from_numpy(input_of(frame, spec)), keys)
        boxes, scores, labels, count = quantized.outputs(values)
        number = int(count)
        return Detections(boxes[:number].numpy(), scores[:number].numpy(), labels[:number].numpy())

    yield run


def artifact(runner: type[Runner], folder: Path, threads: int) -> AbstractContextManager[Detect]:
    """Detect with an artifact."""

    @contextmanager
    def opened() -> Iterator[Detect]:
        with runner(folder, threads=threads) as running:
            yield running.infer

    return opened()


def over(
    dataset: Dataset, frame_px: tuple[int, int], detect: Detect, *, on_image: Callable[[], None]
) -> tuple[ImageDetections, ...]:
    """Detect on every image of a split; boxes are in pixels of the original images."""
    results = []
    for sample in dataset.samples:
        frame = read_sample(sample, frame_px)
        found = detect(frame.pixels)
        boxes = frame.to_original(found.boxes)
        results.append(
            ImageDetections(
                image=dataset.name_of(sample),
                boxes=tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in boxes),
                scores=tuple(float(score) for score in found.scores),
                labels=tuple(int(label) for label in found.labels),
            )
        )
        on_image()
    return tuple(results)


def to_arrays(image: ImageDetections) -> Detections:
    """Return recorded detections as arrays."""
    return Detections(
        np.asarray(image.boxes, np.float32).reshape(-1, 4),
        np.asarray(image.scores, np.float32),
        np.asarray(image.labels, np.int64),
    )
