"""Greedy NMS in standard operators that every runtime has: the fixed point of "kept unless a kept better box overlaps".

Who suppresses whom is one matrix a group. Starting from "all are kept", a box is kept where no better kept box
suppresses it; repeated until nothing changes. A box's fate is final once that of all better boxes is, so the
loop ends after as many turns as the longest chain of suppressions has links (4 to 8 on real images), at most
after as many as there are boxes, and its result is that of the greedy algorithm, not an approximation.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qexport.plugins.onnx.builder import Builder


def lower(node: ir.Node) -> None:
    """Replace a BatchedNmsMask placeholder: (G, N, 4) boxes, (G, N) scores and validity to (G, N) bool."""
    build = Builder(node)
    boxes, scores, valid = node.inputs
    assert boxes is not None and scores is not None and valid is not None and scores.shape is not None
    number = int(scores.shape[1])
    overlap = _overlap_more_than(build, boxes, node.attributes["iou_threshold"].as_float())
    suppresses = build.op("And", [overlap, _better(build, scores, number)])
    matrix = build.op("Cast", [suppresses], to=ir.DataType.FLOAT)  # (G, N, N): column suppresses row
    start = build.op("Cast", [valid], to=ir.DataType.FLOAT)
    start = build.op("Unsqueeze", [start, build.constant([2], np.int64)])
    kept = _until_nothing_changes(build, matrix, start, number)
    kept = build.op("Squeeze", [kept, build.constant([2], np.int64)])
    build.replace_with(build.op("Greater", [kept, build.constant(0.5, np.float32)]))


def _overlap_more_than(build: Builder, boxes: ir.Value, threshold: float) -> ir.Value:
    """Return whether IoU exceeds the threshold, (G, N, N) bool, as torchvision's nms computes it."""
    low, high = (
        build.op("Slice", [boxes, *(build.constant([number], np.int64) for number in (start, start + 2, 2))])
        for start in (0, 2)
    )
    area = _product(build, build.op("Sub", [high, low]))  # (G, N)
    row, column = build.constant([2], np.int64), build.constant([1], np.int64)
    corner = build.op(
        "Max", [build.op("Unsqueeze", [low, row]), build.op("Unsqueeze", [low, column])]
    )  # (G, N, N, 2)
    end = build.op("Min", [build.op("Unsqueeze", [high, row]), build.op("Unsqueeze", [high, column])])
    side = build.op("Max", [build.op("Sub", [end, corner]), build.constant(0.0, np.float32)])
    shared = _product(build, side)
    both = build.op("Add", [build.op("Unsqueeze", [area, row]), build.op("Unsqueeze", [area, column])])
    iou = build.op("Div", [shared, build.op("Sub", [both, shared])])
    # Boxes without area give 0 / 0, of which no comparison is true.
    return build.op("Greater", [iou, build.constant(threshold, np.float32)])


def _product(build: Builder, pairs: ir.Value) -> ir.Value:
    """Return the product of the two values of the last axis."""
    axis = -1
    first, second = (
        build.op("Gather", [pairs, build.constant(index, np.int64)], axis=axis) for index in (0, 1)
    )
    return build.op("Mul", [first, second])


def _better(build: Builder, scores: ir.Value, number: int) -> ir.Value:
    """Return whether the box of the column ranks before that of the row, (G, N, N); of equal ones the earlier."""
    own = build.op("Unsqueeze", [scores, build.constant([2], np.int64)])
    other = build.op("Unsqueeze", [scores, build.constant([1], np.int64)])
    earlier = build.constant(np.tril(np.ones((1, number, number)), -1), np.bool_)
    equal = build.op("And", [build.op("Equal", [other, own]), earlier])
    return build.op("Or", [build.op("Greater", [other, own]), equal])


def _until_nothing_changes(build: Builder, matrix: ir.Value, start: ir.Value, number: int) -> ir.Value:
    """Return the fixed point of kept = start where matrix x kept is zero, (G, N, 1) float32 of 0 and 1."""
    turn = ir.Value(name="turn", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
    going = ir.Value(name="going", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    kept = ir.Value(name="kept", type=ir.TensorType(ir.DataType.FLOAT), shape=start.shape)
    nodes: list[ir.Node] = []

    def op(op_type: str, inputs: list[ir.Value], **attributes: int | ir.TensorProtocol) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        nodes.append(node)
        return node.outputs[0]

    half = op("Constant", [], value=ir.tensor(np.asarray(0.5, np.float32)))
    suppressed = op("Greater", [op("MatMul", [matrix, kept]), half])
    after = op("Mul", [start, op("Cast", [op("Not", [suppressed])], to=ir.DataType.FLOAT)])
    change = op("ReduceMax", [op("Abs", [op("Sub", [after, kept])])], keepdims=0)
    again = op("Greater", [change, half])
    again.type, again.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([])
    after.type, after.shape = ir.TensorType(ir.DataType.FLOAT), start.shape
    prefix = start.name or "nms"
    for index, node in enumerate(nodes):
        node.name = node.outputs[0].name = f"{prefix}/loop/{node.op_type}_{index}"
    body = ir.Graph([turn, going, kept], [again, after], nodes=nodes, name="until_nothing_changes")
    return build.op(
        "Loop",
        [build.constant(number, np.int64), build.constant(True, np.bool_), start],
        body=body,
    )
