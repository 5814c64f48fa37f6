"""The camera frame to the detector's image, in numpy: what the artifact does where preprocessing is inside.

The resize is torchvision's: bilinear, half-pixel centres, no antialiasing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qexport.artifact import InputSpec


def normalised_image(frame: NDArray[np.uint8], spec: InputSpec) -> NDArray[np.float32]:
    """Return (1, 3, padded_h, padded_w) float32 for a (H, W, 3) uint8 RGB frame."""
    mean, std = np.asarray(spec.mean, np.float32), np.asarray(spec.std, np.float32)
    image = ((frame / np.float32(255) - mean) / std).astype(np.float32)
    image = _resize_axis(image, 0, spec.resized_height_px)
    image = _resize_axis(image, 1, spec.resized_width_px)
    rows = spec.padded_height_px - spec.resized_height_px
    columns = spec.padded_width_px - spec.resized_width_px
    padded = np.pad(image, ((0, rows), (0, columns), (0, 0)))
    return np.ascontiguousarray(padded.transpose(2, 0, 1)[None])


def _resize_axis(image: NDArray[np.float32], axis: int, size: int) -> NDArray[np.float32]:
    length = image.shape[axis]
    if size == length:
        return image
    low, high, weight = neighbours(length, size)
    shape = [1, 1, 1]
    shape[axis] = size
    weight = weight.reshape(shape)
    resized: NDArray[np.float32] = (
        np.take(image, low, axis) * (1 - weight) + np.take(image, high, axis) * weight
    )
    return resized


def neighbours(length: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Return what a bilinear resize of `length` pixels to `size` reads, each (size,).

    Returns:
        The index of the lower neighbour, that of the upper one, and the upper one's weight.
    """
    # Rounded to float32 where torch rounds: a position that rounds otherwise is felt where neighbours differ much.
    ratio = np.float64(np.float32(length) / np.float32(size))
    exact = (np.arange(size) + 0.5) * ratio - 0.5
    position = np.maximum(exact.astype(np.float32), np.float32(0))
    low = np.minimum(position.astype(np.int64), length - 1)
    return low, np.minimum(low + 1, length - 1), (position - low).astype(np.float32)
