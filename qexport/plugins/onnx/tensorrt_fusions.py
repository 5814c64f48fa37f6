"""Place quantizers where TensorRT fuses: convolution, bias, residual add and ReLU become one int8 kernel.

TensorRT adds the residual inside the kernel, in float, before the one rounding at the end. A quantizer between
a convolution and the add would cut that kernel in two, so it is taken out: that tensor is then more exact than
the encodings say, and the artifact lists it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qexport.plugins.onnx.builder import Builder, array_of

WEIGHTED = ("Conv", "Gemm", "MatMul", "ConvTranspose")


def fuse_residual_adds(model: ir.Model) -> list[str]:
    """Take out the quantizer between a convolution and the add that follows it; one branch of each add.

    Of two convolutions that meet in an add, the later one runs it; the other is quantized as before.

    Returns:
        Names of the quantized tensors that are no more.
    """
    position = {id(node): index for index, node in enumerate(model.graph)}
    removed: list[str] = []
    for add in [node for node in model.graph if node.op_type == "Add"]:
        branches = [
            (position[id(chain[0])], index, chain)
            for index, value in enumerate(add.inputs)
            if (chain := _convolution_behind(value)) is not None
        ]
        if not branches:
            continue
        _, index, (convolution, quantizer, dequantizer) = max(branches, key=lambda branch: branch[0])
        add.replace_input_with(index, convolution.outputs[0])
        removed.append(str(quantizer.outputs[0].name))
        model.graph.remove([dequantizer, quantizer], safe=True)
    return removed


def _convolution_behind(value: ir.Value | None) -> tuple[ir.Node, ir.Node, ir.Node] | None:
    """Return convolution, quantizer and dequantizer that end in `value` alone; None for anything else."""
    dequantizer = value.producer() if value is not None else None
    if dequantizer is None or dequantizer.op_type != "DequantizeLinear":
        return None
    quantizer = dequantizer.inputs[0].producer() if dequantizer.inputs[0] is not None else None
    if quantizer is None or quantizer.op_type != "QuantizeLinear" or quantizer.inputs[0] is None:
        return None
    convolution = quantizer.inputs[0].producer()
    if convolution is None or convolution.op_type != "Conv":
        return None
    chain = (convolution, quantizer, dequantizer)
    alone = all(len(list(node.outputs[0].uses())) == 1 for node in chain)
    return chain if alone and _dequantizes(convolution.inputs[0]) else None


def _dequantizes(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


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
