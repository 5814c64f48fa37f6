"""int8 weights as float32 with a quantizer of their own: what TensorRT 8 takes, which has no int8 constants."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qexport.plugins.onnx.builder import Builder, array_of


def store_weights_as_float(model: ir.Model) -> None:
    """Write int8 weights as float32 with a QuantizeLinear before their DequantizeLinear; no value changes.

    TensorRT 8 takes no int8 constants; every version folds the pair.
    """
    for node in list(model.graph):
        codes = array_of(node.inputs[0]) if node.op_type == "DequantizeLinear" else None
        scale = array_of(node.inputs[1]) if codes is not None else None
        if codes is None or scale is None or codes.dtype != np.int8:
            continue
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
        shape = [1] * codes.ndim
        if scale.size > 1:
            shape[axis] = -1
        build = Builder(node)
        weights = build.constant(codes.astype(np.float32) * scale.reshape(shape), np.float32)
        zero = build.constant(np.zeros(scale.shape), np.int8)
        quantized = build.op("QuantizeLinear", [weights, node.inputs[1], zero], axis=axis)
        quantized.dtype, quantized.shape = ir.DataType.INT8, ir.Shape(codes.shape)
        node.replace_input_with(0, quantized)
