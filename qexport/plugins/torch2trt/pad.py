"""Padding, and cropping where it is negative: constant, reflected, repeated at the edge, circular."""

from __future__ import annotations

from typing import Any

import torch

from qexport.plugins.torch2trt.data_types import live, operand
from qexport.plugins.torch2trt.interface import ConversionContext, argument, constant, give
from qexport.runtimes.tensorrt_library import load_library

FUNCTIONS = ("torch.nn.functional.pad",)


def convert(context: ConversionContext) -> None:
    """Add a slice that reaches beyond the edge; nothing where the padding is zero."""
    x, pads = argument(context, 0, "input"), [int(pad) for pad in argument(context, 1, "pad")]
    mode, value = argument(context, 2, "mode", "constant"), argument(context, 3, "value", 0.0)
    axes = {x.dim() - 1 - place // 2: (pads[place], pads[place + 1]) for place in range(0, len(pads), 2)}
    tensor = live(context, x)
    if not any(pads):
        give(context, tensor)
    elif mode == "constant":
        give(context, _filled(context, tensor, x, axes, value or 0))
    else:
        for axis, sides in axes.items():
            if any(sides):
                source = constant(context, _source(x.shape[axis], *sides, mode).numpy())
                tensor = context.network.add_gather(tensor, source, axis).get_output(0)
        give(context, tensor)


def _filled(
    context: ConversionContext, tensor: Any, x: torch.Tensor, axes: dict[int, tuple[int, int]], value: float
) -> Any:
    trt = load_library().trt
    start = tuple(-axes.get(axis, (0, 0))[0] for axis in range(x.dim()))
    layer = context.network.add_slice(tensor, start, tuple(context.method_return.shape), (1,) * x.dim())
    # TensorRT before 8.5 calls it SliceMode.
    layer.mode = (trt.SampleMode if hasattr(trt, "SampleMode") else trt.SliceMode).FILL
    layer.set_input(4, operand(context, value, x.dtype, 0))
    return layer.get_output(0)


def _source(size: int, before: int, after: int, mode: str) -> torch.Tensor:
    """Return for each position of the padded axis the one that it repeats."""
    place = torch.arange(-before, size + after)
    if mode == "replicate":
        place = place.clamp(0, size - 1)
    elif mode == "circular":
        place = place % size
    else:  # reflect; torch has no other
        turn = 2 * (size - 1)
        place = turn // 2 - (place % turn - turn // 2).abs()
    return place.to(torch.int32)
