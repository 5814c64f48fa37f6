"""Greedy NMS in standard ONNX operators that every runtime has."""

from __future__ import annotations

import onnx_ir as ir

from qexport.plugins.fixed_point_nms import kept_boxes
from qexport.plugins.onnx.builder import Builder


def lower(node: ir.Node) -> None:
    """Replace a BatchedNmsMask placeholder: (G, N, 4) boxes, (G, N) scores and validity to (G, N) bool."""
    build = Builder(node)
    boxes, scores, valid = node.inputs
    assert boxes is not None and scores is not None and valid is not None and scores.shape is not None
    threshold = node.attributes["iou_threshold"].as_float()
    number = int(scores.shape[1])
    build.replace_with(kept_boxes(build, boxes, scores, valid, iou_threshold=threshold, number=number))
