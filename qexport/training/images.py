"""Batches of images and boxes, as the detector's static form sees them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qexport.artifact import InputSpec
from qexport.detectors import operators
from qexport.frames import read_sample
from qexport.samples import Sample

Target = dict[str, Tensor]
"""As torchvision takes it: boxes, (N, 4) float32 xyxy in pixels of the resized image; labels, (N,) int64."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Images and what is on them.

    images: (N, 3, padded_h, padded_w) float32, normalised.
    targets: one an image.
    """

    images: Tensor
    targets: list[Target]

    def to(self, device: torch.device) -> Batch:
        """Return it on a device."""
        targets = [{name: value.to(device) for name, value in target.items()} for target in self.targets]
        return Batch(self.images.to(device), targets)


def order_of_epoch(samples: Sequence[Sample], epoch: int, *, images: int | None, seed: int) -> list[Sample]:
    """Return the samples of an epoch in their order, which the seed and the epoch's number alone decide."""
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(samples))[:images]
    return [samples[index] for index in order]


def batches(
    samples: Sequence[Sample], spec: InputSpec, *, size: int, flips: NDArray[np.bool_] | None = None
) -> Iterator[Batch]:
    """Yield samples in batches, the last one as large as what is left.

    Args:
        samples: in their order.
        spec: of the static form.
        size: images in a batch.
        flips: which samples are mirrored; None: none.
    """
    for start in range(0, len(samples), size):
        loaded = [
            load(sample, spec, flip=flips is not None and bool(flips[start + index]))
            for index, sample in enumerate(samples[start : start + size])
        ]
        yield Batch(torch.cat([image for image, _ in loaded]), [target for _, target in loaded])


def load(sample: Sample, spec: InputSpec, *, flip: bool = False) -> tuple[Tensor, Target]:
    """Return one image as the static form's preprocessing makes it, and its boxes in the image's pixels.

    Objects that are not asked for in evaluation either (crowds, VOC's difficult ones) are left out.

    Args:
        sample: to read.
        spec: of the static form.
        flip: mirror it left to right; padding stays at the right.
    """
    frame = read_sample(sample, (spec.frame_height_px, spec.frame_width_px))
    height, width = frame.content_px
    pixels = frame.pixels
    wanted = [box for box in sample.boxes if not box.ignored]
    boxes = np.array([box.xyxy for box in wanted], dtype=np.float64).reshape(-1, 4)
    boxes = boxes * np.array([width / frame.original_px[1], height / frame.original_px[0]] * 2)
    if flip:
        pixels = pixels.copy()
        pixels[:height, :width] = pixels[:height, :width][:, ::-1]
        boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    resized = [spec.resized_height_px, spec.resized_width_px]
    boxes = boxes * np.array([resized[1] / spec.frame_width_px, resized[0] / spec.frame_height_px] * 2)
    image: Tensor = operators.normalised_image(
        torch.from_numpy(np.ascontiguousarray(pixels)),
        list(spec.mean),
        list(spec.std),
        resized,
        [spec.padded_height_px, spec.padded_width_px],
    )
    labels = torch.tensor([box.label for box in wanted], dtype=torch.int64)
    return image, {"boxes": torch.from_numpy(boxes).to(torch.float32), "labels": labels}
