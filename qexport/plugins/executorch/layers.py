"""Convolutions and linear layers, in integers and in float."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qexport.errors import UnsupportedOperator
from qexport.plugins.executorch.held import Held, as_map, as_plain
from qexport.plugins.executorch.lowering import Lowering
from qexport.plugins.executorch.steps import Value
from qexport.plugins.executorch.xnnpack import Limits
from qexport.quantization.graph import argument_node, scale_of, site_of


def integer_convolution(lowering: Lowering, node: Node, limits: Limits | None, scale: float) -> Held | None:
    """Write a convolution of int8 codes; None where its weight is not quantized."""
    found = _integers(lowering, node)
    if found is None:
        return None
    source, codes, scales, step = found
    value = as_map(lowering.xnnpack, source)
    weights = _integer_weights(lowering, node, _filters(node, codes, source), scales, step)
    return _convolution(lowering, node, value, weights, limits, scale)


def real_convolution(lowering: Lowering, node: Node) -> Held:
    """Write a convolution in float32."""
    source = lowering.real(argument_node(node))
    weight = lowering.values(node.args[1])
    weights = _real_weights(lowering, node, _filters(node, weight, source))
    return _convolution(lowering, node, as_map(lowering.xnnpack, source), weights, None, None)


def integer_linear(lowering: Lowering, node: Node, limits: Limits | None, scale: float) -> Held | None:
    """Write a linear layer of int8 codes; None where its weight is not quantized."""
    found = _integers(lowering, node)
    if found is None:
        return None
    source, codes, scales, step = found
    value, columns = _rows(lowering, source)
    weights = _integer_weights(lowering, node, _ordered(codes, columns), scales, step)
    return Held.plain(lowering.xnnpack.linear(value, weights, scale=scale, limits=limits))


def real_linear(lowering: Lowering, node: Node) -> Held:
    """Write a linear layer in float32."""
    value, columns = _rows(lowering, lowering.real(argument_node(node)))
    weights = _real_weights(lowering, node, _ordered(lowering.values(node.args[1]), columns))
    return Held.plain(lowering.xnnpack.linear(value, weights))


def bias_codes(bias: Tensor, scales: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """Return a bias as int32 and its steps: scale of the input times scale of the channel, as the reference's grid."""
    steps = torch.tensor(step, dtype=torch.float32) * scales
    return torch.round(bias.double() / steps.double()).to(torch.int32), steps


def _integers(lowering: Lowering, node: Node) -> tuple[Held, Tensor, Tensor, float] | None:
    """Return the input, the weight's codes and scales, and the input's scale."""
    quantized = lowering.weight(argument_node(node, 1))
    quantizer = lowering.quantizer_behind(node.args[0])
    if quantized is None or quantizer is None:
        return None
    source = lowering.codes(quantizer)
    lowering.go_to(node)
    return source, *quantized, scale_of(quantizer)


def _bias(lowering: Lowering, node: Node, channels: int) -> Tensor:
    if len(node.args) < 3 or node.args[2] is None:
        return torch.zeros(channels)
    return lowering.constant(node.args[2])


def _integer_weights(
    lowering: Lowering, node: Node, weight: Tensor, scales: Tensor, step: float
) -> list[Value]:
    bias, steps = bias_codes(_bias(lowering, node, len(scales)), scales, step)
    path = site_of(node).path
    return [
        lowering.store(weight, "weight", path, tuple(weight.shape)),  # one for all calls of the module
        lowering.steps.constant(bias),
        lowering.store(scales, "scales", path),
        lowering.steps.constant(steps),
    ]


def _real_weights(lowering: Lowering, node: Node, weight: Tensor) -> list[Value]:
    path = site_of(node).path
    bias = _bias(lowering, node, node.meta["val"].shape[1 if weight.dim() == 4 else -1])
    return [
        lowering.store(weight, "weight", path, tuple(weight.shape)),
        lowering.store(bias.to(torch.float32), "bias", path),
    ]


def _convolution(
    lowering: Lowering,
    node: Node,
    value: Value,
    weights: Sequence[Value],
    limits: Limits | None,
    scale: float | None,
) -> Held:
    kernel, dilation = weights[0].shape[1:3], _pair(node, 5, 1)
    reach = tuple((size - 1) * step + 1 for size, step in zip(kernel, dilation, strict=True))
    made = lowering.xnnpack.convolution(
        value,
        weights,
        stride=_pair(node, 3, 1),
        padding=_padding(node, reach),
        dilation=dilation,
        groups=_groups(node),
        channels=int(node.meta["val"].shape[1]),
        scale=scale,
        limits=limits,
    )
    return Held.map(made)


def _padding(node: Node, reach: Sequence[int]) -> tuple[int, int]:
    """Return rows and columns on each side.

    Raises:
        UnsupportedOperator: `same` with a window of even reach, which pads one side more.
    """
    if len(node.args) > 4 and isinstance(node.args[4], str):
        if node.args[4] == "valid":
            return (0, 0)
        if all(size % 2 for size in reach):
            return (reach[0] // 2, reach[1] // 2)
        raise UnsupportedOperator(
            f"convolution {site_of(node).path} pads one side more than the other. Pad with numbers in the model."
        )
    return _pair(node, 4, 0)


def _pair(node: Node, index: int, default: int) -> tuple[int, int]:
    value: Any = node.args[index] if len(node.args) > index else default
    sizes = [int(number) for number in value] if isinstance(value, Sequence) else [int(value)]
    return (sizes[0], sizes[-1])


def _groups(node: Node) -> int:
    return int(str(node.args[6])) if len(node.args) > 6 else 1


def _filters(node: Node, weight: Tensor, source: Held) -> Tensor:
    """Return the weight as the kernel takes it: (O, H, W, I), of one group a channel (1, H, W, O)."""
    groups = _groups(node)
    if groups > 1 and groups == source.shape[1]:
        return weight.permute(1, 2, 3, 0).contiguous()
    return weight.permute(0, 2, 3, 1).contiguous()


def _rows(lowering: Lowering, source: Held) -> tuple[Value, tuple[int, int, int] | None]:
    """Return the input, and of which map it was made where its columns stand channels last."""
    if source.layout == "flat map":
        return source.value, source.of
    return as_plain(lowering.xnnpack, source), None


def _ordered(weight: Tensor, of: tuple[int, int, int] | None) -> Tensor:
    """Return the weight with its columns in the order of the input's."""
    if of is None:
        return weight.contiguous()
    rows = weight.shape[0]
    return weight.reshape(rows, *of).permute(0, 2, 3, 1).reshape(rows, -1).contiguous()
