"""Put the integer RoIAlign into a quantized graph: features stay integers, channels stay last.

What it replaces: DequantizeLinear of each level, the placeholder, QuantizeLinear; and, where a linear layer
follows, the flattening, by permuting that layer's weights from (channel, y, x) to (y, x, channel) order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qexport.plugins.onnx.builder import Builder, add_initializer, array_of, scalar_of
from qexport.plugins.onnx.placeholders import ROI_ALIGN
from qexport.plugins.onnx.roi_align import QuantizedFeature, RoiAlignSpec, lower_to_int8_gather


@dataclass(frozen=True, slots=True)
class ChannelsLast:
    """A tensor that the rewritten graph stores channels last."""

    replaces: str
    """Name of the quantized tensor that it stands for."""
    value: ir.Value
    stored_shape: tuple[int, int, int, int]
    """(R, pooled_h, pooled_w, C)."""


def integer_features(node: ir.Node) -> list[QuantizedFeature] | None:
    """Return the levels of a placeholder as integers, or None where one of them is float."""
    features = []
    for value in node.inputs[1:]:
        producer = value.producer() if value is not None else None
        if producer is None or producer.op_type != "DequantizeLinear":
            return None
        assert producer.inputs[0] is not None
        features.append(QuantizedFeature(producer.inputs[0], scalar_of(producer.inputs[1])))
    return features


def lower_to_integer(model: ir.Model) -> list[ChannelsLast]:
    """Replace the placeholder by its integer form; return the tensors that are stored channels last.

    The list holds the pooled features, then, where a linear layer follows, their flattened form. It is empty,
    and the graph unchanged, where a level or the result is not quantized, or the sampling ratio is adaptive.
    """
    node = next(node for node in model.graph if node.op_type == ROI_ALIGN)
    spec = RoiAlignSpec.of(node)
    features = integer_features(node)
    quantizer = _only_user(node.outputs[0])
    if (
        features is None
        or quantizer is None
        or quantizer.op_type != "QuantizeLinear"
        or spec.sampling_ratio <= 0
    ):
        return []
    pooled = lower_to_int8_gather(node, features, scalar_of(quantizer.inputs[1]))
    height, width = spec.output_size
    stored = (spec.proposals, height, width, spec.channels)
    pooled.dtype, pooled.shape = ir.DataType.UINT8, ir.Shape((spec.proposals * height, width, spec.channels))
    flattened = _flattening_quantizer(quantizer)
    names = [str(node.outputs[0].name) for node in (quantizer, flattened) if node is not None]
    if flattened is not None:
        build = Builder(flattened)
        flat = build.op(
            "Reshape", [pooled, build.constant([spec.proposals, height * width * spec.channels], np.int64)]
        )
        for use in list(flattened.outputs[0].uses()):
            _permute_columns(model, use.node, spec)
        build.replace_with(flat)
        return [ChannelsLast(names[0], pooled, stored), ChannelsLast(names[1], flat, stored)]
    build = Builder(quantizer)
    shaped = build.op("Reshape", [pooled, build.constant(stored, np.int64)])
    build.replace_with(build.op("Transpose", [shaped], perm=[0, 3, 1, 2]))
    return [ChannelsLast(names[0], pooled, stored)]


def _flattening_quantizer(quantizer: ir.Node) -> ir.Node | None:
    """Return the quantizer after DequantizeLinear and Reshape to two axes, if linear layers alone use it."""
    reshape = _only_user(_result_of(_only_user(quantizer.outputs[0])))
    if reshape is None or reshape.op_type not in ("Reshape", "Flatten"):
        return None
    again = _only_user(reshape.outputs[0])
    if again is None or again.op_type != "QuantizeLinear":
        return None
    users = [use.node for use in again.outputs[0].uses()]
    linears = [_only_user(user.outputs[0]) for user in users if user.op_type == "DequantizeLinear"]
    if len(linears) != len(users) or any(linear is None or linear.op_type != "Gemm" for linear in linears):
        return None
    return again


def _permute_columns(model: ir.Model, dequantizer: ir.Node, spec: RoiAlignSpec) -> None:
    """Reorder the input columns of the Gemm behind `dequantizer` from (C, y, x) to (y, x, C)."""
    gemm = _only_user(dequantizer.outputs[0])
    assert gemm is not None and gemm.inputs[1] is not None
    weight = gemm.inputs[1].producer()
    holder, place = (
        (gemm, 1) if weight is None else (weight, 0)
    )  # a linear kept in float has its weight itself
    stored = holder.inputs[place]
    codes = array_of(stored)
    assert stored is not None and codes is not None and gemm.attributes["transB"].as_int() == 1
    bins = spec.output_size[0] * spec.output_size[1]
    permuted = codes.reshape(-1, spec.channels, bins).transpose(0, 2, 1).reshape(codes.shape)
    holder.replace_input_with(place, add_initializer(model.graph, f"{stored.name}/channels_last", permuted))


def _only_user(value: ir.Value | None) -> ir.Node | None:
    users = [] if value is None else [use.node for use in value.uses()]
    return users[0] if len(users) == 1 else None


def _result_of(node: ir.Node | None) -> ir.Value | None:
    return node.outputs[0] if node is not None and node.op_type == "DequantizeLinear" else None
