"""Sums of codes, with halves rounded as ONNX Runtime rounds them.

What lies exactly between two steps is where runtimes part: scales have few digits, so there are such values by the
hundred. QNNPACK's own kernel rounds them up, others to even. PyTorch's general kernel rounds to even too, of
`(a * scale_a + b * scale_b) * (1 / scale)`, whose last factor is rounded itself and may push a half to either side.
Given the scales over that of the result, and 1 as the scale of the result, the same kernel computes
`a * (scale_a / scale) + b * (scale_b / scale)`: what ONNX Runtime computes. That takes copies under other scales, so it
is done where it makes a difference for some pair of codes, which is found out by trying all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from qexport.plugins.qnnpack.parts import Parts
from qexport.runtimes.qnnpack_library import ZERO_POINT, quiet

_CODES = 256


def write_sum(
    parts: Parts,
    owner: str,
    codes: Sequence[Node],
    *,
    scales: Sequence[float],
    scale: float,
    shape: tuple[int, ...],
    relu: bool,
) -> Node:
    """Write a sum.

    Args:
        parts: it becomes a part of.
        owner: the part.
        codes: of the two summands.
        scales: theirs.
        scale: of the result.
        shape: of the result.
        relu: whether negative sums become zero.

    Returns:
        The codes of the result.
    """
    kernel = torch.ops.quantized.add_relu_out if relu else torch.ops.quantized.add_out
    plain = rounds_alike(scales[0], scales[1], scale)
    if not plain:
        codes = [
            _under_scale(parts, owner, each, own / scale) for each, own in zip(codes, scales, strict=True)
        ]
    result = parts.call(
        owner,
        torch.ops.aten._empty_affine_quantized.default,
        (list(shape),),
        scale=scale if plain else 1.0,
        zero_point=ZERO_POINT,
        dtype=torch.quint8,
        memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format,
    )
    made = parts.call(owner, kernel.default, (*codes, result))
    return made if plain else _under_scale(parts, owner, made, scale)


def rounds_alike(first: float, second: float, scale: float) -> bool:
    """Tell whether the kernel gives the same for every two codes with scales as they are and over the result's."""
    codes = torch.arange(_CODES, dtype=torch.uint8)
    a, b = codes.repeat_interleave(_CODES), codes.repeat(_CODES)
    as_they_are = _sum(a, b, first, second, scale)
    return torch.equal(as_they_are, _sum(a, b, first / scale, second / scale, 1.0))


def _sum(a: Tensor, b: Tensor, first: float, second: float, scale: float) -> Tensor:
    with quiet():
        summands = [
            torch._make_per_tensor_quantized_tensor(codes, own, ZERO_POINT)
            for codes, own in ((a, first), (b, second))
        ]
        result = torch._empty_affine_quantized(
            a.shape, scale=scale, zero_point=ZERO_POINT, dtype=torch.quint8
        )
        made: Tensor = torch.ops.quantized.add_out(*summands, result)
    return made.int_repr()


def _under_scale(parts: Parts, owner: str, codes: Node, scale: float) -> Node:
    """Write the same codes with another scale."""
    plain = parts.call(owner, torch.ops.aten.int_repr.default, (codes,))
    kernel = torch.ops.aten._make_per_tensor_quantized_tensor.default
    return parts.call(owner, kernel, (plain, scale, ZERO_POINT))
