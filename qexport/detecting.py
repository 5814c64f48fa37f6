"""Use an artifact: image files in, boxes out, drawn or as JSON. Needs no torch."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from qexport.artifact import MANIFEST, load_artifact
from qexport.bundle import ImageFit, is_bundle, open_bundle
from qexport.drawing import draw_boxes
from qexport.errors import ArtifactError, DatasetError, RunFolderError
from qexport.files import json_bytes, whole_file, write_bytes
from qexport.frames import read_frame, read_image
from qexport.runtimes.runner import Runner
from qexport.target import TARGETS, find_target

_IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"))
_DRAWN_SUFFIXES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}
_JPEG_QUALITY = 92


class FoundBox(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One detection."""

    label: str
    label_number: int
    score: float
    xyxy: tuple[float, float, float, float]
    """Pixels of the original image."""


class FoundImage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was found in one image, best first."""

    image: str
    """Its path, as it was given."""
    height_px: int
    width_px: int
    boxes: tuple[FoundBox, ...]


@dataclass(frozen=True, slots=True)
class ImagePath:
    """An image to look at, and the name of its drawing within the output folder."""

    file: Path
    name: Path


def list_images(given: Sequence[Path]) -> list[ImagePath]:
    """Return the images that were given; of a folder, every image in it, sorted by name.

    Raises:
        DatasetError: one is missing, or a folder holds no image.
    """
    images: list[ImagePath] = []
    for path in given:
        if path.is_dir():
            there = sorted(entry for entry in path.rglob("*") if _is_image(entry))
            if not there:
                raise DatasetError(f"{path}: no image in this folder (looked for .jpg, .png and others).")
            images += [ImagePath(entry, entry.relative_to(path)) for entry in there]
        elif path.exists():
            images.append(ImagePath(path, Path(path.name)))
        else:
            raise DatasetError(f"{path}: no such image or folder. Check the path.")
    return images


def plan_drawings(images: Sequence[ImagePath], out: Path) -> dict[ImagePath, Path]:
    """Return where each drawing goes, before anything is written.

    Raises:
        RunFolderError: two drawings would have one name, or one would replace an image that was given.
    """
    if out.exists() and not out.is_dir():
        raise RunFolderError(f"{out} is a file; --out takes a folder. Choose another.")
    planned: dict[ImagePath, Path] = {}
    taken: dict[Path, Path] = {}
    originals = {image.file.resolve() for image in images}
    for image in images:
        suffix = image.name.suffix.lower()
        place = out / (image.name if suffix in _DRAWN_SUFFIXES else image.name.with_suffix(".png"))
        if place.resolve() in originals:
            raise RunFolderError(f"{place} is one of the images; choose another --out than their folder.")
        if place in taken:
            raise RunFolderError(
                f"{image.file} and {taken[place]} would both be drawn to {place}. Give them one at a time."
            )
        taken[place] = image.file
        planned[image] = place
    return planned


def open_runner(artifact: Path, threads: int = 1) -> Runner:
    """Return what runs an artifact, to be used as a context manager.

    Raises:
        ArtifactError: there is no artifact, it was edited, or its target is not known.
        TargetUnavailable: its runtime is not installed.
    """
    if artifact.is_dir() and not (artifact / MANIFEST).is_file():
        inside = sorted(str(found.parent) for found in artifact.glob(f"*/{MANIFEST}"))
        if inside:
            raise ArtifactError(f"{artifact} is the folder of a run; its artifacts: {', '.join(inside)}.")
    target = load_artifact(artifact)[0].target
    if target not in {known.name for known in TARGETS}:
        raise ArtifactError(
            f"{artifact}: made for target {target!r}, which this qexport does not know. Upgrade qexport."
        )
    found = find_target(target)
    found.require("run")
    runner: type[Runner] = importlib.import_module(f"qexport.runtimes.{found.runtime}").RUNNER
    return runner(artifact, threads=threads)


@dataclass(frozen=True, slots=True)
class Opened:
    """What detects: an artifact's runner, and what becomes of an image that has not its frame's size."""

    runner: Runner
    image_fit: ImageFit


@contextmanager
def opened(path: Path, threads: int = 1) -> Iterator[Opened]:
    """Open an artifact's folder, or a bundle: its folder or its archive.

    Raises:
        BundleError: a bundle that was changed or is not whole.
        ArtifactError: there is no artifact, it was edited, or its target is not known.
        TargetUnavailable: its runtime is not installed.
    """
    if not is_bundle(path):
        with open_runner(path, threads) as runner:
            yield Opened(runner, "letterbox")
        return
    with open_bundle(path) as bundle, open_runner(bundle.artifact_folder, threads) as runner:
        yield Opened(runner, bundle.manifest.image_fit)


def detect(
    runner: Runner, image: Path, *, minimum_score: float = 0.5, image_fit: ImageFit = "letterbox"
) -> FoundImage:
    """Detect in one image file.

    Args:
        runner: opened.
        image: turned upright where its EXIF says so.
        minimum_score: boxes below it are left out.
        image_fit: an image of another size than the artifact's frame is scaled into it with its aspect kept, or
            refused.

    Raises:
        DatasetError: the image cannot be read, or is of another size and refused.
    """
    spec, labels = runner.artifact.input, runner.artifact.labels
    frame = read_frame(image, (spec.frame_height_px, spec.frame_width_px))
    if image_fit == "refuse" and frame.original_px != (spec.frame_height_px, spec.frame_width_px):
        height, width = frame.original_px
        raise DatasetError(
            f"{image}: {height}x{width} pixels (height x width); this bundle takes frames of {spec.frame_height_px}x"
            f"{spec.frame_width_px} and no other. Scale the image, or bundle with --other-sizes letterbox."
        )
    found = runner.infer(frame.pixels)
    boxes = frame.to_original(found.boxes)
    return FoundImage(
        image=str(image),
        height_px=frame.original_px[0],
        width_px=frame.original_px[1],
        boxes=tuple(
            FoundBox(labels[label], int(label), float(score), (float(a), float(b), float(c), float(d)))
            for label, score, (a, b, c, d) in zip(found.labels, found.scores, boxes, strict=True)
            if score >= minimum_score
        ),
    )


def save_drawing(found: FoundImage, path: Path) -> Path:
    """Write the image with its boxes; return `path`, whose suffix is .jpg, .jpeg or .png."""
    drawn = draw_boxes(
        read_image(Path(found.image)),
        [box.xyxy for box in found.boxes],
        [box.label_number for box in found.boxes],
        [f"{box.label} {box.score:.2f}" for box in found.boxes],
    )
    with whole_file(path) as partial:
        kind = _DRAWN_SUFFIXES[path.suffix.lower()]
        options = {"quality": _JPEG_QUALITY} if kind == "JPEG" else {}
        drawn.save(partial, kind, **options)
    return path


def write_json_file(found: Sequence[FoundImage], path: Path) -> Path:
    """Write the boxes: one line for each image where the name ends in .jsonl, else one list."""
    if path.suffix == ".jsonl":
        return write_bytes(path, b"".join(msgspec.json.encode(one) + b"\n" for one in found))
    return write_bytes(path, json_bytes(found))


def _is_image(path: Path) -> bool:
    hidden = path.name.startswith(".")
    return not hidden and path.suffix.lower() in _IMAGE_SUFFIXES and path.is_file()
