"""What each layer kind of TensorRT computes, in torch: NVIDIA's operator reference, float32 arithmetic.

A layer function takes the layer, its inputs (an empty tensor for one that is not there) and its own constants by
the name of the field, and returns its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name
from torch import Tensor

from qexport.errors import UnsupportedOperator
from qexport.runtimes.tensorrt_network import NetworkLayer

Inputs = Sequence[Tensor]
Own = Mapping[str, Tensor]
Compute = Callable[[NetworkLayer, Inputs, Own], Tensor | tuple[Tensor, ...]]

DTYPES: dict[str, torch.dtype] = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}
_INT8_RANGE = (-128, 127)

_ACTIVATIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "RELU": lambda x, a, b: torch.relu(x),
    "SIGMOID": lambda x, a, b: torch.sigmoid(x),
    "TANH": lambda x, a, b: torch.tanh(x),
    "LEAKY_RELU": lambda x, a, b: F.leaky_relu(x, a),
    "ELU": lambda x, a, b: F.elu(x, a),
    "CLIP": lambda x, a, b: x.clamp(a, b),
    "HARD_SIGMOID": lambda x, a, b: (a * x + b).clamp(0, 1),
    "SOFTPLUS": lambda x, a, b: a * F.softplus(b * x, threshold=float("inf")),
    "GELU_ERF": lambda x, a, b: F.gelu(x),
    "GELU_TANH": lambda x, a, b: F.gelu(x, approximate="tanh"),
}


def _floor_div(x: Tensor, y: Tensor) -> Tensor:
    return torch.div(x, y, rounding_mode="floor")


def _div(x: Tensor, y: Tensor) -> Tensor:
    return torch.div(x, y, rounding_mode=None if x.is_floating_point() else "trunc")


_ELEMENTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "SUM": torch.add,
    "PROD": torch.mul,
    "MAX": torch.maximum,
    "MIN": torch.minimum,
    "SUB": torch.sub,
    "DIV": _div,
    "POW": torch.pow,
    "FLOOR_DIV": _floor_div,
    "AND": torch.logical_and,
    "OR": torch.logical_or,
    "XOR": torch.logical_xor,
    "EQUAL": torch.eq,
    "GREATER": torch.gt,
    "LESS": torch.lt,
}
_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "EXP": torch.exp,
    "LOG": torch.log,
    "SQRT": torch.sqrt,
    "RECIP": torch.reciprocal,
    "ABS": torch.abs,
    "NEG": torch.neg,
    "SIN": torch.sin,
    "COS": torch.cos,
    "FLOOR": torch.floor,
    "CEIL": torch.ceil,
    "ROUND": torch.round,
    "SIGN": torch.sign,
    "ERF": torch.erf,
    "NOT": torch.logical_not,
    "ISNAN": torch.isnan,
}
_REDUCE: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "SUM": lambda x, axes, keep: x.sum(axes, keepdim=keep, dtype=x.dtype),
    "AVG": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "MAX": lambda x, axes, keep: x.amax(axes, keepdim=keep),
    "MIN": lambda x, axes, keep: x.amin(axes, keepdim=keep),
}


def _has(inputs: Inputs, index: int) -> bool:
    return len(inputs) > index and inputs[index].numel() > 0


def _numbers(layer: NetworkLayer, field: str) -> list[int]:
    value = layer.attributes[field]
    if not isinstance(value, tuple):
        raise UnsupportedOperator(f"layer {layer.name} ({layer.kind}): {field} is not known, found {value!r}")
    return [int(number) for number in value]


def _number(layer: NetworkLayer, field: str) -> int:
    value = layer.attributes[field]
    assert isinstance(value, (int, float)), (layer, field)
    return int(value)


def _real(layer: NetworkLayer, field: str) -> float:
    value = layer.attributes[field]
    assert isinstance(value, (int, float)), (layer, field)
    return float(value)


def _axes(mask: int) -> list[int]:
    return [axis for axis in range(mask.bit_length()) if mask >> axis & 1]


def _refuse(layer: NetworkLayer, field: str) -> UnsupportedOperator:
    return UnsupportedOperator(
        f"layer {layer.name} ({layer.kind}) with {field} {layer.attributes.get(field)} has no evaluation on a CPU; "
        "run the engine on a GPU, or choose another form of the operator."
    )


def _padded(layer: NetworkLayer, x: Tensor, value: float) -> Tensor:
    before, after = _numbers(layer, "pre_padding"), _numbers(layer, "post_padding")
    if layer.attributes["padding_mode"] not in ("EXPLICIT_ROUND_DOWN", "EXPLICIT_ROUND_UP"):
        raise _refuse(layer, "padding_mode")
    pads = [number for pair in reversed(list(zip(before, after, strict=True))) for number in pair]
    return F.pad(x, pads, value=value) if any(pads) else x


def _convolution(layer: NetworkLayer, inputs: Inputs, own: Own) -> Tensor:
    x, groups = inputs[0], _number(layer, "num_groups")
    kernel = inputs[1] if _has(inputs, 1) else own["kernel"]
    if kernel.dim() == 1:
        size = _numbers(layer, "kernel_size_nd")
        kernel = kernel.reshape(_number(layer, "num_output_maps"), x.shape[1] // groups, *size)
    bias = inputs[2] if _has(inputs, 2) else own.get("bias")
    stride, dilation = _numbers(layer, "stride_nd"), _numbers(layer, "dilation_nd")
    padding, after = _numbers(layer, "pre_padding"), _numbers(layer, "post_padding")
    if padding != after:
        x, padding = _padded(layer, x, 0.0), [0] * len(stride)
    # Convolutions of fixed rank: TensorRT's are 2-D here.
    return F.conv2d(x, kernel, bias, stride, padding, dilation, groups)


def _pooling(layer: NetworkLayer, inputs: Inputs, own: Own) -> Tensor:
    x, window, stride = inputs[0], _numbers(layer, "window_size_nd"), _numbers(layer, "stride_nd")
    ceil = layer.attributes["padding_mode"] == "EXPLICIT_ROUND_UP"
    if layer.attributes["type"] == "MAX":
        padded = _padded(layer, x, float("-inf"))
        return F.max_pool2d(padded, window, stride, ceil_mode=ceil)
    if layer.attributes["type"] != "AVERAGE":
        raise _refuse(layer, "type")
    summed = F.avg_pool2d(_padded(layer, x, 0.0), window, stride, ceil_mode=ceil)
    if not layer.attributes["average_count_excludes_padding"] or not any(
        _numbers(layer, "pre_padding") + _numbers(layer, "post_padding")
    ):
        return summed
    share = F.avg_pool2d(_padded(layer, torch.ones_like(x), 0.0), window, stride, ceil_mode=ceil)
    return summed / share


def _shuffle(layer: NetworkLayer, inputs: Inputs, own: Own) -> Tensor:
    x = inputs[0]
    x = x.permute(_numbers(layer, "first_transpose")[: x.dim()])
    if len(inputs) > 1:
        shape = [int(size) for size in inputs[1]]
    else:
        wanted = layer.attributes["reshape_dims"]
        shape = [int(size) for size in wanted] if isinstance(wanted, tuple) else list(x.shape)
    if layer.attributes["zero_is_placeholder"]:
        shape = [x.shape[axis] if size == 0 else size for axis, size in enumerate(shape)]
    x = x.reshape(shape)
    return x.permute(_numbers(layer, "second_transpose")[: x.dim()])


def _slice(layer: NetworkLayer, inputs: Inputs, own: Own) -> Tensor:
    x = inputs[0]

    def given(index: int, field: str) -> list[int]:
        return [int(value) for value in inputs[index]] if _has(inputs, index) else _numbers(layer, field)

    start, count, stride = given(1, "start"), given(2, "shape"), given(3, "stride")
    chosen = inputs[5].tolist() if _has(inputs, 5) else layer.attributes.get("axes")
    axes = (
        [int(axis) % x.dim() for axis in chosen] if isinstance(chosen, (list, tuple)) else [*range(x.dim())]
    )
    mode = layer.attributes["mode"]
    shape = list(x.shape)
    for axis, length in zip(axes, count, strict=True):
        shape[axis] = length
    outside = torch.zeros(shape, dtype=torch.bool)
    for axis, first, length, step in zip(axes, start, count, stride, strict=True):
        size = x.shape[axis]
        index = torch.arange(length) * step + first
        beyond = (index < 0) | (index >= size)
        if mode == "WRAP":
            index = index % size
        elif mode in ("CLAMP", "FILL"):
            index = index.clamp(0, size - 1)
        elif beyond.any():
            raise _refuse(layer, "mode")
        if mode == "FILL":
            view = [1] * x.dim()
            view[axis] = length
            outside |= beyond.reshape(view)
        x = x.index_select(axis, index)
    if outside.any():
        fill = inputs[4].to(x.dtype).reshape(()) if _has(inputs, 4) else torch.zeros((), dtype=x.dtype)
        x = torch.where(outside, fill, x)
    return x


def _gather(layer: NetworkLayer, inputs: Inputs, own: Own) -> Tensor:
    x, index, axis = inputs[0], inputs[1].long(), _number(layer, "axis")
    if layer.attributes["mode"] == "ELEMENT":
        return x.gather(axis, index)
    if _number(layer, "num_elementwise_dims"):
        raise _refuse(layer, "num_elementwise_dims")
    if layer.attributes["mode"] == "ND":
        return x[tuple(index.unbind(-1))]
    if layer.attributes["mode"] != "DEFAULT":
        raise _refuse(layer, "mode")
    taken = x.index_select(axis, index.flatten() % x.shape[axis])
    return taken.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def _scatter(layer: NetworkLayer, inputs: Inputs, own: Own) -> Tensor:
    x, index, updates = inputs[0].clone(), inputs[1].long(), inputs[2]
    if layer.attributes["mode"] == "ELEMENT":
        return x.scatter(_number(layer, "axis"), index, updates)
    x[tuple(index.unbind(-1))] = updates
    return x


def _matrix_multiply(layer: NetworkLayer, inputs: Inputs, own: Own) -> Tensor:
    sides = []
    for x, field in zip(inputs, ("op0", "op1"), strict=True):
        sides.append(x.transpose(-1, -2) if layer.attributes[field] == "TRANSPOSE" else x)
    return sides[0] @ sides[1]


def _top_k(layer: NetworkLayer, inputs: Inputs, own: Own) -> tuple[Tensor, ...]:
    count = int(inputs[1]) if _has(inputs, 1) else _number(layer, "k")
    (axis,) = _axes(_number(layer, "axes"))
    # A stable sort: of equal values the earlier first. TensorRT promises no order of equal values.
    values, index = inputs[0].sort(dim=axis, descending=layer.attributes["op"] == "MAX", stable=True)
    return values.narrow(axis, 0, count), index.narrow(axis, 0, count).to(torch.int32)


def _resize(layer: NetworkLayer, inputs: Inputs, own: Own) -> Tensor:
    x = inputs[0]
    shape, scales = layer.attributes["shape"], layer.attributes["scales"]
    if _has(inputs, 1):
        size = [int(number) for number in inputs[1]]
    elif isinstance(shape, tuple) and shape:
        size = [int(number) for number in shape]
    else:
        assert isinstance(scales, tuple)
        size = [int(length * scale) for length, scale in zip(x.shape, scales, strict=True)]
    mode = layer.attributes.get("resize_mode", layer.attributes.get("interpolation_mode"))
    transformation = layer.attributes["coordinate_transformation"]
    if (
        mode == "NEAREST"
        and transformation == "ASYMMETRIC"
        and layer.attributes["nearest_rounding"] == "FLOOR"
    ):
        return F.interpolate(x, size=size[2:], mode="nearest")
    if mode == "NEAREST" and transformation == "HALF_PIXEL":
        return F.interpolate(x, size=size[2:], mode="nearest-exact")
    modes = {"LINEAR": "bilinear", "CUBIC": "bicubic"}
    if mode in modes and transformation in ("HALF_PIXEL", "ALIGN_CORNERS"):
        return F.interpolate(
            x, size=size[2:], mode=modes[str(mode)], align_corners=transformation == "ALIGN_CORNERS"
        )
    raise _refuse(layer, "coordinate_transformation")


def _per_axis(layer: NetworkLayer, scale: Tensor, dimensions: int) -> Tensor:
    if scale.numel() == 1:
        return scale.reshape(())
    view = [1] * dimensions
    view[_number(layer, "axis")] = -1
    return scale.reshape(view)


def _quantize(layer: NetworkLayer, inputs: Inputs, own: Own) -> Tensor:
    scale = _per_axis(layer, inputs[1], inputs[0].dim())
    return torch.round(inputs[0] / scale).clamp(*_INT8_RANGE).to(torch.int8)


def _dequantize(layer: NetworkLayer, inputs: Inputs, own: Own) -> Tensor:
    return inputs[0].to(inputs[1].dtype) * _per_axis(layer, inputs[1], inputs[0].dim())


def _grid_sample(layer: NetworkLayer, inputs: Inputs, own: Own) -> Tensor:
    modes = {"LINEAR": "bilinear", "NEAREST": "nearest", "CUBIC": "bicubic"}
    paddings = {"CLAMP": "border", "FILL": "zeros", "REFLECT": "reflection"}
    return F.grid_sample(
        inputs[0],
        inputs[1],
        mode=modes[str(layer.attributes["interpolation_mode"])],
        padding_mode=paddings[str(layer.attributes["sample_mode"])],
        align_corners=bool(layer.attributes["align_corners"]),
    )


def _scale(layer: NetworkLayer, inputs: Inputs, own: Own) -> Tensor:
    x = inputs[0]
    view = [1] * x.dim()
    if layer.attributes["mode"] == "CHANNEL":
        view[_number(layer, "channel_axis")] = -1
    elif layer.attributes["mode"] != "UNIFORM":
        raise _refuse(layer, "mode")
    result = x
    if "scale" in own:
        result = result * own["scale"].reshape(view)
    if "shift" in own:
        result = result + own["shift"].reshape(view)
    return result ** own["power"].reshape(view) if "power" in own else result


def _padding(layer: NetworkLayer, inputs: Inputs, own: Own) -> Tensor:
    before, after = _numbers(layer, "pre_padding_nd"), _numbers(layer, "post_padding_nd")
    return F.pad(inputs[0], [n for pair in reversed(list(zip(before, after, strict=True))) for n in pair])


def _squeeze(layer: NetworkLayer, inputs: Inputs, own: Own) -> Tensor:
    gone = {int(axis) % inputs[0].dim() for axis in inputs[1].flatten()}
    return inputs[0].reshape([size for axis, size in enumerate(inputs[0].shape) if axis not in gone])


def _unsqueeze(layer: NetworkLayer, inputs: Inputs, own: Own) -> Tensor:
    x, axes = inputs[0], inputs[1].flatten()
    rank = x.dim() + len(axes)
    new = {int(axis) % rank for axis in axes}
    sizes = iter(x.shape)
    return x.reshape([1 if axis in new else next(sizes) for axis in range(rank)])


COMPUTE: dict[str, Compute] = {
    "CONVOLUTION": _convolution,
    "POOLING": _pooling,
    "SHUFFLE": _shuffle,
    "SLICE": _slice,
    "GATHER": _gather,
    "SCATTER": _scatter,
    "MATRIX_MULTIPLY": _matrix_multiply,
    "TOPK": _top_k,
    "RESIZE": _resize,
    "QUANTIZE": _quantize,
    "DEQUANTIZE": _dequantize,
    "GRID_SAMPLE": _grid_sample,
    "SCALE": _scale,
    "PADDING": _padding,
    "SQUEEZE": _squeeze,
    "UNSQUEEZE": _unsqueeze,
    "CONSTANT": lambda layer, x, own: own["weights"].reshape(_numbers(layer, "shape")),
    "ACTIVATION": lambda layer, x, own: _ACTIVATIONS[str(layer.attributes["type"])](
        x[0], _real(layer, "alpha"), _real(layer, "beta")
    ),
    "ELEMENTWISE": lambda layer, x, own: _ELEMENTWISE[str(layer.attributes["op"])](x[0], x[1]),
    "UNARY": lambda layer, x, own: _UNARY[str(layer.attributes["op"])](x[0]),
    "REDUCE": lambda layer, x, own: _REDUCE[str(layer.attributes["op"])](
        x[0], _axes(_number(layer, "axes")), bool(layer.attributes["keep_dims"])
    ),
    "SOFTMAX": lambda layer, x, own: x[0].softmax(_axes(_number(layer, "axes"))[0]),
    "CONCATENATION": lambda layer, x, own: torch.cat(list(x), _number(layer, "axis")),
    "SELECT": lambda layer, x, own: torch.where(x[0], x[1], x[2]),
    "CAST": lambda layer, x, own: x[0].to(DTYPES[str(layer.attributes["to_type"])]),
    "IDENTITY": lambda layer, x, own: x[0],
    "SHAPE": lambda layer, x, own: torch.tensor(x[0].shape),
}
