"""The nouns of a dataset: boxes, samples, and what was left out. Annotations only, never pixels."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Format = Literal["coco", "voc", "folder"]

BACKGROUND = "__background__"
"""Name of label 0."""
GAP = "N/A"
"""Name of a label that no category has, as torchvision names the gaps in COCO's 91 labels."""


@dataclass(frozen=True, slots=True)
class Box:
    """One annotated object.

    xyxy: pixels of the image as `Sample` describes it, continuous: width is x2 - x1, no pixel is added.
    difficult: Pascal VOC's flag; such an object is neither asked for nor held against a detector.
    crowd: COCO's flag, with the same meaning.
    area_px: the area that COCO's small, medium and large go by (COCO takes it from the object's outline);
        None: the area of the box.
    """

    label: int
    xyxy: tuple[float, float, float, float]
    difficult: bool = False
    crowd: bool = False
    area_px: float | None = None

    @property
    def ignored(self) -> bool:
        """Whether the object is left out of the count of objects that must be found."""
        return self.difficult or self.crowd


@dataclass(frozen=True, slots=True)
class Sample:
    """One image and its objects.

    width_px, height_px: size of the raster that the boxes refer to: the EXIF-rotated image, unless the
        annotations give the size of the unrotated one (see `frames.read_image`).
    """

    path: Path
    image_id: int
    width_px: int
    height_px: int
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True, slots=True)
class DroppedBox:
    """An annotation that is no box, and why."""

    image: str
    box: tuple[float, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Dataset:
    """One split of a dataset.

    root: absolute; where the annotations are one .json file, its folder, or the one above `annotations`.
    classes: names in label order; `classes[0]` is the background, a label without a category is `N/A`.
    dropped: the annotated boxes that could not be used.
    sha256: digest of the annotations as used and of every image's bytes; the folder's place is not in it.
    """

    name: str
    root: Path
    split: str
    format: Format
    classes: tuple[str, ...]
    samples: tuple[Sample, ...]
    dropped: tuple[DroppedBox, ...]
    sha256: str

    @property
    def objects(self) -> int:
        """How many boxes the split has, ignored ones included."""
        return sum(len(sample.boxes) for sample in self.samples)

    def name_of(self, sample: Sample) -> str:
        """Return a sample's path relative to the dataset's root, with `/`."""
        return Path(os.path.relpath(sample.path, self.root)).as_posix()


@dataclass(frozen=True, slots=True)
class Listed:
    """One image as the annotations list it; nothing is checked against the image file yet.

    name: the image's name in messages and in the digest, free of the dataset's place.
    source: the annotation file, for messages.
    size_px: (height, width) that the annotations state, None where they do not.
    boxes: as written, unclipped.
    dropped: annotations from which no box could be made at all.
    """

    name: str
    path: Path
    source: Path
    image_id: int
    size_px: tuple[int, int] | None
    boxes: tuple[Box, ...] = ()
    dropped: tuple[DroppedBox, ...] = ()


def clip_box(
    xyxy: tuple[float, float, float, float], size_px: tuple[int, int]
) -> tuple[float, float, float, float] | str:
    """Return the part of a box that lies in the image, or the reason why there is none.

    Args:
        xyxy: as annotated, pixels.
        size_px: (height, width) of the image.
    """
    x1, y1, x2, y2 = xyxy
    height, width = size_px
    if not all(math.isfinite(value) for value in xyxy):
        return "not finite"
    if x2 < x1 or y2 < y1:
        return "inverted"
    if x2 == x1 or y2 == y1:
        return "zero size"
    left, top = min(max(x1, 0.0), width), min(max(y1, 0.0), height)
    right, bottom = min(max(x2, 0.0), width), min(max(y2, 0.0), height)
    if right <= left or bottom <= top:
        return "outside the image"
    return (float(left), float(top), float(right), float(bottom))
