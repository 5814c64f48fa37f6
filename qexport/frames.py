"""From image files to camera frames: (H, W, 3) uint8 RGB of one size, and boxes back to the image.

**Which way up.** A camera may store its image sideways with an EXIF tag that says how to turn it. Annotation
tools differ in whether they show the turned image or the raw one, so the size that the annotations state
decides: if it is the size of the turned image, or none is stated, the image is turned; if it is the size of
the raw image and not that of the turned one, the boxes refer to the raw raster and the image is left
as it is. A half turn and a square image cannot be told apart by size and are turned, as every viewer does.
"""

from __future__ import annotations

import io
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qexport.errors import DatasetError
from qexport.samples import Dataset, Sample

# EXIF 2.32, tag 0x0112: how to turn the stored raster so that it stands upright.
_ORIENTATION_TAG = 0x0112
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)

# What Pillow raises on a damaged file. UnidentifiedImageError is an OSError; PNG raises SyntaxError.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """A camera frame made of one image.

    pixels: (H, W, 3) uint8, RGB. The image lies at the top left; the rest is zero.
    scale: size in the frame over size in the image.
    original_px: (height, width) of the image.
    """

    pixels: NDArray[np.uint8]
    scale: float
    original_px: tuple[int, int]

    @property
    def content_px(self) -> tuple[int, int]:
        """Height and width that the image takes up in the frame."""
        return _content_px(self.original_px, self.scale)

    def to_original(self, boxes: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return boxes in pixels of the original image, clipped to it.

        Args:
            boxes: (N, 4), xyxy, pixels of the frame.

        Returns:
            (N, 4) float32, xyxy.
        """
        height, width = self.original_px
        content_height, content_width = self.content_px
        # Sizes are whole pixels, so the two axes may be scaled a little differently.
        back = np.array([width / content_width, height / content_height] * 2)
        limit = np.array([width, height] * 2)
        scaled = np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * back
        clipped: NDArray[np.float64] = np.clip(scaled, 0.0, limit)
        return clipped.astype(np.float32)


def read_image(path: Path, *, size_px: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Read an image file as 8-bit RGB.

    Grey, palette, CMYK and transparent images become RGB (transparency is dropped, not blended); 16-bit grey
    values are divided by 256.

    Args:
        path: the file.
        size_px: (height, width) of the raster that the annotations refer to; see the top of this file.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        DatasetError: the file is missing, truncated, no image, of a pixel type without a known range, or of
            another size than `size_px` whichever way it is turned.
    """
    try:
        with Image.open(path) as image:
            image.load()
            orientation = _orientation(image)
            upright, raw = _sizes(image, orientation)
            rgb = _to_rgb(image, path)
    except _UNREADABLE as error:
        raise DatasetError(_unreadable(path, error)) from error
    turned = is_turned(path, size_px, upright_px=upright, raw_px=raw)
    if turned and orientation in _TURN:
        rgb = rgb.transpose(_TURN[orientation])
    return np.array(rgb, dtype=np.uint8)


def read_frame(path: Path, frame_px: tuple[int, int], *, size_px: tuple[int, int] | None = None) -> Frame:
    """Read an image file as a camera frame.

    An image of the frame's size is passed on bit for bit; another is resized (bilinear, Pillow, which smooths
    when it shrinks) to fit with its aspect kept, and padded with zeros at the right and the bottom.

    Args:
        path: the file.
        frame_px: (height, width) of the frame.
        size_px: as in `read_image`.

    Raises:
        DatasetError: as `read_image`, or the frame is smaller than one pixel.
    """
    _require_size(frame_px)
    return fit_frame(read_image(path, size_px=size_px), frame_px)


def fit_frame(pixels: NDArray[np.uint8], frame_px: tuple[int, int]) -> Frame:
    """Make an image a camera frame, as `read_frame` does.

    Args:
        pixels: (H, W, 3) uint8, RGB.
        frame_px: (height, width) of the frame.

    Raises:
        DatasetError: the image has another type or shape, or the frame is smaller than one pixel.
    """
    _require_size(frame_px)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise DatasetError(
            f"an image of shape {pixels.shape} and type {pixels.dtype}; expected (height, width, 3) and uint8, RGB."
        )
    height, width = pixels.shape[:2]
    if (height, width) == tuple(frame_px):
        return Frame(pixels, 1.0, (height, width))
    scale = min(frame_px[0] / height, frame_px[1] / width)
    content_height, content_width = _content_px((height, width), scale)
    resized = Image.fromarray(pixels).resize((content_width, content_height), Image.Resampling.BILINEAR)
    frame = np.zeros((*frame_px, 3), dtype=np.uint8)
    frame[:content_height, :content_width] = np.asarray(resized)
    return Frame(frame, scale, (height, width))


def _require_size(frame_px: tuple[int, int]) -> None:
    if min(frame_px) < 1:
        raise DatasetError(
            f"frame of {frame_px[0]}x{frame_px[1]} pixels: give a height and a width of at least 1"
        )


def read_sample(sample: Sample, frame_px: tuple[int, int]) -> Frame:
    """Read a sample's image as a camera frame, turned the way its boxes need it. Raises as `read_frame`."""
    return read_frame(sample.path, frame_px, size_px=(sample.height_px, sample.width_px))


def frame_size(dataset: Dataset) -> tuple[int, int]:
    """Return the commonest (height, width) of a dataset's images; of several, the one with the most pixels.

    Raises:
        DatasetError: the dataset has no images.
    """
    sizes = Counter((sample.height_px, sample.width_px) for sample in dataset.samples)
    if not sizes:
        raise DatasetError(f"{dataset.root}: split {dataset.split!r} has no images, so it has no frame size")
    return max(sizes, key=lambda size: (sizes[size], size[0] * size[1], size))


def image_sizes(data: bytes, path: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return an image's (height, width) turned upright and as stored, from its header alone.

    Args:
        data: the file's bytes.
        path: the file, for messages.

    Raises:
        DatasetError: no image that Pillow knows.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _sizes(image, _orientation(image))
    except _UNREADABLE as error:
        raise DatasetError(_unreadable(path, error)) from error


def is_turned(
    path: Path, size_px: tuple[int, int] | None, *, upright_px: tuple[int, int], raw_px: tuple[int, int]
) -> bool:
    """Return whether an image is turned upright for boxes on a raster of `size_px`; see the top of this file.

    Raises:
        DatasetError: the annotations' size is neither of the image's two.
    """
    if size_px is None or size_px == upright_px:
        return True
    if size_px == raw_px:
        return False
    raise DatasetError(
        f"{path}: the image is {upright_px[1]}x{upright_px[0]} pixels, the annotations say "
        f"{size_px[1]}x{size_px[0]}: boxes cannot be placed. Correct the size in the annotations, "
        "or put back the image that was annotated."
    )


def _content_px(original_px: tuple[int, int], scale: float) -> tuple[int, int]:
    height, width = original_px
    return max(1, round(height * scale)), max(1, round(width * scale))


def _orientation(image: Image.Image) -> int:
    # TIFF: Pillow turns the image itself. PNG: asking for EXIF would decode all pixels, so it is asked only
    # where the header holds some.
    if image.format == "TIFF":
        return 1
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        return 1
    return int(image.getexif().get(_ORIENTATION_TAG, 1))


def _sizes(image: Image.Image, orientation: int) -> tuple[tuple[int, int], tuple[int, int]]:
    raw = (image.height, image.width)
    return (raw[1], raw[0]) if orientation in _SIDEWAYS else raw, raw


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode == "RGB":
        return image.copy()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # Pillow's own conversion saturates at 255. Older versions open 16-bit PNG as 32-bit `I`.
        grey = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise DatasetError(
            f"{path}: pixels are 32-bit numbers (mode {image.mode}) without a known range; "
            "expected 8 or 16 bits a channel. Convert the image to 8 bits."
        )
    if image.mode in ("P", "PA"):
        return image.convert("RGBA").convert("RGB")  # a palette with transparency warns on the direct way
    return image.convert("RGB")


def _unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path}: no such image file"
    return f"{path}: not a readable image: {error}. Replace the file or take it out of the split."
