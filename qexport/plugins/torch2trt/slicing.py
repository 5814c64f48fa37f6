"""Parts of a tensor: indexing, `select`, `narrow`, `split`, `chunk`, `unbind`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qexport.errors import UnsupportedOperator
from qexport.plugins.torch2trt.data_types import live, reshaped
from qexport.plugins.torch2trt.dotted import forms
from qexport.plugins.torch2trt.interface import TRT_TENSOR, ConversionContext, argument, give
from qexport.plugins.torch2trt.registration import Convert


def index(context: ConversionContext) -> None:
    """Take `x[...]` with numbers, slices, None and an ellipsis; or with one tensor of indices."""
    x, key = argument(context, 0, "input"), argument(context, 1, "index")
    keys = list(key) if isinstance(key, tuple) else [key]
    positions = [place for place, part in enumerate(keys) if isinstance(part, (torch.Tensor, list))]
    if positions:
        _index_by_tensor(context, x, keys, positions)
        return
    axis, ranges = 0, []
    for part in _spelled_out(keys, x.dim()):
        if part is None:
            continue
        size = x.shape[axis]
        if isinstance(part, slice):
            first, end, step = part.indices(size)
            ranges.append((first, max(0, -(-(end - first) // step)), step))
        else:
            ranges.append((int(part) % size, 1, 1))
        axis += 1
    taken = part_of(context, live(context, x), ranges)
    give(context, reshaped(context, taken, context.method_return.shape))


def select(context: ConversionContext) -> None:
    """Take one position of an axis, which goes away."""
    x, axis = (
        argument(context, 0, "input"),
        int(argument(context, 1, "dim")) % argument(context, 0, "input").dim(),
    )
    ranges = [(0, size, 1) for size in x.shape]
    ranges[axis] = (int(argument(context, 2, "index")) % x.shape[axis], 1, 1)
    taken = part_of(context, live(context, x), ranges)
    give(context, reshaped(context, taken, context.method_return.shape))


def narrow(context: ConversionContext) -> None:
    """Take a range of one axis."""
    x, axis = (
        argument(context, 0, "input"),
        int(argument(context, 1, "dim")) % argument(context, 0, "input").dim(),
    )
    ranges = [(0, size, 1) for size in x.shape]
    ranges[axis] = (
        int(argument(context, 2, "start")) % x.shape[axis],
        int(argument(context, 3, "length")),
        1,
    )
    give(context, part_of(context, live(context, x), ranges))


def split(context: ConversionContext) -> None:
    """Take an axis apart into the pieces that torch made, those of `unbind` without the axis."""
    x = argument(context, 0, "input")
    pieces: Sequence[torch.Tensor] = context.method_return
    bound = pieces[0].dim() < x.dim()
    axis = int(argument(context, 1 if bound else 2, "dim", 0)) % x.dim()
    tensor, start, results = live(context, x), 0, []
    for piece in pieces:
        length = 1 if bound else piece.shape[axis]
        ranges = [(0, size, 1) for size in x.shape]
        ranges[axis] = (start, length, 1)
        results.append(reshaped(context, part_of(context, tensor, ranges), piece.shape))
        start += length
    give(context, *results)


def part_of(context: ConversionContext, tensor: Any, ranges: Sequence[tuple[int, int, int]]) -> Any:
    """Return a part of a TensorRT tensor; the tensor itself where that is all of it.

    Args:
        context: of the call.
        tensor: of any rank.
        ranges: start, length and step of each axis.
    """
    start, shape, step = (tuple(numbers) for numbers in zip(*ranges, strict=True))
    if shape == tuple(tensor.shape) and not any(start):
        return tensor
    return context.network.add_slice(tensor, start, shape, step).get_output(0)


def _spelled_out(keys: list[Any], dimensions: int) -> list[Any]:
    """Return the keys with an entry for every axis."""
    if any(isinstance(part, bool) for part in keys):
        raise UnsupportedOperator("indexing with a bool: use unsqueeze.")
    missing = dimensions - sum(part is not None and part is not Ellipsis for part in keys)
    if not any(part is Ellipsis for part in keys):
        keys = [*keys, Ellipsis]
    place = next(position for position, part in enumerate(keys) if part is Ellipsis)
    return [*keys[:place], *[slice(None)] * missing, *keys[place + 1 :]]


def _index_by_tensor(
    context: ConversionContext, x: torch.Tensor, keys: list[Any], positions: list[int]
) -> None:
    wanted = torch.as_tensor(keys[positions[0]])
    others = [part for place, part in enumerate(keys) if place not in positions]
    plain = all(part is Ellipsis or part == slice(None) for part in others)
    if len(positions) > 1 or wanted.dtype == torch.bool or not plain:
        raise UnsupportedOperator(
            "indexing with a mask, with several tensors, or with a tensor beside numbers: its result has no fixed "
            "shape or no single layer. Use torch.where, torch.gather or index_select."
        )
    axis = positions[0] if Ellipsis not in keys[: positions[0]] else x.dim() - (len(keys) - positions[0])
    if not hasattr(wanted, TRT_TENSOR):
        wanted = wanted % x.shape[axis]  # constants may count from the end
    layer = context.network.add_gather(live(context, x), live(context, wanted), axis)
    give(context, layer.get_output(0))


CONVERTERS: Mapping[str, Convert] = {
    "torch.Tensor.__getitem__": index,
    **dict.fromkeys(forms("select"), select),
    **dict.fromkeys(forms("narrow"), narrow),
    **dict.fromkeys(forms("split", "split_with_sizes", "tensor_split", "chunk", "unbind"), split),
}
"""By dotted name of the torch function."""
