"""Operators that move or select values: of int8 codes and of real values alike, so that a scale stays what it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from qexport.errors import UnsupportedOperator
from qexport.plugins.executorch.held import Held, as_map, as_plain
from qexport.plugins.executorch.lowering import Lowering
from qexport.plugins.executorch.steps import Value
from qexport.quantization.graph import argument_node, site_of

Ask = Callable[[Node], Held]
_TO_CHANNELS_LAST = (0, 2, 3, 1)
_MAP_AXES = (0, 3, 1, 2)
"""Where each axis of (N, C, H, W) stands in a map that is held channels last."""
_END = 2**31 - 1


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(int(size) for size in node.meta["val"].shape)


def view(lowering: Lowering, node: Node, ask: Ask) -> Held:
    """Write another shape of the same elements."""
    source, shape = ask(argument_node(node)), _shape(node)
    if source.layout == "map":
        batch, channels, height, width = source.shape
        if shape == (batch, channels * height * width):
            flat = _reshape(lowering, node, source.value, shape)
            one = height * width == 1
            return Held.plain(flat) if one else Held(flat, shape, "flat map", (channels, height, width))
    return Held.plain(_reshape(lowering, node, as_plain(lowering.xnnpack, source), shape))


def _reshape(lowering: Lowering, node: Node, value: Value, shape: Sequence[int]) -> Value:
    if _in_xnnpack(lowering, node, value):
        return lowering.xnnpack.reshape(value, shape)
    return lowering.kernels.reshape(value, shape)


def _in_xnnpack(lowering: Lowering, node: Node, value: Value) -> bool:
    """Tell whether XNNPACK moves a value: it knows real values and codes, no ranks and no truth values."""
    return lowering.in_xnnpack(node) and value.dtype in ("float32", "int8")


def permute(lowering: Lowering, node: Node, ask: Ask) -> Held:
    """Write another order of axes; a map is held channels last already."""
    source = ask(argument_node(node))
    given: Any = node.args[1]
    order = tuple(int(axis) % len(source.shape) for axis in given)
    if source.layout == "map" and order == _TO_CHANNELS_LAST:
        return Held.plain(source.value)
    if source.layout == "plain" and order == _MAP_AXES:
        return Held.map(source.value)
    plain = as_plain(lowering.xnnpack, source)
    if _in_xnnpack(lowering, node, plain):
        return Held.plain(lowering.xnnpack.transpose(plain, order))
    return Held.plain(lowering.kernels.transpose(plain, order))


def unsqueeze(lowering: Lowering, node: Node, ask: Ask) -> Held:
    """Write an axis of length 1."""
    plain = as_plain(lowering.xnnpack, ask(argument_node(node)))
    return Held.plain(_reshape(lowering, node, plain, _shape(node)))


def same(lowering: Lowering, node: Node, ask: Ask) -> Held:
    """Write nothing: the values are those of the input."""
    del lowering
    return ask(argument_node(node))


def cut(lowering: Lowering, node: Node, ask: Ask) -> Held:
    """Write a range of an axis."""
    source = ask(argument_node(node))
    axis, start, end, step = (_integer(node, place, default) for place, default in _SLICE)
    axis %= len(source.shape)
    held = Held.map if source.layout == "map" else Held.plain
    value = source.value if source.layout == "map" else as_plain(lowering.xnnpack, source)
    stored = _MAP_AXES[axis] if source.layout == "map" else axis
    if not _in_xnnpack(lowering, node, value):
        return held(lowering.kernels.slice(value, [start], [end], [stored], [step]))
    first, last, _ = slice(start, end).indices(value.shape[stored])
    return held(lowering.xnnpack.every(lowering.xnnpack.cut(value, stored, first, last), stored, step))


_SLICE = ((1, 0), (2, 0), (3, _END), (4, 1))


def _integer(node: Node, place: int, default: int) -> int:
    value = node.args[place] if len(node.args) > place else default
    return default if value is None else min(int(str(value)), _END)


def select(lowering: Lowering, node: Node, ask: Ask) -> Held:
    """Write one entry of an axis, which is dropped."""
    plain = as_plain(lowering.xnnpack, ask(argument_node(node)))
    return Held.plain(lowering.kernels.select(plain, _integer(node, 1, 0), _integer(node, 2, 0)))


def concatenate(lowering: Lowering, node: Node, ask: Ask) -> Held:
    """Write tensors one after another."""
    sources = [ask(source) for source in _nodes(node.args[0])]
    axis = _integer(node, 1, 0)
    maps = all(source.layout == "map" for source in sources)
    values = [source.value if maps else as_plain(lowering.xnnpack, source) for source in sources]
    axis %= len(sources[0].shape)
    held, stored = (Held.map, _MAP_AXES[axis]) if maps else (Held.plain, axis)
    if _in_xnnpack(lowering, node, values[0]):
        return held(lowering.xnnpack.concatenate(values, stored))
    return held(lowering.kernels.concat(values, stored))


def stack(lowering: Lowering, node: Node, ask: Ask) -> Held:
    """Write tensors side by side along a new axis."""
    plain = [as_plain(lowering.xnnpack, ask(source)) for source in _nodes(node.args[0])]
    return Held.plain(lowering.kernels.stack(plain, _integer(node, 1, 0)))


def _nodes(argument: object) -> Sequence[Node]:
    assert isinstance(argument, Sequence)
    return [item for item in argument if isinstance(item, Node)]


def index_select(lowering: Lowering, node: Node, ask: Ask) -> Held:
    """Write entries of an axis."""
    source = as_plain(lowering.xnnpack, ask(argument_node(node)))
    index = as_plain(lowering.xnnpack, ask(argument_node(node, 2)))
    return Held.plain(lowering.kernels.gather(source, index, axis=_integer(node, 1, 0)))


def max_pool2d(lowering: Lowering, node: Node, ask: Ask) -> Held:
    """Write the largest of each window; beyond the border is less than everything."""
    source = ask(argument_node(node))
    window, stride, padding = (_pair(node, place, default) for place, default in ((1, 1), (2, 0), (3, 0)))
    ceil = bool(node.args[5]) if len(node.args) > 5 else False
    if _pair(node, 4, 1) != (1, 1) or ceil:
        raise UnsupportedOperator(
            f"max pool {site_of(node).path} is dilated or rounds its size up: not written for ExecuTorch."
        )
    value = as_map(lowering.xnnpack, source)
    return Held.map(lowering.xnnpack.max_pool(value, window, stride if any(stride) else window, padding))


def upsample_nearest2d(lowering: Lowering, node: Node, ask: Ask) -> Held:
    """Write the nearest of each position, rounded down as torch rounds."""
    value = as_map(lowering.xnnpack, ask(argument_node(node)))
    for axis, size in ((2, _shape(node)[3]), (1, _shape(node)[2])):
        value = _upsampled(lowering, value, axis, size)
    return Held.map(value)


def _upsampled(lowering: Lowering, value: Value, axis: int, size: int) -> Value:
    """Return an axis in another size: every entry repeated, and of those the runs that torch takes."""
    length = value.shape[axis]
    found = torch.nn.functional.interpolate(torch.arange(length, dtype=torch.float32)[None, None], size=size)
    index = [int(place) for place in found[0, 0]]
    times = math.ceil(size / length)
    runs: list[list[int]] = []
    for source in index:
        if runs and runs[-1][1] // times == source:
            runs[-1][1] += 1
        else:
            runs.append([source * times, source * times + 1])
    repeated = lowering.xnnpack.repeated(value, axis, times)
    parts = [lowering.xnnpack.cut(repeated, axis, first, last) for first, last in runs]
    return lowering.xnnpack.concatenate(parts, axis)


def pad(lowering: Lowering, node: Node) -> Held:
    """Write a larger tensor, with one number beyond.

    Raises:
        UnsupportedOperator: what lies beyond is taken from the tensor, or the result is smaller.
    """
    source = as_plain(lowering.xnnpack, lowering.real(argument_node(node)))
    given: Any = node.args
    if (len(given) > 2 and given[2] != "constant") or min(given[1]) < 0:
        raise UnsupportedOperator(
            f"pad of {list(given[1])} in {site_of(node).path}: ExecuTorch puts numbers around a tensor, nothing else."
        )
    number = float(given[3]) if len(given) > 3 and given[3] is not None else 0.0
    if not any(given[1]):
        return Held.plain(source)
    return Held.plain(
        lowering.kernels.call(torch.constant_pad_nd, source, [int(count) for count in given[1]], number)
    )


def relu(lowering: Lowering, node: Node, ask: Ask) -> Held:
    """Write values, at least zero."""
    source = ask(argument_node(node))
    return source.with_value(lowering.xnnpack.clamp(source.value, (0.0, None)))


def _pair(node: Node, place: int, default: int) -> tuple[int, int]:
    value: Any = node.args[place] if len(node.args) > place else default
    sizes = [int(number) for number in value] if isinstance(value, Sequence) else [int(value)]
    return (sizes[0], sizes[-1]) if sizes else (0, 0)
