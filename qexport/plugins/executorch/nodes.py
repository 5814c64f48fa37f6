"""The nodes of XNNPACK that are written, each from its description."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema
from executorch.backends.xnnpack.utils.xnnpack_constants import XNN_FLAG_KEEP_DIMS, XNN_INVALID_VALUE_ID
from torch import Tensor

Described = Mapping[str, Any]

_BINARY = {
    "add": schema.XNNAdd,
    "divide": schema.XNNDiv,
    "maximum": schema.XNNMaximum,
    "minimum": schema.XNNMinimum,
    "multiply": schema.XNNMultiply,
    "subtract": schema.XNNSubtract,
}
_UNARY = {
    "clamp": schema.XNNClamp,
    "convert": schema.XNNConvert,
    "exp": schema.XNNExp,
    "gelu": schema.XNNGelu,
    "hardswish": schema.XNNHardswish,
    "sigmoid": schema.XNNSigmoid,
    "tanh": schema.XNNTanh,
}
_CONCATENATE = {
    2: schema.XNNConcatenate2,
    3: schema.XNNConcatenate3,
    4: schema.XNNConcatenate4,
    5: schema.XNNConcatenate5,
}
MOST_CONCATENATED = max(_CONCATENATE)


def make_node(
    writer: Any, one: Described, values: Sequence[Described], tensors: Mapping[int, Tensor], external: Any
) -> None:
    """Write a node and its result.

    Args:
        writer: of the graph.
        one: the node, as `delegate.describe` gives it.
        values: of the segment.
        tensors: its constants, by number.
        external: where its result goes outside; None for a result that stays.
    """
    kind, result = one["kind"], values[one["output"]]
    if kind in ("convolution", "linear"):
        source, weight, bias = _weighted(writer, one, values, tensors)
        output = writer.value(result, external)
        union = (
            schema.XNNFullyConnected(
                input1_id=source, filter_id=weight, bias_id=bias, output_id=output, flags=0
            )
            if kind == "linear"
            else _convolution(one, source, weight, bias, output)
        )
    else:
        sources = [writer.number(values[number], tensors) for number in one["inputs"]]
        output = writer.value(result, external)
        union = _union(one, sources, output, result["shape"])
    writer.node(union, one["handle"], one.get("limits"))


def _weighted(
    writer: Any, one: Described, values: Sequence[Described], tensors: Mapping[int, Tensor]
) -> tuple[int, int, int]:
    source = writer.number(values[one["inputs"][0]], tensors)
    weight, bias, *scales = (tensors[number] for number in one["inputs"][1:])
    if weight.dtype != torch.int8:
        return source, writer.stored(weight), writer.stored(bias)
    axis = weight.dim() - 1 if one.get("depthwise") else 0
    return (
        source,
        writer.stored_integers(weight, scales[0], axis),
        writer.stored_integers(bias, scales[1], 0),
    )


def _convolution(one: Described, source: int, weight: int, bias: int, output: int) -> Any:
    rows, columns = one["padding"]
    make = schema.XNNDepthwiseConv2d if one["depthwise"] else schema.XNNConv2d
    return make(
        padding_top=rows,
        padding_right=columns,
        padding_bottom=rows,
        padding_left=columns,
        kernel_height=one["kernel"][0],
        kernel_width=one["kernel"][1],
        subsampling_height=one["stride"][0],
        subsampling_width=one["stride"][1],
        dilation_height=one["dilation"][0],
        dilation_width=one["dilation"][1],
        group_input_channels=one["group_input"],
        group_output_channels=one["group_output"],
        groups=one["groups"],
        adjustment_height=0,
        adjustment_width=0,
        flags=0,
        input1_id=source,
        filter_id=weight,
        bias_id=bias,
        output_id=output,
    )


def _union(one: Described, sources: Sequence[int], output: int, shape: Sequence[int]) -> Any:
    kind = one["kind"]
    if kind in _BINARY:
        return _BINARY[kind](input1_id=sources[0], input2_id=sources[1], output_id=output, flags=0)
    if kind in _UNARY:
        return _UNARY[kind](input_id=sources[0], output_id=output, flags=0)
    return _SHAPED[kind](one, sources, output, list(shape))


def _reshape(one: Described, sources: Sequence[int], output: int, shape: list[int]) -> Any:
    del one
    return schema.XNNStaticReshape(
        num_dims=len(shape), new_shape=shape, input_id=sources[0], output_id=output, flags=0
    )


def _slice(one: Described, sources: Sequence[int], output: int, shape: list[int]) -> Any:
    return schema.XNNStaticSlice(
        num_dims=len(shape), offsets=one["offsets"], sizes=shape, input_id=sources[0], output_id=output, flags=0
    )  # fmt: skip


def _transpose(one: Described, sources: Sequence[int], output: int, shape: list[int]) -> Any:
    return schema.XNNStaticTranspose(
        num_dims=len(shape), perm=one["order"], input_id=sources[0], output_id=output, flags=0
    )


def _pad(one: Described, sources: Sequence[int], output: int, shape: list[int]) -> Any:
    del shape
    return schema.XNNStaticConstantPad(
        pre_paddings=one["before"],
        post_paddings=one["after"],
        padding_value=0.0,
        input_id=sources[0],
        output_id=output,
        flags=0,
    )


def _concatenate(one: Described, sources: Sequence[int], output: int, shape: list[int]) -> Any:
    del shape
    given = [*sources, *[XNN_INVALID_VALUE_ID] * (MOST_CONCATENATED - len(sources))]
    return _CONCATENATE[len(sources)](
        axis=one["axis"],
        **{f"input{place + 1}_id": number for place, number in enumerate(given)},
        output_id=output,
        flags=0,
    )


def _pool(one: Described, sources: Sequence[int], output: int, shape: list[int]) -> Any:
    del shape
    make = schema.XNNMaxPooling2d if one["kind"] == "max pool" else schema.XNNAvgPooling2d
    rows, columns = one["padding"]
    return make(
        padding_top=rows,
        padding_right=columns,
        padding_bottom=rows,
        padding_left=columns,
        pooling_height=one["window"][0],
        pooling_width=one["window"][1],
        stride_height=one["stride"][0],
        stride_width=one["stride"][1],
        dilation_height=1,
        dilation_width=1,
        input_id=sources[0],
        output_id=output,
        flags=0,
    )


def _mean(one: Described, sources: Sequence[int], output: int, shape: list[int]) -> Any:
    del one, shape
    return schema.XNNGlobalAvgPooling2d(input_id=sources[0], output_id=output, flags=XNN_FLAG_KEEP_DIMS)


def _bilinear(one: Described, sources: Sequence[int], output: int, shape: list[int]) -> Any:
    del one
    return schema.XNNStaticResizeBilinear2D(
        new_height=shape[1], new_width=shape[2], input_id=sources[0], output_id=output, flags=0
    )


def _leaky_relu(one: Described, sources: Sequence[int], output: int, shape: list[int]) -> Any:
    del shape
    return schema.XNNLeakyReLU(negative_slope=one["slope"], input_id=sources[0], output_id=output, flags=0)


_SHAPED: dict[str, Callable[[Described, Sequence[int], int, list[int]], Any]] = {
    "average pool": _pool,
    "bilinear": _bilinear,
    "concatenate": _concatenate,
    "leaky relu": _leaky_relu,
    "max pool": _pool,
    "mean": _mean,
    "pad": _pad,
    "reshape": _reshape,
    "slice": _slice,
    "transpose": _transpose,
}
