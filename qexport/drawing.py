"""Boxes with label and score on an image, by Pillow alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

# As in the report: classes have the colours of its pictures.
_COLOURS = ("#ffd23f", "#3ddbd9", "#ff5fa2", "#8ce99a", "#b197fc", "#ff922b")
_TEXT = "#000000"
_SMALLEST_TEXT_PX = 11


def draw_boxes(
    pixels: NDArray[np.uint8],
    boxes: Sequence[tuple[float, float, float, float]],
    labels: Sequence[int],
    captions: Sequence[str],
) -> Image.Image:
    """Return the image with a frame and a caption for each box.

    Args:
        pixels: (H, W, 3) uint8, RGB; not changed.
        boxes: xyxy, pixels of the image.
        labels: 1 and above; decide the colours.
        captions: what is written at each box.
    """
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    line_px = max(1, round(min(image.size) / 250))
    font = ImageFont.load_default(max(_SMALLEST_TEXT_PX, round(min(image.size) / 45)))
    # The first is the best: it is drawn last, over the others.
    for box, label, caption in reversed(list(zip(boxes, labels, captions, strict=True))):
        colour = _COLOURS[(label - 1) % len(_COLOURS)]
        draw.rectangle(_inside(box, image.size), outline=colour, width=line_px)
        _caption(draw, box, caption, font, colour, image.size)
    return image


def _inside(
    box: tuple[float, float, float, float], size_px: tuple[int, int]
) -> tuple[float, float, float, float]:
    """Return the box as Pillow takes it: within the image, corners in order."""
    left, top = (min(max(value, 0.0), limit - 1.0) for value, limit in zip(box[:2], size_px, strict=True))
    right, bottom = (min(max(value, 0.0), limit - 1.0) for value, limit in zip(box[2:], size_px, strict=True))
    return left, top, max(left, right), max(top, bottom)


def _caption(
    draw: ImageDraw.ImageDraw,
    box: tuple[float, float, float, float],
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    colour: str,
    size_px: tuple[int, int],
) -> None:
    """Write above the box; below its upper edge where there is no room above."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = min(max(box[0], 0.0), max(size_px[0] - width, 0.0))
    y = box[1] - height if box[1] >= height else max(box[1], 0.0)
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    draw.text((x + 2 - left, y + 2 - top), text, fill=_TEXT, font=font)
