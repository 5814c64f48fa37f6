"""The camera frame to the detector's image, in standard operators.

torchvision normalises, then resizes. A bilinear resize keeps constants, so resizing first and normalising
the smaller image gives the same values within float rounding. Runtimes round the positions of a Resize in
ways of their own, up to 1e-3 off on a frame of noise; so neighbours and weights are constants here, rounded as
torch rounds them.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qexport.plugins.onnx.builder import Builder
from qexport.runtimes.preprocess import neighbours


def lower(node: ir.Node, *, integers_move: bool = True) -> None:
    """Replace a NormalisedImage placeholder: (H, W, 3) uint8 to (1, 3, padded_h, padded_w) float32.

    Args:
        node: the placeholder.
        integers_move: whether the runtime gathers and transposes uint8; TensorRT only converts it.
    """
    build = Builder(node)
    frame = node.inputs[0]
    assert frame is not None and frame.shape is not None
    height, width = int(frame.shape[0]), int(frame.shape[1])
    attributes = node.attributes
    resized = attributes["resized"].as_ints()
    padded = attributes["padded"].as_ints()
    mean = np.asarray(attributes["mean"].as_floats(), np.float64)
    std = np.asarray(attributes["std"].as_floats(), np.float64)

    factors = (height / resized[0], width / resized[1])
    even = factors in {(2.0, 2.0), (4.0, 4.0)}
    image = frame if integers_move else build.op("Cast", [frame], to=ir.DataType.FLOAT)
    if not even:
        axes = ((0, height), (1, width))
        for axis, length in (
            axes if resized[0] < height else reversed(axes)
        ):  # fewer rows, fewer columns to read
            image = _resize_axis(build, image, axis, length, resized[axis], convert=integers_move)
    image = build.op("Transpose", [image], perm=[2, 0, 1])
    image = build.op("Unsqueeze", [image, build.constant([0], np.int64)])
    if integers_move and (even or factors == (1.0, 1.0)):
        image = build.op("Cast", [image], to=ir.DataType.FLOAT)
    if even:
        # Half-pixel bilinear at an even factor reads the two middle pixels of each block with equal weight.
        image = _middle_average(build, image, int(factors[0]))
    image = build.op("Mul", [image, build.constant((1 / (255 * std)).reshape(1, 3, 1, 1), np.float32)])
    image = build.op("Add", [image, build.constant((-mean / std).reshape(1, 3, 1, 1), np.float32)])
    if padded[0] != resized[0] or padded[1] != resized[1]:
        pads = [0, 0, 0, 0, 0, 0, padded[0] - resized[0], padded[1] - resized[1]]
        image = build.op("Pad", [image, build.constant(pads, np.int64)])
    build.replace_with(image)


def _resize_axis(
    build: Builder, image: ir.Value, axis: int, length: int, size: int, *, convert: bool
) -> ir.Value:
    """Return a (H, W, 3) image resized along one axis, float32; as it is where nothing changes."""
    if length == size:
        return image
    low, high, weight = neighbours(length, size)
    shape = [1, 1, 1]
    shape[axis] = size
    parts = []
    for index, share in ((low, 1 - weight), (high, weight)):
        part = build.op("Gather", [image, build.constant(index, np.int64)], axis=axis)
        if convert:
            part = build.op("Cast", [part], to=ir.DataType.FLOAT)
        parts.append(build.op("Mul", [part, build.constant(share.reshape(shape), np.float32)]))
    return build.op("Add", parts)


def _middle_average(build: Builder, image: ir.Value, factor: int) -> ir.Value:
    edge = factor // 2 - 1
    if edge:
        starts = build.constant([edge, edge], np.int64)
        ends = build.constant([np.iinfo(np.int64).max] * 2, np.int64)
        image = build.op("Slice", [image, starts, ends, build.constant([2, 3], np.int64)])
    return build.op("AveragePool", [image], kernel_shape=[2, 2], strides=[factor, factor])
