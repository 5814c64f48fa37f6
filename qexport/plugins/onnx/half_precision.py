"""Compute the network in float16 and the boxes in float32, as types of the graph.

TensorRT from 11 on, and every strongly typed network, takes the types that the file says. What carries the work,
trunk to box head, becomes float16; the image's normalisation, RoIAlign's positions, boxes, scores and NMS stay
float32: float16 has 11 bits, and a coordinate of 1,333 pixels needs more.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qexport.errors import ExportError
from qexport.layers import stage_of
from qexport.plugins.onnx.builder import add_initializer, array_of

_STAGES = ("trunk", "fpn", "rpn_head", "box_head")
_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def to_half_precision(model: ir.Model) -> None:
    """Type trunk, FPN, RPN head and box head as float16; casts stand where they meet the rest.

    Raises:
        ExportError: a weight is beyond what float16 holds.
    """
    nodes = [node for node in model.graph if _belongs(node)]
    inside = {id(node) for node in nodes}
    halves: dict[int, ir.Value] = {}
    for node in nodes:
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype != _FLOAT or _made_by(value, inside):
                continue
            if id(value) not in halves:
                halves[id(value)] = _half_of(model, node, value)
            node.replace_input_with(index, halves[id(value)])
    for node in nodes:
        for output in node.outputs:
            if output.dtype == _FLOAT:
                _give_float_to_the_rest(model, node, output, inside)


def _belongs(node: ir.Node) -> bool:
    path = _site(node)
    return bool(path) and stage_of(path) in _STAGES and node.op_type != "Cast"


def _site(node: ir.Node) -> str:
    path: str = node.metadata_props.get("site", "").partition("@")[0]
    return path


def _made_by(value: ir.Value, inside: set[int]) -> bool:
    producer = value.producer()
    return producer is not None and id(producer) in inside


def _half_of(model: ir.Model, before: ir.Node, value: ir.Value) -> ir.Value:
    array = array_of(value)
    if array is None:
        return _cast(model, before, value, _HALF)
    largest = float(np.abs(array).max(initial=0.0))
    if largest > float(np.finfo(np.float16).max):
        raise ExportError(
            f"{_site(before)} ({before.op_type}): {value.name} holds {largest:.3g}, beyond float16, "
            f"whose largest is {np.finfo(np.float16).max:.0f}. Rescale the layer in the model."
        )
    return add_initializer(model.graph, f"{value.name}_float16", array.astype(np.float16))


def _cast(model: ir.Model, before: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    node = ir.node("Cast", [value], {"to": dtype})
    node.metadata_props.update(before.metadata_props)
    model.graph.insert_before(before, node)
    node.outputs[0].dtype, node.outputs[0].shape = dtype, value.shape
    return node.outputs[0]


def _give_float_to_the_rest(model: ir.Model, node: ir.Node, output: ir.Value, inside: set[int]) -> None:
    output.dtype = _HALF
    rest = [use for use in output.uses() if id(use.node) not in inside]
    places = [place for place, value in enumerate(model.graph.outputs) if value is output]
    if not rest and not places:
        return
    back = ir.node("Cast", [output], {"to": _FLOAT})
    back.metadata_props.update(node.metadata_props)
    model.graph.insert_after(node, back)
    back.outputs[0].dtype, back.outputs[0].shape = _FLOAT, output.shape
    for use in rest:
        use.node.replace_input_with(use.idx, back.outputs[0])
    for place in places:
        back.outputs[0].name, output.name = output.name, f"{output.name}_float16"
        model.graph.outputs[place] = back.outputs[0]
