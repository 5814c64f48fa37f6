"""Convolutions and linear layers as PyTorch's modules: quantized ones with given scales, and those kept in float."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.nn import quantized as nnq
from torch.ao.nn.intrinsic import quantized as nniq
from torch.fx import Node

from qexport.errors import UnsupportedOperator
from qexport.plugins.qnnpack.names import where
from qexport.quantization.graph import op_name
from qexport.runtimes.qnnpack_library import ZERO_POINT, quiet

_Pair = tuple[int, int]
"""Rows and columns."""


def packed_weight(codes: Tensor, scales: Tensor, *, axis: int = 0) -> Tensor:
    """Return a weight as PyTorch's qint8 tensor per channel, laid out as QNNPACK keeps it.

    Modules of several calls that are given the same tensor then share its memory, and the file holds it once.

    Args:
        codes: int8.
        scales: (C,) float32.
        axis: of the output channels.
    """
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    with quiet():
        made = torch._make_per_channel_quantized_tensor(codes, scales.double(), zeros, axis)
    return made.contiguous(memory_format=torch.channels_last) if made.dim() == 4 else made


def quantized_module(
    node: Node, weight: Tensor, bias: Tensor | None, *, scale: float, relu: bool
) -> nn.Module:
    """Return a layer with integer weights.

    Args:
        node: the convolution or linear of the graph.
        weight: qint8 per channel.
        bias: float32, on the int32 grid of this call.
        scale: of what it computes.
        relu: whether an activation is fused.

    Raises:
        UnsupportedOperator: a padding that is not the same on both sides.
    """
    with quiet():
        module: Any
        if op_name(node) == "linear":
            kind: Any = nniq.LinearReLU if relu else nnq.Linear
            module = kind(weight.shape[1], weight.shape[0], bias is not None)
        else:
            kind = nniq.ConvReLU2d if relu else nnq.Conv2d
            module = kind(*_conv_arguments(node, weight), bias is not None)
        module.set_weight_bias(weight, bias)
    module.scale, module.zero_point = scale, ZERO_POINT
    made: nn.Module = module.eval()
    return made


def float_module(node: Node, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Return a layer in float32.

    Raises:
        UnsupportedOperator: a padding that is not the same on both sides.
    """
    module: nn.Module
    if op_name(node) == "linear":
        module = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    else:
        module = nn.Conv2d(*_conv_arguments(node, weight), bias=bias is not None)
    module.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    module.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
    return module.eval()


def _conv_arguments(node: Node, weight: Tensor) -> tuple[int, int, _Pair, _Pair, _Pair, _Pair, int]:
    given: list[Any] = [*node.args, *[None] * 7]
    stride, padding, dilation, groups = given[3] or [1, 1], given[4] or [0, 0], given[5] or [1, 1], given[6]
    groups = groups or 1
    kernel = _pair(list(weight.shape[2:]))
    dilation = _pair(dilation)
    if isinstance(padding, str):
        reach = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        if padding == "same" and any(length % 2 for length in reach):
            raise UnsupportedOperator(
                f"{node.target} in module {where(node)}: padding 'same' of a {kernel[0]}x{kernel[1]} kernel is more on "
                "one side than on the other. Pad in the model, or use a kernel of odd size."
            )
        padding = [length // 2 if padding == "same" else 0 for length in reach]
    return weight.shape[1] * groups, weight.shape[0], kernel, _pair(stride), _pair(padding), dilation, groups


def _pair(value: Any) -> _Pair:
    both = [value] if isinstance(value, int) else list(value)
    return int(both[0]), int(both[-1])
