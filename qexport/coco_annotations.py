"""COCO JSON annotations, in the places where COCO, Roboflow and hand-made datasets keep them."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import msgspec

from qexport.errors import DatasetError
from qexport.samples import BACKGROUND, GAP, Box, DroppedBox, Listed

_SUFFIX = ".coco.json"
_ROBOFLOW = "_annotations.coco.json"
_INSTANCES = "instances_"
# Files of the COCO download that hold no boxes to detect.
_OTHER_TASKS = ("captions_", "person_keypoints_", "stuff_", "panoptic_", "image_info_")


class _Image(msgspec.Struct, frozen=True):
    id: int
    file_name: str
    width: int | None = None
    height: int | None = None


class _Category(msgspec.Struct, frozen=True):
    id: int
    name: str


class _Annotation(msgspec.Struct, frozen=True):
    image_id: int
    category_id: int
    bbox: tuple[float, ...] = ()
    area: float | None = None
    iscrowd: int | bool = 0
    difficult: int | bool = 0


class _Coco(msgspec.Struct, frozen=True):
    images: tuple[_Image, ...]
    annotations: tuple[_Annotation, ...]
    categories: tuple[_Category, ...]


def coco_files(root: Path) -> dict[str, Path]:
    """Return the annotation file of every split under a folder, by the split's name, sorted.

    Where a split has several, the first of these counts: `SPLIT.coco.json`,
    `annotations/instances_SPLIT.json`, `annotations/SPLIT.json`, `SPLIT/_annotations.coco.json`. A folder
    that itself holds `_annotations.coco.json` is one split, named after the folder.
    """
    files: dict[str, Path] = {}
    for path in sorted(root.glob("*" + _SUFFIX)):
        name = root.resolve().name if path.name == _ROBOFLOW else path.name.removesuffix(_SUFFIX)
        files.setdefault(name, path)
    annotations = sorted((root / "annotations").glob("*.json"))
    # Whole-name files come second, so that `instances_val` wins over a `val` beside it.
    for path in sorted(annotations, key=lambda path: not path.name.startswith(_INSTANCES)):
        if not path.name.startswith(_OTHER_TASKS):
            files.setdefault(split_of_file(path), path)
    for path in sorted(root.glob("*/" + _ROBOFLOW)):
        files.setdefault(path.parent.name, path)
    return dict(sorted(files.items()))


def split_of_file(path: Path) -> str:
    """Return the name of the split that an annotation file holds, from the file's name."""
    if path.name == _ROBOFLOW:
        return path.resolve().parent.name
    if path.name.endswith(_SUFFIX):
        return path.name.removesuffix(_SUFFIX)
    return path.stem.removeprefix(_INSTANCES)


def read_coco(path: Path, split: str, classes: tuple[str, ...]) -> tuple[tuple[str, ...], list[Listed]]:
    """Read one COCO annotation file.

    A label is the category's id, as torchvision's COCO detectors have it; an id without a category is named
    `N/A`. Category 0 is allowed where no box uses it: Roboflow writes one as a heading.

    Args:
        path: the JSON file.
        split: the split's name, one of the folders in which images are looked for.
        classes: names that the user gave, in label order, background left out; empty: not checked.

    Returns:
        Class names in label order, background first; the images in the file's order.

    Raises:
        DatasetError: malformed JSON, ids that are double, absent or below 1, names that do not agree with
            `classes`, or an image file that is absent.
    """
    content = _decode(path)
    _check_images(path, content.images)
    names = _class_names(path, content)
    _check_classes(path, names, classes)
    by_image = _annotations_by_image(path, content)
    finder = _ImageFinder(path, split)
    return names, [_listed(path, image, by_image[image.id], finder) for image in content.images]


def _decode(path: Path) -> _Coco:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        return _convert(data)
    except msgspec.ValidationError as error:
        raise DatasetError(
            f"{path}: not a COCO detection file: {error}. Expected an object with `images` (id, file_name), "
            "`annotations` (image_id, category_id, bbox) and `categories` (id, name)."
        ) from error
    except (msgspec.DecodeError, ValueError) as error:
        raise DatasetError(f"{path}: not valid JSON: {error}. Write the file again.") from error


def _convert(data: bytes) -> _Coco:
    try:
        return msgspec.json.decode(data, type=_Coco)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        # Python writes NaN and Infinity, which JSON does not have; such boxes are dropped one by one later.
        return msgspec.convert(json.loads(data), type=_Coco)


def _check_images(path: Path, images: tuple[_Image, ...]) -> None:
    if not images:
        raise DatasetError(f"{path}: lists no images; expected at least one under `images`.")
    by_field: dict[str, list[int] | list[str]] = {
        "id": [i.id for i in images],
        "file_name": [i.file_name for i in images],
    }
    for what, values in by_field.items():
        doubles = _doubles(values)
        if doubles:
            raise DatasetError(
                f"{path}: {len(doubles)} image {what}(s) occur more than once, first {doubles[0]!r}; "
                f"expected each image once. Make the {what}s unique."
            )


def _class_names(path: Path, content: _Coco) -> tuple[str, ...]:
    used = {annotation.category_id for annotation in content.annotations}
    categories = [c for c in content.categories if c.id != 0 or 0 in used]
    below = [c for c in categories if c.id < 1]
    if below:
        raise DatasetError(
            f"{path}: category {below[0].name!r} has id {below[0].id}; expected ids of 1 and above, because "
            "label 0 is a detector's background. Renumber the categories from 1."
        )
    by_field: dict[str, list[int] | list[str]] = {
        "id": [c.id for c in categories],
        "name": [c.name for c in categories],
    }
    for what, values in by_field.items():
        doubles = _doubles(values)
        if doubles:
            raise DatasetError(
                f"{path}: category {what} {doubles[0]!r} occurs more than once; expected each once. "
                "Remove or rename the double."
            )
    if not categories:
        raise DatasetError(f"{path}: no categories; expected id and name of every class under `categories`.")
    by_id = {category.id: category.name for category in categories}
    return (BACKGROUND, *(by_id.get(label, GAP) for label in range(1, max(by_id) + 1)))


def _check_classes(path: Path, names: tuple[str, ...], classes: tuple[str, ...]) -> None:
    own = names[1:]
    dense = tuple(name for name in own if name != GAP)
    if not classes or classes in (own, dense):
        return
    if set(classes) == set(dense):
        problem = f"the order by category id is {', '.join(dense)}"
    else:
        problem = f"its categories are {', '.join(dense)}"
    raise DatasetError(
        f"{path}: {problem}; the class names given are {', '.join(classes)}. A COCO file fixes names and "
        "labels itself: leave the class names out, or renumber the categories."
    )


def _annotations_by_image(path: Path, content: _Coco) -> defaultdict[int, list[_Annotation]]:
    images = {image.id for image in content.images}
    categories = {category.id for category in content.categories}
    by_image: defaultdict[int, list[_Annotation]] = defaultdict(list)
    for annotation in content.annotations:
        if annotation.category_id not in categories:
            raise DatasetError(
                f"{path}: an annotation of image {annotation.image_id} has category_id "
                f"{annotation.category_id}; expected one of {sorted(categories)}. Correct the annotation or "
                "add the category."
            )
        if annotation.image_id not in images:
            raise DatasetError(
                f"{path}: an annotation has image_id {annotation.image_id}, which no image has. "
                "Remove the annotation or add the image."
            )
        by_image[annotation.image_id].append(annotation)
    return by_image


def _listed(path: Path, image: _Image, annotations: list[_Annotation], finder: _ImageFinder) -> Listed:
    boxes: list[Box] = []
    dropped: list[DroppedBox] = []
    for annotation in annotations:
        if len(annotation.bbox) != 4:
            reason = f"bbox has {len(annotation.bbox)} numbers, expected 4"
            dropped.append(DroppedBox(image.file_name, annotation.bbox, reason))
            continue
        left, top, width, height = annotation.bbox
        xyxy = (left, top, left + width, top + height)
        flags = bool(annotation.difficult), bool(annotation.iscrowd)
        boxes.append(Box(annotation.category_id, xyxy, *flags, annotation.area))
    size_px = (image.height, image.width) if image.height and image.width else None
    found = finder.find(image.file_name)
    return Listed(image.file_name, found, path, image.id, size_px, tuple(boxes), tuple(dropped))


class _ImageFinder:
    """Looks for images in the folders where datasets keep them, the last successful one first."""

    def __init__(self, path: Path, split: str) -> None:
        self._json = path
        folder = path.parent
        roots = [folder, folder.parent] if folder.name == "annotations" else [folder]
        inner = ("", "JPEGImages", "images", split, f"images/{split}")
        self._folders = [root / name for root in roots for name in inner]

    def find(self, file_name: str) -> Path:
        for folder in self._folders:
            path = folder / file_name
            if path.is_file():
                self._folders.remove(folder)
                self._folders.insert(0, folder)
                return path
        searched = ", ".join(sorted(str(folder) for folder in self._folders))
        raise DatasetError(
            f"{self._json}: image {file_name!r} is listed and absent. Looked in {searched}. "
            "Put the image there or correct its file_name."
        )


def _doubles(values: Sequence[int | str]) -> list[int | str]:
    return [value for value, times in Counter(values).items() if times > 1]
