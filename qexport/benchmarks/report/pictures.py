"""Images with the float detector's boxes beside the target's, the largest differences first.

Only boxes with a score of at least SHOWN_SCORE are drawn. A drawn box is unmatched where the other side
has no box of the same class, at any score, with an IoU of at least SAME_IOU; one box matches one box.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from qexport.results import DetectionsRecord, ImageDetections

SHOWN_SCORE = 0.5
SAME_IOU = 0.5
MAX_PICTURES = 8
MAX_WIDTH_PX = 480

XYXY = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class DrawnBox:
    """One box on a picture."""

    box: XYXY
    """xyxy, pixels of the original image."""
    score: float
    label: int
    matched: bool


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two subjects are apart on one image."""

    image: str
    eager: tuple[DrawnBox, ...]
    actual: tuple[DrawnBox, ...]
    unmatched: int
    """Drawn boxes of either side without a partner."""
    score_difference: float
    """The largest among pairs of which at least one is drawn."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image to embed."""

    width_px: int
    """Of the original image, as the boxes are."""
    height_px: int
    data_uri: str
    """JPEG, at most MAX_WIDTH_PX wide."""


def largest_differences(
    record: DetectionsRecord, target: str, limit: int = MAX_PICTURES
) -> tuple[Difference, ...]:
    """Return the images on which a target is farthest from eager: unmatched boxes, then scores, then names.

    Images that only one of the two has are left out; empty where either subject is missing.
    """
    eager = {one.image: one for one in record.subjects.get("eager", ())}
    actual = {one.image: one for one in record.subjects.get(target, ())}
    found = [_compare(eager[image], actual[image]) for image in eager if image in actual]
    found.sort(key=lambda one: (-one.unmatched, -one.score_difference, one.image))
    return tuple(found[:limit])


def embed(dataset_root: Path | None, image: str) -> Picture | str:
    """Return the image, shrunk, as a data URI; or the sentence that says why it is not shown."""
    if dataset_root is None:
        return "The dataset was not at hand when this report was written."
    path = (dataset_root / image).resolve()
    if not path.is_relative_to(dataset_root.resolve()):
        return "Not shown: the path leads out of the dataset."
    try:
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened).convert("RGB")
    except FileNotFoundError:
        return "Not shown: the dataset has no such file."
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        return f"Not shown: the image cannot be read ({type(error).__name__})."
    width, height = upright.size
    if width > MAX_WIDTH_PX:
        size = (MAX_WIDTH_PX, max(1, round(height * MAX_WIDTH_PX / width)))
        upright = upright.resize(size, Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    upright.save(stream, "JPEG", quality=82)
    text = base64.b64encode(stream.getvalue()).decode("ascii")
    return Picture(width_px=width, height_px=height, data_uri=f"data:image/jpeg;base64,{text}")


def _compare(eager: ImageDetections, actual: ImageDetections) -> Difference:
    pairs = _pairs(eager, actual)
    of_eager = {one for one, _ in pairs}
    of_actual = {other for _, other in pairs}
    drawn_eager, drawn_actual = _drawn(eager, of_eager), _drawn(actual, of_actual)
    differences = [
        abs(eager.scores[one] - actual.scores[other])
        for one, other in pairs
        if max(eager.scores[one], actual.scores[other]) >= SHOWN_SCORE
    ]
    return Difference(
        image=eager.image,
        eager=drawn_eager,
        actual=drawn_actual,
        unmatched=sum(not box.matched for box in (*drawn_eager, *drawn_actual)),
        score_difference=max(differences, default=0.0),
    )


def _drawn(one: ImageDetections, matched: set[int]) -> tuple[DrawnBox, ...]:
    return tuple(
        DrawnBox(box=one.boxes[place], score=score, label=one.labels[place], matched=place in matched)
        for place, score in enumerate(one.scores)
        if score >= SHOWN_SCORE
    )


def _pairs(eager: ImageDetections, actual: ImageDetections) -> Sequence[tuple[int, int]]:
    """Pair boxes of one class, the highest IoU first."""
    candidates = []
    for one, box in enumerate(eager.boxes):
        for other, candidate in enumerate(actual.boxes):
            if eager.labels[one] == actual.labels[other]:
                overlap = _iou(box, candidate)
                if overlap >= SAME_IOU:
                    candidates.append((-overlap, one, other))
    pairs: list[tuple[int, int]] = []
    of_eager: set[int] = set()
    of_actual: set[int] = set()
    for _, one, other in sorted(candidates):
        if one not in of_eager and other not in of_actual:
            pairs.append((one, other))
            of_eager.add(one)
            of_actual.add(other)
    return pairs


def _iou(one: XYXY, other: XYXY) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    areas = (one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1])
    return shared / (areas - shared)
