"""Use an artifact: pictures in, boxes out, drawn or as JSON. Needs no torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from qexport.artifact import MANIFEST, load_artifact
from qexport.bundle import ImageFit, is_bundle, open_bundle
from qexport.drawing import draw_boxes
from qexport.errors import ArtifactError, DatasetError, RunFolderError
from qexport.files import json_bytes, whole_file, write_bytes
from qexport.frames import fit_frame
from qexport.runtimes.runner import Runner
from qexport.sources import DRAWN_SUFFIXES, Picture, Source, images_alone
from qexport.target import TARGETS, find_target

STANDARD_OUTPUT = Path("-")
_JPEG_QUALITY = 92


class FoundBox(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One detection."""

    label: str
    label_number: int
    score: float
    xyxy: tuple[float, float, float, float]
    """Pixels of the original image."""


class FoundImage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """What was found in one image, or one frame of a video or camera, best first."""

    image: str
    """It, or the video or camera, as it was given."""
    frame: int | None = None
    """Number in the video or camera, from 0."""
    time_s: float | None = None
    """Since the first frame."""
    height_px: int
    width_px: int
    boxes: tuple[FoundBox, ...]


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

    @property
    def frame_px(self) -> tuple[int, int]:
        """(height, width) of its frame."""
        spec = self.runner.artifact.input
        return spec.frame_height_px, spec.frame_width_px


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
    runner: Runner, picture: Picture, *, minimum_score: float = 0.5, image_fit: ImageFit = "letterbox"
) -> FoundImage:
    """Detect in one image, or one frame of a video or camera.

    Args:
        runner: opened.
        picture: of any size.
        minimum_score: boxes below it are left out.
        image_fit: an image of another size than the artifact's frame is scaled into it with its aspect kept, or
            refused.

    Raises:
        DatasetError: the picture is of another size and refused, or of another type than uint8 RGB.
    """
    spec, labels = runner.artifact.input, runner.artifact.labels
    frame = fit_frame(picture.pixels, (spec.frame_height_px, spec.frame_width_px))
    if image_fit == "refuse" and frame.original_px != (spec.frame_height_px, spec.frame_width_px):
        height, width = frame.original_px
        raise DatasetError(
            f"{picture}: {height}x{width} pixels (height x width); this bundle takes frames of {spec.frame_height_px}x"
            f"{spec.frame_width_px} and no other. Scale the image, or bundle with --other-sizes letterbox."
        )
    found = runner.infer(frame.pixels)
    boxes = frame.to_original(found.boxes)
    return FoundImage(
        image=picture.source,
        frame=picture.frame,
        time_s=picture.time_s,
        height_px=frame.original_px[0],
        width_px=frame.original_px[1],
        boxes=tuple(
            FoundBox(labels[label], int(label), float(score), (float(a), float(b), float(c), float(d)))
            for label, score, (a, b, c, d) in zip(found.labels, found.scores, boxes, strict=True)
            if score >= minimum_score
        ),
    )


def save_drawing(found: FoundImage, picture: Picture) -> None:
    """Write the picture with its boxes where it is to be drawn; nothing if it is not."""
    if picture.drawing is None:
        return
    drawn = draw_boxes(
        picture.pixels,
        [box.xyxy for box in found.boxes],
        [box.label_number for box in found.boxes],
        [f"{box.label} {box.score:.2f}" for box in found.boxes],
    )
    with whole_file(picture.drawing) as partial:
        kind = DRAWN_SUFFIXES[picture.drawing.suffix.lower()]
        options = {"quality": _JPEG_QUALITY} if kind == "JPEG" else {}
        drawn.save(partial, kind, **options)


def require_json_name(path: Path, sources: Sequence[Source]) -> None:
    """Refuse one list for what may have no end: lines are written as they come, a list when all is there.

    Raises:
        RunFolderError: says what name would do.
    """
    if path != STANDARD_OUTPUT and path.suffix != ".jsonl" and not images_alone(sources):
        raise RunFolderError(
            f"{path}: of a video or a camera, boxes are written line by line. Give a name that ends in .jsonl, or -."
        )


@contextmanager
def json_written(path: Path | None) -> Iterator[Callable[[FoundImage], None]]:
    """Yield what takes the boxes of one picture after the other.

    Args:
        path: `-`, standard output, and a name that ends in `.jsonl` get a line at once for each; another name one
            list, at the end and only if there was no error; None is nowhere.

    Raises:
        RunFolderError: the file cannot be written.
    """
    if path is None:
        yield lambda found: None
    elif path == STANDARD_OUTPUT:
        yield lambda found: print(msgspec.json.encode(found).decode(), flush=True)
    elif path.suffix == ".jsonl":
        with _lines_file(path) as stream:
            yield lambda found: _write_line(stream, found)
    else:
        kept: list[FoundImage] = []
        yield kept.append
        write_bytes(path, json_bytes(kept))


def _lines_file(path: Path) -> BinaryIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("wb")
    except OSError as error:
        raise RunFolderError(
            f"{path}: cannot be written: {error.strerror}. Choose another --json."
        ) from error


def _write_line(stream: BinaryIO, found: FoundImage) -> None:
    stream.write(msgspec.json.encode(found) + b"\n")
    stream.flush()  # there, whatever becomes of the next picture
