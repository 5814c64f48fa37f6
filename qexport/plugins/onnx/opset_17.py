"""Write a model in operator set 17, the newest that the ONNX parser of TensorRT 8.5 and 8.6 takes.

Newer parsers take it as well. Of the operators that a detector has, 18 changed three things: reductions take their
axes as an input, Split may be told into how many parts, and Resize has attributes that none of ours uses.
"""

from __future__ import annotations

import onnx_ir as ir

from qexport.errors import ExportError
from qexport.plugins.onnx.builder import array_of

OPSET = 17
_IR_VERSION = 8
# ReduceSum has had its axes as an input since 13.
_REDUCTIONS = {
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSumSquare",
}  # fmt: skip
_NEW_IN_18 = {
    "BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot", "CenterCropPad", "Col2Im", "GroupNormalization", "Mish",
    "OptionalGetElement", "OptionalHasElement",
}  # fmt: skip
_IDLE_IN_RESIZE: dict[str, tuple[object, ...]] = {
    "antialias": (0,),
    "axes": (),
    "keep_aspect_ratio_policy": ("stretch",),
}
"""What 18 added to Resize, and the values with which it changes nothing."""


def to_opset_17(model: ir.Model) -> None:
    """Rewrite a model of operator set 18; no value changes.

    Raises:
        ExportError: an operator has no form in operator set 17, named with its module path.
    """
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type in _NEW_IN_18 or (node.op_type == "Pad" and len(node.inputs) > 3):
            raise _not_in_17(node)
        if node.op_type == "Resize":
            for name, idle in _IDLE_IN_RESIZE.items():
                attribute = node.attributes.pop(name, None)
                if attribute is not None and attribute.value not in idle:
                    raise _not_in_17(node, f" with {name}")
        if node.op_type == "Split" and "num_outputs" in node.attributes:
            _name_parts(node)
        if node.op_type in _REDUCTIONS:
            _name_axes(node)
    model.graph.opset_imports[""] = OPSET
    model.ir_version = _IR_VERSION


def _not_in_17(node: ir.Node, what: str = "") -> ExportError:
    return ExportError(
        f"{_place(node)}: {node.op_type}{what} as operator set 18 has it is not in operator set {OPSET}, the newest of "
        "TensorRT 8.5. Replace it in the model."
    )


def _place(node: ir.Node) -> str:
    """Return the module call that a node belongs to, else its own name."""
    site: str = node.metadata_props.get("site", "").removesuffix("@0")
    return site or node.name or node.op_type


def _name_axes(node: ir.Node) -> None:
    """Write the axes of a reduction as its attribute; no axes are all of them."""
    # Of no axes, 18 can be told to reduce nothing; with axes it changes nothing.
    idle = node.attributes.pop("noop_with_empty_axes", None)
    if len(node.inputs) < 2 or node.inputs[1] is None:
        if idle is not None and idle.as_int():
            raise ExportError(f"{_place(node)}: a reduction over no axis. Take it out of the model.")
        return
    axes = array_of(node.inputs[1])
    if axes is None:
        raise ExportError(f"{_place(node)}: {node.op_type} over axes that are computed have no fixed shape.")
    node.resize_inputs(1)
    node.attributes["axes"] = ir.AttrInt64s("axes", [int(axis) for axis in axes.reshape(-1)])


def _name_parts(node: ir.Node) -> None:
    """Take out the number of parts: 17 splits into as many as there are outputs, where they are of one size."""
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    sizes = {output.shape[axis] if output.shape is not None else None for output in node.outputs}
    if len(sizes) > 1 or None in sizes:
        raise ExportError(
            f"{_place(node)}: Split into {len(node.outputs)} parts that are not of one size. "
            "Give the sizes, torch.split(x, [...])."
        )
    node.attributes.pop("num_outputs")
