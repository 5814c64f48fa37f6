"""Small videos, written by the library that reads them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'qexport[video]'")

SIZE_PX = (48, 64)
_CODECS = {".mp4": "mpeg4", ".mkv": "mpeg4", ".avi": "mjpeg", ".mov": "mjpeg"}


def frame_of(number: int, size_px: tuple[int, int] = SIZE_PX) -> NDArray[np.uint8]:
    """Return (H, W, 3) uint8: smooth, of four different corners, another one for each number."""
    rows, columns = np.mgrid[0 : size_px[0], 0 : size_px[1]]
    red = rows * 200 // size_px[0]
    green = columns * 200 // size_px[1]
    blue = np.full_like(red, number * 7 % 200)
    return np.stack([red, green, blue], axis=-1).astype(np.uint8)


def write_video(
    path: Path,
    *,
    count: int,
    codec: str | None = None,
    pixel_format: str | None = None,
    size_px: tuple[int, int] = SIZE_PX,
    rotation: int | None = None,
    frames: list[NDArray[np.uint8]] | None = None,
) -> Path:
    """Write a video of 10 frames a second with its index at the front; return its path."""
    chosen = codec or _CODECS[path.suffix]
    front = {"movflags": "faststart"} if path.suffix in (".mp4", ".mov") else {}
    with av.open(str(path), "w", options=front) as container:
        stream = container.add_stream(
            chosen, rate=Fraction(10), options={"g": "5"} if chosen == "mpeg4" else {}
        )
        stream.height, stream.width = size_px
        stream.pix_fmt = pixel_format or ("yuvj420p" if chosen == "mjpeg" else "yuv420p")
        stream.codec_context.thread_count = 1
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for number in range(count):
            pixels = frames[number] if frames else frame_of(number, size_px)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path
