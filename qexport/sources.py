"""What `detect` looks at: image files, folders of them, a video, a camera. One picture after another, none kept."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qexport.capture import Camera, Video, find_capture, read_camera, read_video
from qexport.errors import DatasetError, RunFolderError
from qexport.frames import read_image

DRAWN_SUFFIXES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}
_IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"))


@dataclass(frozen=True, slots=True)
class ImagePath:
    """An image to look at, and the name of its drawing within the output folder."""

    file: Path
    name: Path


Source = ImagePath | Video | Camera


@dataclass(frozen=True, slots=True)
class Limits:
    """Where to stop in a video or camera; None: at its end, which a camera has not.

    frames: so many are looked at.
    seconds: those that were taken so long after the first one, and later, are left out.
    """

    frames: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """One image, or one frame of a video or camera.

    source: as it was given.
    pixels: (H, W, 3) uint8, RGB.
    drawing: where it is drawn, if it is.
    frame: number from 0; None of an image file.
    time_s: since the first frame; None of an image file.
    """

    source: str
    pixels: NDArray[np.uint8]
    drawing: Path | None = None
    frame: int | None = None
    time_s: float | None = None

    def __str__(self) -> str:
        """Return its name for people."""
        return self.source if self.frame is None else f"{self.source}, frame {self.frame}"


def list_sources(given: Sequence[Path]) -> list[Source]:
    """Return what was given; of a folder, every image in it, sorted by name.

    Raises:
        DatasetError: one is missing, a folder holds no image, or something stands beside a camera.
    """
    sources: list[Source] = []
    for path in given:
        capture = find_capture(path)
        if isinstance(capture, Camera):
            if len(given) > 1:
                raise DatasetError(
                    f"{path}: a camera has no end, so nothing else can be given. Give it alone."
                )
            sources.append(capture)
        elif path.is_dir():
            there = sorted(entry for entry in path.rglob("*") if _is_image(entry))
            if not there:
                raise DatasetError(
                    f"{path}: no image in this folder (looked for .jpg, .png and others). Give a video by its name."
                )
            sources += [ImagePath(entry, entry.relative_to(path)) for entry in there]
        elif path.exists():
            sources.append(capture or ImagePath(path, Path(path.name)))
        else:
            raise DatasetError(
                f"{path}: no such image, folder or video. Check the path; a camera is camera:0 or /dev/video0."
            )
    return sources


def images_alone(sources: Sequence[Source]) -> bool:
    """Say whether there is no video and no camera among the sources."""
    return all(isinstance(source, ImagePath) for source in sources)


def require_frames(sources: Sequence[Source], option: str) -> None:
    """Refuse an option about frames where images alone were given.

    Raises:
        DatasetError: names the option.
    """
    if images_alone(sources):
        raise DatasetError(f"{option} is about a video or a camera; here are images alone. Leave it out.")


def plan_drawings(sources: Sequence[Source], out: Path) -> dict[Source, Path]:
    """Return where each drawing goes, before anything is written; of a video or camera, the folder of its frames.

    Raises:
        RunFolderError: two drawings would have one name, or one would replace something that was given.
    """
    if out.exists() and not out.is_dir():
        raise RunFolderError(f"{out} is a file; --out takes a folder. Choose another.")
    planned: dict[Source, Path] = {}
    taken: dict[Path, Source] = {}
    originals = {_file(source).resolve() for source in sources}
    for source in sources:
        place = out / _drawing_name(source)
        if place.resolve() in originals:
            raise RunFolderError(f"{place} is one of the images; choose another --out than their folder.")
        if not isinstance(source, ImagePath) and place.exists() and not place.is_dir():
            raise RunFolderError(
                f"{place} is a file, and the frames of {_file(source)} go there. Choose another."
            )
        if place in taken:
            raise RunFolderError(
                f"{_file(source)} and {_file(taken[place])} would both be drawn to {place}. Give them one at a time."
            )
        taken[place] = source
        planned[source] = place
    return planned


def pictures(
    sources: Sequence[Source],
    frame_px: tuple[int, int],
    *,
    drawings: Mapping[Source, Path],
    every: int = 1,
    limits: Limits | None = None,
) -> Generator[Picture, None, None]:
    """Yield what the sources hold, one picture at a time; close it to let go of a camera.

    Args:
        sources: images, videos, or a camera.
        frame_px: (height, width) that a camera is asked for.
        drawings: where an image is drawn; of a video or camera, the folder of its frames.
        every: every so-manieth frame gets a place to be drawn, the first one included.
        limits: of each video or camera.

    Raises:
        DatasetError: an image or a video that cannot be read.
        TargetUnavailable: PyAV is missing, or the camera is, or it is gone.
    """
    for source in sources:
        drawing = drawings.get(source)
        if isinstance(source, ImagePath):
            yield Picture(str(source.file), read_image(source.file), drawing)
        else:
            yield from _captured(source, frame_px, drawing, every, limits or Limits())


def _captured(
    source: Video | Camera, frame_px: tuple[int, int], folder: Path | None, every: int, limits: Limits
) -> Generator[Picture, None, None]:
    given = source.name if isinstance(source, Camera) else str(source.file)
    frames = read_camera(source, frame_px) if isinstance(source, Camera) else read_video(source)
    with closing(frames):
        for index, frame in enumerate(islice(frames, limits.frames)):
            if limits.seconds is not None and frame.time_s >= limits.seconds:
                return
            place = None if folder is None or index % every else folder / f"{frame.number:06d}.jpg"
            yield Picture(given, frame.pixels, place, frame.number, frame.time_s)


def _file(source: Source) -> Path:
    return Path(source.device) if isinstance(source, Camera) else source.file


def _drawing_name(source: Source) -> Path:
    if not isinstance(source, ImagePath):
        return Path(_file(source).stem)
    return source.name if source.name.suffix.lower() in DRAWN_SUFFIXES else source.name.with_suffix(".png")


def _is_image(path: Path) -> bool:
    hidden = path.name.startswith(".")
    return not hidden and path.suffix.lower() in _IMAGE_SUFFIXES and path.is_file()
