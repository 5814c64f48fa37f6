"""The camera frame to the detector's image, in operations that every runtime has.

torchvision normalises, then resizes. A bilinear resize keeps constants, so resizing first and normalising
the smaller image gives the same values within float rounding. Runtimes round the positions of a Resize in
ways of their own, up to 1e-3 off on a frame of noise; so neighbours and weights are constants here, rounded as
torch rounds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qexport.plugins.operations import Operations, V
from qexport.runtimes.preprocess import neighbours


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """What becomes of a frame; sizes are height and width."""

    frame: tuple[int, int]
    resized: tuple[int, int]
    padded: tuple[int, int]
    mean: Sequence[float]
    """Per channel, of values in 0..1."""
    std: Sequence[float]


def make_image(build: Operations[V], frame: V, asked: Preprocessing, *, integers_move: bool) -> V:
    """Return the detector's image, (1, 3, padded_h, padded_w) float32.

    Args:
        build: what to write with.
        frame: (H, W, 3) uint8.
        asked: what becomes of it.
        integers_move: whether the runtime gathers and transposes uint8; TensorRT only converts it.
    """
    resized, padded = asked.resized, asked.padded
    mean, std = np.asarray(asked.mean, np.float64), np.asarray(asked.std, np.float64)
    factors = (asked.frame[0] / resized[0], asked.frame[1] / resized[1])
    even = factors in {(2.0, 2.0), (4.0, 4.0)}
    image = frame if integers_move else build.cast(frame, np.float32)
    if not even:
        # Fewer rows first: fewer columns to read.
        for axis in (0, 1) if resized[0] < asked.frame[0] else (1, 0):
            image = _resize_axis(build, image, axis, asked.frame[axis], resized[axis], convert=integers_move)
    image = build.transpose(image, [2, 0, 1])
    image = build.unsqueeze(image, [0])
    if integers_move and (even or factors == (1.0, 1.0)):
        image = build.cast(image, np.float32)
    if even:
        # Half-pixel bilinear at an even factor reads the two middle pixels of each block with equal weight.
        image = _middle_average(build, image, int(factors[0]))
    image = build.mul(image, build.constant((1 / (255 * std)).reshape(1, 3, 1, 1), np.float32))
    image = build.add(image, build.constant((-mean / std).reshape(1, 3, 1, 1), np.float32))
    if padded[0] != resized[0] or padded[1] != resized[1]:
        image = build.pad(image, [0, 0, 0, 0, 0, 0, padded[0] - resized[0], padded[1] - resized[1]])
    return image


def _resize_axis(build: Operations[V], image: V, axis: int, length: int, size: int, *, convert: bool) -> V:
    """Return a (H, W, 3) image resized along one axis, float32; as it is where nothing changes."""
    if length == size:
        return image
    low, high, weight = neighbours(length, size)
    shape = [1, 1, 1]
    shape[axis] = size
    parts = []
    for index, share in ((low, 1 - weight), (high, weight)):
        part = build.gather(image, build.constant(index, np.int64), axis=axis)
        if convert:
            part = build.cast(part, np.float32)
        parts.append(build.mul(part, build.constant(share.reshape(shape), np.float32)))
    return build.add(*parts)


def _middle_average(build: Operations[V], image: V, factor: int) -> V:
    edge = factor // 2 - 1
    if edge:
        to_the_end = np.iinfo(np.int64).max
        image = build.slice(image, [edge, edge], [to_the_end, to_the_end], [2, 3])
    return build.average_pool(image, [2, 2], [factor, factor])
