"""The camera frame to the detector's image, channels last.

torchvision normalises, then resizes. A bilinear resize keeps constants, so resizing first and normalising the
smaller image gives the same values within float rounding. Neighbours and weights are constants, rounded as torch
rounds them; at a factor of 2 or 4 they are an average of the middle pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray
from torch.fx import Node

from qexport.plugins.tflite.builder import TfliteBuilder
from qexport.plugins.tflite.held import Held, as_plain
from qexport.plugins.tflite.lowering import Lowering
from qexport.plugins.tflite.writer import Value
from qexport.quantization.graph import argument_node
from qexport.runtimes.preprocess import neighbours


def normalised_image(lowering: Lowering, node: Node) -> Held:
    """Write `qexport.detectors.operators.normalised_image`: (H, W, 3) uint8 to a map of float32."""
    build = lowering.build
    frame = as_plain(build, lowering.real(argument_node(node)))
    mean, std, resized, padded = _settings(node)
    image = build.reshape(build.cast(frame, np.float32), (1, *frame.shape))
    factor, shift = (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
    factors = (frame.shape[0] / resized[0], frame.shape[1] / resized[1])
    if factors in {(2.0, 2.0), (4.0, 4.0)}:
        image = _middle_average(build, image, int(factors[0]), factor, shift)
    else:
        # Fewer rows first: fewer columns to read.
        for axis in (0, 1) if resized[0] < frame.shape[0] else (1, 0):
            image = _resize_axis(build, image, axis + 1, resized[axis])
        image = build.mul(image, build.constant(factor, np.float32))
        image = build.add(image, build.constant(shift, np.float32))
    rows, columns = padded[0] - resized[0], padded[1] - resized[1]
    return Held.map(build.pad(image, [0, 0, 0, 0, 0, rows, columns, 0]))


def _settings(node: Node) -> tuple[Any, Any, tuple[int, int], tuple[int, int]]:
    given: Any = node.args[1:]
    mean, std = (np.asarray(values, np.float64) for values in given[:2])
    resized, padded = ((int(values[0]), int(values[1])) for values in given[2:4])
    return mean, std, resized, padded


def _middle_average(
    build: TfliteBuilder, image: Value, step: int, factor: NDArray[np.float32], shift: NDArray[np.float32]
) -> Value:
    """Return the average of the two middle pixels of each block, normalised: half-pixel bilinear at an even factor.

    A depthwise convolution does all of it; a pool, a product and a sum took twice as long.
    """
    edge, end, channels = step // 2 - 1, 2**31 - 1, image.shape[3]
    image = build.slice(image, [edge, edge], [end, end], [1, 2])
    rows, columns = ((size - 2) // step + 1 for size in image.shape[1:3])
    filters = build.constant(np.broadcast_to(factor / 4, (1, 2, 2, channels)), np.float32)
    return build.op(
        "DEPTHWISE_CONV_2D",
        [image, filters, build.constant(shift, np.float32)],
        (1, rows, columns, channels),
        "float32",
        options="DepthwiseConv2DOptions",
        settings={
            "padding": schema.Padding.VALID,
            "strideH": step,
            "strideW": step,
            "depthMultiplier": 1,
            "dilationHFactor": 1,
            "dilationWFactor": 1,
        },
    )


def _resize_axis(build: TfliteBuilder, image: Value, axis: int, size: int) -> Value:
    """Return an image resized along one axis."""
    length = image.shape[axis]
    if length == size:
        return image
    low, high, weight = neighbours(length, size)
    shape = [1] * len(image.shape)
    shape[axis] = size
    parts = [
        build.mul(
            build.gather(image, build.constant(index, np.int64), axis=axis),
            build.constant(share.reshape(shape), np.float32),
        )
        for index, share in ((low, 1 - weight), (high, weight))
    ]
    return build.add(*parts)
