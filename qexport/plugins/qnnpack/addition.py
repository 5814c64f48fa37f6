"""Sums of codes: QNNPACK's kernel or PyTorch's general one.

What lies exactly between two steps is where runtimes part, and since scales have few digits there are such sums by the
hundred: QNNPACK rounds them away from zero, PyTorch's kernel to even, ONNX Runtime and XNNPACK by the last bits of
their factors. No choice agrees with both of those everywhere, so this one was made by measurement: QNNPACK's kernel for
sums alone, PyTorch's for those with a ReLU. Four forms were tried on 8 images of the blood cell detector (either kernel
for all, PyTorch's with scales over the result's, this one); values that differ, per million of all convolutions,
linears and sums, from ONNX Runtime and from TFLite: 11.6 and 6.5, 10.8 and 18.5, 11.0 and 18.3, 9.8 and 5.8. On 24
other images, by eights, this one has 8.4 to 8.9 and 5.5 to 5.7; QNNPACK's alone 9.6 to 10.5 from ONNX Runtime,
PyTorch's alone 9.6 to 10.6 from it and 15.7 to 16.9 from TFLite. That is one detector with one table of scales: which
sums lie halfway depends on the scales, so another may come out otherwise. None is more than a step from the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from qexport.plugins.qnnpack.parts import Parts
from qexport.runtimes.qnnpack_library import ZERO_POINT

_RATIO = (2.0**-14, 2.0**8)
"""Between which QNNPACK takes the scale of a summand over that of the result."""


def write_sum(
    parts: Parts,
    owner: str,
    codes: Sequence[Node],
    *,
    shapes: Sequence[tuple[int, ...]],
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
        shapes: theirs.
        scales: theirs.
        scale: of the result.
        shape: of the result.
        relu: whether negative sums become zero.

    Returns:
        The codes of the result.
    """
    low, high = _RATIO
    if not relu and set(shapes) == {shape} and all(low <= own / scale < high for own in scales):
        return parts.call(owner, torch.ops.quantized.add.default, (*codes, scale, ZERO_POINT))
    result = parts.call(
        owner,
        torch.ops.aten._empty_affine_quantized.default,
        (list(shape),),
        scale=scale,
        zero_point=ZERO_POINT,
        dtype=torch.quint8,
        memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format,
    )
    kernel = torch.ops.quantized.add_relu_out if relu else torch.ops.quantized.add_out
    return parts.call(owner, kernel.default, (*codes, result))
