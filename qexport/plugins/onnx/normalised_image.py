"""The camera frame to the detector's image, in standard ONNX operators."""

from __future__ import annotations

import onnx_ir as ir

from qexport.plugins.frame_to_image import Preprocessing, make_image
from qexport.plugins.onnx.builder import Builder


def lower(node: ir.Node, *, integers_move: bool = True) -> None:
    """Replace a NormalisedImage placeholder: (H, W, 3) uint8 to (1, 3, padded_h, padded_w) float32.

    Args:
        node: the placeholder.
        integers_move: whether the runtime gathers and transposes uint8; TensorRT only converts it.
    """
    build = Builder(node)
    frame, attributes = node.inputs[0], node.attributes
    assert frame is not None and frame.shape is not None
    resized, padded = attributes["resized"].as_ints(), attributes["padded"].as_ints()
    asked = Preprocessing(
        frame=(int(frame.shape[0]), int(frame.shape[1])),
        resized=(resized[0], resized[1]),
        padded=(padded[0], padded[1]),
        mean=attributes["mean"].as_floats(),
        std=attributes["std"].as_floats(),
    )
    build.replace_with(make_image(build, frame, asked, integers_move=integers_move))
