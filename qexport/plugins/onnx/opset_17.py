"""Write a model in operator set 17, the newest that the ONNX parser of TensorRT 8.5 and 8.6 takes.

Newer parsers take it as well. Of the operators that a detector has, 18 changed two things: reductions take their
axes as an input, and Resize has attributes that none of ours uses.
"""

from __future__ import annotations

import onnx_ir as ir

from qexport.errors import ExportError
from qexport.plugins.onnx.builder import array_of

OPSET = 17
_IR_VERSION = 8
_REDUCTIONS = ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceL2")
_NEW_IN_18 = {
    "BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot", "CenterCropPad", "Col2Im", "GroupNormalization", "Mish",
    "OptionalGetElement", "OptionalHasElement",
}  # fmt: skip
_RESIZE_18 = ("antialias", "axes", "keep_aspect_ratio_policy")


def to_opset_17(model: ir.Model) -> None:
    """Rewrite a model of operator set 18; no value changes.

    Raises:
        ExportError: an operator has no form in operator set 17, named with its module path.
    """
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type in _NEW_IN_18 or (node.op_type == "Pad" and len(node.inputs) > 3):
            raise ExportError(
                f"{node.name or node.op_type}: {node.op_type} as operator set 18 has it is not in operator set "
                f"{OPSET}, the newest of TensorRT 8.5. Replace it in the model."
            )
        if node.op_type == "Resize":
            for name in _RESIZE_18:
                node.attributes.pop(name, None)
        if node.op_type in _REDUCTIONS and len(node.inputs) > 1:
            axes = array_of(node.inputs[1])
            if axes is None:
                raise ExportError(f"{node.name or node.op_type}: axes that are computed have no fixed shape.")
            node.resize_inputs(1)
            node.attributes["axes"] = ir.AttrInt64s("axes", [int(axis) for axis in axes.reshape(-1)])
    model.graph.opset_imports[""] = OPSET
    model.ir_version = _IR_VERSION
