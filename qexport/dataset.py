"""Read one split of a dataset: COCO JSON, Pascal VOC, or a plain folder of images.

The layout is recognised, not declared. Where a folder holds both COCO and VOC annotations, they are taken for
two copies of the same data and the COCO files are read. No pixels are kept: images are opened one at a time,
here for their size and digest, and in `frames` when they are used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from qexport.coco_annotations import coco_files, read_coco, split_of_file
from qexport.errors import DatasetError
from qexport.frames import image_sizes, is_turned
from qexport.samples import (
    BACKGROUND,
    Box,
    Dataset,
    DroppedBox,
    Format,
    Listed,
    Sample,
    clip_box,
)
from qexport.voc_annotations import is_voc, read_voc, voc_splits

__all__ = [
    "Box",
    "Dataset",
    "DroppedBox",
    "Sample",
    "check_classes",
    "load_dataset",
    "require_boxes",
    "splits_of",
]

_IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"))


def splits_of(root: Path) -> tuple[str, ...]:
    """Return the names of a dataset's splits, sorted; empty for a plain folder of images.

    Raises:
        DatasetError: the folder is missing or holds nothing that can be read.
    """
    kind = _recognise(root)
    if kind == "coco":
        return (split_of_file(root),) if root.is_file() else tuple(coco_files(root))
    return voc_splits(root) if kind == "voc" else ()


def load_dataset(root: Path, split: str | None, *, classes: tuple[str, ...] = ()) -> Dataset:
    """Read one split.

    Boxes that are not finite, inverted, of zero size or wholly outside the image are dropped and listed in
    `dropped`; boxes partly outside are clipped.

    Args:
        root: a dataset folder, or one COCO .json file.
        split: the split's name. None: the only one. A single .json file and a plain folder of images are one
            split and take no notice of it; `Dataset.split` says what was read.
        classes: class names in label order; a leading `__background__` may be given or left out. They number
            the labels of VOC annotations, and must agree with those of a COCO file.

    Raises:
        DatasetError: anything missing, malformed or contradictory; the text names the file, what was found,
            what was expected and how to put it right.
    """
    root = root.resolve()
    kind = _recognise(root)
    given = _without_background(classes)
    if kind == "folder":
        names: tuple[str, ...] = (BACKGROUND, *given)
        listed, split = _list_folder(root), root.name
    elif kind == "coco":
        file, split = _coco_file(root, split)
        names, listed = read_coco(file, split, given)
    else:
        split = _choose(root, split, voc_splits(root))
        names, listed = read_voc(root, split, given)
    return _assemble(_folder(root), split, kind, names, listed)


def require_boxes(dataset: Dataset) -> None:
    """Check that accuracy can be measured on a dataset.

    Raises:
        DatasetError: no box that counts.
    """
    if any(not box.ignored for sample in dataset.samples for box in sample.boxes):
        return
    if dataset.format == "folder":
        problem = "is a plain folder of images without annotations"
    else:
        problem = f"has no usable box in its {len(dataset.samples)} images ({len(dataset.dropped)} dropped)"
    raise DatasetError(
        f"{dataset.root}: split {dataset.split!r} {problem}; accuracy needs annotated boxes. Expected COCO "
        "JSON (SPLIT.coco.json, annotations/instances_SPLIT.json, SPLIT/_annotations.coco.json) or Pascal "
        "VOC (Annotations, ImageSets/Main, JPEGImages)."
    )


def check_classes(dataset: Dataset, num_classes: int, detector: str) -> None:
    """Check that a dataset's labels are the detector's.

    A plain folder for which no names were given has no labels to check.

    Args:
        dataset: the dataset.
        num_classes: the detector's classes, background included.
        detector: its name, for the message.

    Raises:
        DatasetError: the largest label is not `num_classes - 1`.
    """
    if dataset.format == "folder" and len(dataset.classes) == 1:
        return
    if len(dataset.classes) == num_classes:
        return
    own = ", ".join(f"{label} {name}" for label, name in enumerate(dataset.classes))
    raise DatasetError(
        f"{dataset.root}: the dataset's labels are {own} ({len(dataset.classes)} with the background); the "
        f"detector {detector} has labels 0 to {num_classes - 1} ({num_classes} with the background). Use the "
        "dataset that the detector was trained on, or give the detector's class names in label order."
    )


def check_names(dataset: Dataset, labels: tuple[str, ...], detector: str) -> None:
    """Check that the classes of a dataset have the names that the detector gives them, letter case aside.

    Args:
        dataset: the dataset, its number of classes checked.
        labels: the detector's class names, background first; `N/A` matches anything.
        detector: its name, for the message.

    Raises:
        DatasetError: a label has another name there: detector and dataset do not belong together.
    """
    for label, (theirs, own) in enumerate(zip(dataset.classes, labels, strict=False)):
        if label and "N/A" not in (theirs, own) and theirs.casefold() != own.casefold():
            raise DatasetError(
                f"{dataset.root}: label {label} is {theirs!r} in the dataset and {own!r} in the detector "
                f"{detector}. Use the dataset that the detector was trained on; where only the names differ, "
                f"confirm them with --classes {','.join(dataset.classes[1:])}."
            )


def _recognise(root: Path) -> Format:
    if root.is_file():
        if root.suffix == ".json":
            return "coco"
        raise DatasetError(
            f"{root}: a file that is not .json; expected a dataset folder or a COCO .json file."
        )
    if not root.is_dir():
        raise DatasetError(f"{root}: no such folder or file; expected a dataset. Check the path.")
    if coco_files(root):
        return "coco"
    if is_voc(root):
        return "voc"
    if next(_images(root), None) is not None:
        return "folder"
    raise DatasetError(
        f"{root}: no images and no annotations; expected COCO JSON, Pascal VOC (Annotations, ImageSets/Main, "
        f"JPEGImages), or images ({', '.join(sorted(_IMAGE_SUFFIXES))}). Check the path."
    )


def _folder(root: Path) -> Path:
    if root.is_dir():
        return root
    return root.parent.parent if root.parent.name == "annotations" else root.parent


def _coco_file(root: Path, split: str | None) -> tuple[Path, str]:
    if root.is_file():
        return root, split_of_file(root)
    files = coco_files(root)
    split = _choose(root, split, tuple(files))
    return files[split], split


def _choose(root: Path, split: str | None, there: tuple[str, ...]) -> str:
    if split is None and len(there) == 1:
        return there[0]
    if split is None:
        raise DatasetError(
            f"{root}: has {len(there)} splits and none was named. Name one of: {', '.join(there)}."
        )
    if split not in there:
        raise DatasetError(f"{root}: no split {split!r}; the splits there are: {', '.join(there) or 'none'}.")
    return split


def _without_background(classes: tuple[str, ...]) -> tuple[str, ...]:
    given = classes[1:] if classes[:1] == (BACKGROUND,) else classes
    # `N/A` marks a label without a category and may stand more than once, as in torchvision's COCO list.
    real = [name for name in given if name != "N/A"]
    if len(set(real)) != len(real):
        double = next(name for name in real if real.count(name) > 1)
        raise DatasetError(f"class names: {double!r} is given more than once; expected one name per label.")
    return given


def _images(root: Path) -> Iterator[Path]:
    for path in root.rglob("*"):
        hidden = any(part.startswith((".", "__MACOSX")) for part in path.relative_to(root).parts)
        if path.suffix.lower() in _IMAGE_SUFFIXES and not hidden and path.is_file():
            yield path


def _list_folder(root: Path) -> list[Listed]:
    names = sorted((path.relative_to(root).as_posix(), path) for path in _images(root))
    return [Listed(name, path, path, number, None) for number, (name, path) in enumerate(names, start=1)]


def _assemble(
    root: Path, split: str, kind: Format, classes: tuple[str, ...], listed: list[Listed]
) -> Dataset:
    digest = hashlib.sha256(msgspec.json.encode(classes))
    samples: list[Sample] = []
    dropped: list[DroppedBox] = []
    for item in listed:
        sample, lost, image_sha256 = _check(item)
        samples.append(sample)
        dropped += lost
        size = (sample.height_px, sample.width_px)
        digest.update(
            msgspec.json.encode((item.name, sample.image_id, size, image_sha256, sample.boxes, lost))
        )
    return Dataset(
        name=root.name,
        root=root,
        split=split,
        format=kind,
        classes=classes,
        samples=tuple(samples),
        dropped=tuple(dropped),
        sha256=digest.hexdigest(),
    )


def _check(item: Listed) -> tuple[Sample, list[DroppedBox], str]:
    """Return the sample, the boxes dropped from it, and the digest of the image's bytes."""
    try:
        data = item.path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{item.path}: cannot be read: {error.strerror or error}") from error
    upright, raw = image_sizes(data, item.path)
    turned = is_turned(item.path, item.size_px, upright_px=upright, raw_px=raw)
    size = upright if turned else raw
    boxes: list[Box] = []
    dropped = list(item.dropped)
    for box in item.boxes:
        clipped = clip_box(box.xyxy, size)
        if isinstance(clipped, str):
            dropped.append(DroppedBox(item.name, box.xyxy, clipped))
        else:
            boxes.append(Box(box.label, clipped, box.difficult, box.crowd, box.area_px))
    return (
        Sample(item.path, item.image_id, size[1], size[0], tuple(boxes)),
        dropped,
        hashlib.sha256(data).hexdigest(),
    )
