"""The camera frame to the detector's image, in standard operators.

torchvision normalises, then resizes. A bilinear resize keeps constants, so resizing first and normalising
the smaller image gives the same values within float rounding: 1e-6 unresized and at factors 2 and 4. At other
factors the runtime rounds sample positions to float32 in its own way: 2e-5 on smooth frames, and at worst, on
a frame of noise 1920 wide, 1e-3, a twentieth of an int8 step.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qexport.plugins.onnx.builder import Builder


def lower(node: ir.Node) -> None:
    """Replace a NormalisedImage placeholder: (H, W, 3) uint8 to (1, 3, padded_h, padded_w) float32."""
    build = Builder(node)
    frame = node.inputs[0]
    assert frame is not None and frame.shape is not None
    height, width = int(frame.shape[0]), int(frame.shape[1])
    attributes = node.attributes
    resized = attributes["resized"].as_ints()
    padded = attributes["padded"].as_ints()
    mean = np.asarray(attributes["mean"].as_floats(), np.float64)
    std = np.asarray(attributes["std"].as_floats(), np.float64)

    image = build.op("Transpose", [frame], perm=[2, 0, 1])
    image = build.op("Unsqueeze", [image, build.constant([0], np.int64)])
    image = build.op("Cast", [image], to=ir.DataType.FLOAT)
    factors = (height / resized[0], width / resized[1])
    if factors in {(2.0, 2.0), (4.0, 4.0)}:
        # Half-pixel bilinear at an even factor reads the two middle pixels of each block with equal weight.
        image = _middle_average(build, image, int(factors[0]))
    elif factors != (1.0, 1.0):
        sizes = build.constant([1, 3, *resized], np.int64)
        image = build.op(
            "Resize",
            [image, None, None, sizes],
            mode="linear",
            coordinate_transformation_mode="half_pixel",
        )
    image = build.op("Mul", [image, build.constant((1 / (255 * std)).reshape(1, 3, 1, 1), np.float32)])
    image = build.op("Add", [image, build.constant((-mean / std).reshape(1, 3, 1, 1), np.float32)])
    if padded[0] != resized[0] or padded[1] != resized[1]:
        pads = [0, 0, 0, 0, 0, 0, padded[0] - resized[0], padded[1] - resized[1]]
        image = build.op("Pad", [image, build.constant(pads, np.int64)])
    build.replace_with(image)


def _middle_average(build: Builder, image: ir.Value, factor: int) -> ir.Value:
    edge = factor // 2 - 1
    if edge:
        starts = build.constant([edge, edge], np.int64)
        ends = build.constant([np.iinfo(np.int64).max] * 2, np.int64)
        image = build.op("Slice", [image, starts, ends, build.constant([2, 3], np.int64)])
    return build.op("AveragePool", [image], kernel_shape=[2, 2], strides=[factor, factor])
