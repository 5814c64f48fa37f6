"""Pascal VOC annotations: `Annotations/*.xml`, `ImageSets/Main/SPLIT.txt`, `JPEGImages`.

Coordinates are taken as they stand: a box is [xmin, ymin, xmax, ymax] in continuous pixels, its width
xmax - xmin. The VOC devkit counts pixels from 1 and includes the last one, so exact reading would be
[xmin - 1, ymin - 1, xmax, ymax]; but the tools that write VOC files today count from 0, and the detectors'
own training code (torchvision's among it) and the usual converters to COCO take the numbers as they stand.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from qexport.errors import DatasetError
from qexport.samples import BACKGROUND, Box, DroppedBox, Listed

_SUFFIXES = (".jpg", ".jpeg", ".JPG", ".JPEG", ".png", ".PNG", ".bmp", ".webp", ".tif", ".tiff")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def is_voc(root: Path) -> bool:
    """Return whether a folder is laid out as Pascal VOC."""
    return (root / "Annotations").is_dir() and (root / "ImageSets" / "Main").is_dir()


def voc_splits(root: Path) -> tuple[str, ...]:
    """Return the names of a VOC folder's splits, sorted.

    The devkit's lists for one class (`dog_train.txt`, a name and 1, 0 or -1 a line) are no splits.
    """
    lists = sorted((root / "ImageSets" / "Main").glob("*.txt"))
    return tuple(path.stem for path in lists if not _is_class_list(path))


def read_voc(root: Path, split: str, classes: tuple[str, ...]) -> tuple[tuple[str, ...], list[Listed]]:
    """Read one split of a VOC folder.

    Args:
        root: the folder.
        split: one of `voc_splits(root)`.
        classes: class names in label order, background left out. Empty: all names in `Annotations`, sorted,
            so that every split has the same labels.

    Returns:
        Class names in label order, background first; the images in the list's order, `image_id` counted
        from 1.

    Raises:
        DatasetError: an empty list, one that names an image twice, malformed XML, a class name that is not
            among `classes`, an annotation or an image that is absent.
    """
    listing = root / "ImageSets" / "Main" / f"{split}.txt"
    stems = [line.strip() for line in _text(listing).splitlines() if line.strip()]
    if not stems:
        raise DatasetError(f"{listing}: lists no images; expected one image name a line.")
    if len(set(stems)) != len(stems):
        double = next(stem for stem in stems if stems.count(stem) > 1)
        raise DatasetError(f"{listing}: image {double!r} is listed more than once. Remove the double.")
    names = classes or _all_names(root)
    labels = {name: label for label, name in enumerate(names, start=1)}
    listed = [_read_one(root, listing, stem, number, labels) for number, stem in enumerate(stems, start=1)]
    return (BACKGROUND, *names), listed


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read as text: {error}") from error


def _is_class_list(path: Path) -> bool:
    for line in _text(path).splitlines():
        words = line.split()
        if words:
            return len(words) == 2 and words[1] in ("-1", "0", "1")
    return False


def _all_names(root: Path) -> tuple[str, ...]:
    names: set[str] = set()
    for path in sorted((root / "Annotations").glob("*.xml")):
        names.update(_name(path, item) for item in _parse(path).findall("object"))
    if not names:
        raise DatasetError(
            f"{root / 'Annotations'}: no object in any file, so there are no class names; expected XML files "
            "with <object><name>. Give the class names."
        )
    return tuple(sorted(names))


def _parse(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except FileNotFoundError as error:
        raise DatasetError(
            f"{path}: no such annotation file; add it or take the image out of the split"
        ) from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise DatasetError(f"{path}: not valid XML: {error}. Write the file again.") from error


def _name(path: Path, item: ElementTree.Element) -> str:
    name = (item.findtext("name") or "").strip()
    if not name:
        raise DatasetError(f"{path}: an <object> has no <name>; expected the class's name. Add it.")
    return name


def _read_one(root: Path, listing: Path, stem: str, number: int, labels: dict[str, int]) -> Listed:
    source = root / "Annotations" / f"{stem}.xml"
    tree = _parse(source)
    image = _find_image(root, listing, stem, (tree.findtext("filename") or "").strip())
    boxes: list[Box] = []
    dropped: list[DroppedBox] = []
    for item in tree.findall("object"):
        name = _name(source, item)
        if name not in labels:
            raise DatasetError(
                f"{source}: class {name!r} is not among the class names given: {', '.join(labels)}. "
                "Correct the annotation or give all names."
            )
        corners = _corners(source, item)
        if isinstance(corners, str):
            dropped.append(DroppedBox(image.name, (), corners))
            continue
        difficult = (item.findtext("difficult") or "").strip() == "1"
        boxes.append(Box(labels[name], corners, difficult))
    size_px = _size(tree)
    return Listed(image.name, image, source, number, size_px, tuple(boxes), tuple(dropped))


def _corners(path: Path, item: ElementTree.Element) -> tuple[float, float, float, float] | str:
    box = item.find("bndbox")
    texts = [None if box is None else box.findtext(corner) for corner in _CORNERS]
    if any(text is None for text in texts):
        raise DatasetError(
            f"{path}: an <object> has no whole <bndbox>; expected <xmin>, <ymin>, <xmax>, <ymax>. Add them."
        )
    try:
        xmin, ymin, xmax, ymax = (float(text or "") for text in texts)
    except ValueError:
        return f"not numbers: {', '.join(str(text) for text in texts)}"
    return xmin, ymin, xmax, ymax


def _size(tree: ElementTree.Element) -> tuple[int, int] | None:
    # Some tools leave the size out or write zeros; the image's own size is taken then.
    height = (tree.findtext("size/height") or "").strip()
    width = (tree.findtext("size/width") or "").strip()
    if height.isdigit() and width.isdigit() and int(height) and int(width):
        return int(height), int(width)
    return None


def _find_image(root: Path, listing: Path, stem: str, file_name: str) -> Path:
    folder = root / "JPEGImages"
    # The list's name first: <filename> often stems from before the images were renamed.
    for candidate in [f"{stem}{suffix}" for suffix in _SUFFIXES] + ([file_name] if file_name else []):
        if (folder / candidate).is_file():
            return folder / candidate
    raise DatasetError(
        f"{listing}: image {stem!r} is listed and absent from {folder}; expected {stem}.jpg or another of "
        f"{', '.join(_SUFFIXES)}. Put the image there or take it out of the list."
    )
