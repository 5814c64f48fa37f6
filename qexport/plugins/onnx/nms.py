"""Greedy NMS of each group by itself, as ONNX's NonMaxSuppression and a scatter of what it kept."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qexport.plugins.onnx.builder import Builder


def lower(node: ir.Node) -> None:
    """Replace a BatchedNmsMask placeholder; a group becomes a batch of NonMaxSuppression with one class."""
    build = Builder(node)
    boxes, scores, valid = node.inputs
    assert scores is not None and scores.shape is not None
    groups, number = int(scores.shape[0]), int(scores.shape[1])
    ranked = build.op("Where", [valid, scores, build.constant(-1.0, np.float32)])
    ranked = build.op("Unsqueeze", [ranked, build.constant([1], np.int64)])
    kept = build.op(
        "NonMaxSuppression",
        [
            boxes,
            ranked,
            build.constant([number], np.int64),
            build.constant([node.attributes["iou_threshold"].as_float()], np.float32),
            # Exclusive: invalid boxes, at -1, take no part; a valid score may be zero.
            build.constant([-0.5], np.float32),
        ],
    )
    where = build.op("Gather", [kept, build.constant([0, 2], np.int64)], axis=1)
    count = build.op("Shape", [where], start=0, end=1)
    hits = build.op("Expand", [build.constant([True], np.bool_), count])
    empty = build.constant(np.zeros((groups, number)), np.bool_)
    build.replace_with(build.op("ScatterND", [empty, where, hits]))
