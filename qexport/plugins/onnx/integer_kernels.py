"""Exact rewrites that let ONNX Runtime run every quantized layer as an integer kernel.

ONNX Runtime fuses DequantizeLinear - Conv - QuantizeLinear only when nothing stands between, the activations
are uint8 and the bias is a dequantized int32. Left as exported, 8 of 43 convolutions of a ResNet-18 FPN
detector run as integers. None of these rewrites changes a value.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qexport.plugins.onnx.builder import Builder, add_initializer, array_of, scalar_of

UINT8_ZERO = 128


def quantize_biases(model: ir.Model) -> None:
    """Store each float bias, which lies on its grid already, as int32 with a DequantizeLinear."""
    for node in list(model.graph):
        if node.op_type not in ("Conv", "Gemm") or len(node.inputs) < 3:
            continue
        source, weight, bias = (value.producer() if value is not None else None for value in node.inputs[:3])
        stored = array_of(node.inputs[2])
        if stored is None or bias is not None or not (_dequantizes(source) and _dequantizes(weight)):
            continue
        assert source is not None and weight is not None
        weight_scale = array_of(weight.inputs[1])
        assert weight_scale is not None
        scale = np.float32(scalar_of(source.inputs[1])) * weight_scale.reshape(-1)
        codes = np.rint(stored / scale).astype(np.int64)
        build = Builder(node)
        dequantized = build.op(
            "DequantizeLinear",
            [build.constant(codes, np.int32), build.constant(scale, np.float32)],
            axis=0,
        )
        dequantized.dtype, dequantized.shape = ir.DataType.FLOAT, ir.Shape(stored.shape)
        node.replace_input_with(2, dequantized)


def shield_float_layers(model: ir.Model) -> None:
    """Keep ONNX Runtime from quantizing the weights of layers that stay float.

    Where a convolution or a linear stands between DequantizeLinear and QuantizeLinear, ONNX Runtime (from 1.20)
    quantizes float weights by itself, with scales that nobody chose. A Sum of one input, which it leaves alone,
    parts the layer from its DequantizeLinear.
    """
    for node in list(model.graph):
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            continue
        source, weight = node.inputs[:2]
        if source is None or array_of(weight) is None or not _dequantizes(source.producer()):
            continue
        parted = Builder(node).op("Sum", [source])
        parted.dtype, parted.shape = source.dtype, source.shape
        node.replace_input_with(0, parted)


def move_activations_after_quantizers(model: ir.Model) -> None:
    """Turn Relu or Clip before QuantizeLinear into a clip of the integers after it.

    Rounding is monotonic, hence quantize(max(x, 0)) = max(quantize(x), quantize(0)).
    """
    for node in list(model.graph):
        if node.op_type not in ("Relu", "Clip") or node.outputs[0].is_graph_output():
            continue
        users = [use.node for use in node.outputs[0].uses()]
        if not users or any(user.op_type != "QuantizeLinear" for user in users):
            continue
        bounds = (
            [0.0, None]
            if node.op_type == "Relu"
            else [_bound(value) for value in _padded(node.inputs[1:], 2)]
        )
        source = node.inputs[0]
        for user in users:
            quantized = user.outputs[0]
            consumers = list(quantized.uses())
            build = Builder(user)
            clip_bounds = [None if bound is None else _code(build, user, bound) for bound in bounds]
            clip = ir.node("Clip", [quantized, *clip_bounds])
            clip.metadata_props.update(user.metadata_props)
            model.graph.insert_after(user, clip)
            clip.outputs[0].dtype, clip.outputs[0].shape = quantized.dtype, quantized.shape
            user.replace_input_with(0, source)
            for use in consumers:
                use.node.replace_input_with(use.idx, clip.outputs[0])
            clip.outputs[0].name, quantized.name = quantized.name, f"{quantized.name}/before_clip"
        model.graph.remove(node, safe=True)


def shift_to_uint8(model: ir.Model) -> None:
    """Store activations as uint8 with zero point 128 in place of int8 with zero point 0: the same values."""
    zero = add_initializer(model.graph, "uint8_zero_point", np.asarray(UINT8_ZERO, np.uint8))
    for node in model.graph:
        quantizes = node.op_type == "QuantizeLinear"
        if quantizes or (node.op_type == "DequantizeLinear" and array_of(node.inputs[0]) is None):
            point = array_of(node.inputs[2]) if len(node.inputs) > 2 else None
            if point is None or point.dtype != np.int8:
                continue
            node.replace_input_with(2, zero)
            if quantizes:
                node.outputs[0].dtype = ir.DataType.UINT8
        elif (
            node.op_type == "Clip"
            and node.inputs[0] is not None
            and node.inputs[0].dtype == ir.DataType.UINT8
        ):
            for index, bound in enumerate(node.inputs[1:], start=1):
                code = array_of(bound)
                if code is not None and code.dtype == np.int8:
                    shifted = np.asarray(int(code) + UINT8_ZERO, np.uint8)
                    name = f"{node.outputs[0].name}/bound_{index}"
                    node.replace_input_with(index, add_initializer(model.graph, name, shifted))
            node.outputs[0].dtype = ir.DataType.UINT8


def _dequantizes(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == "DequantizeLinear"


def _padded(values: object, length: int) -> list[ir.Value | None]:
    given: list[ir.Value | None] = list(values)  # type: ignore[call-overload]
    return given + [None] * (length - len(given))


def _bound(value: ir.Value | None) -> float | None:
    return None if value is None else scalar_of(value)


def _code(build: Builder, quantizer: ir.Node, bound: float) -> ir.Value:
    scale = np.float32(scalar_of(quantizer.inputs[1]))
    code = int(np.clip(np.rint(np.float32(bound) / scale), -128, 127))
    return build.constant(code, np.int8)
