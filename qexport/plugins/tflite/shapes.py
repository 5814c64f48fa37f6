"""Operators that move or select values: of int8 codes and of real values alike, so that a scale stays what it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch.fx import Node

from qexport.errors import UnsupportedOperator
from qexport.plugins.tflite.held import Held, as_map, as_plain
from qexport.plugins.tflite.lowering import Lowering
from qexport.quantization.graph import argument_node, site_of

Ask = Callable[[Node], Held]
_TO_CHANNELS_LAST = (0, 2, 3, 1)
_MAP_AXES = (0, 3, 1, 2)
"""Where each axis of (N, C, H, W) stands in a map that is held channels last."""


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(int(size) for size in node.meta["val"].shape)


def view(lowering: Lowering, node: Node, ask: Ask) -> Held:
    """Write another shape of the same elements."""
    source, shape = ask(argument_node(node)), _shape(node)
    if source.layout == "map":
        batch, channels, height, width = source.shape
        if shape == (batch, channels * height * width):
            flat = lowering.build.reshape(source.value, shape)
            one = height * width == 1
            return Held.plain(flat) if one else Held(flat, shape, "flat map", (channels, height, width))
    return Held.plain(lowering.build.reshape(as_plain(lowering.build, source), shape))


def permute(lowering: Lowering, node: Node, ask: Ask) -> Held:
    """Write another order of axes; a map is held channels last already."""
    source = ask(argument_node(node))
    given: Any = node.args[1]
    order = tuple(int(axis) % len(source.shape) for axis in given)
    if source.layout == "map" and order == _TO_CHANNELS_LAST:
        return Held.plain(source.value)
    if source.layout == "plain" and order == _MAP_AXES:
        return Held.map(source.value)
    return Held.plain(lowering.build.transpose(as_plain(lowering.build, source), order))


def unsqueeze(lowering: Lowering, node: Node, ask: Ask) -> Held:
    """Write an axis of length 1."""
    source = ask(argument_node(node))
    return Held.plain(lowering.build.reshape(as_plain(lowering.build, source), _shape(node)))


def same(lowering: Lowering, node: Node, ask: Ask) -> Held:
    """Write nothing: the values are those of the input."""
    del lowering
    return ask(argument_node(node))


def cut(lowering: Lowering, node: Node, ask: Ask) -> Held:
    """Write a range of an axis."""
    source = ask(argument_node(node))
    axis, start, end, step = (_integer(node, place, default) for place, default in _SLICE)
    axis %= len(source.shape)
    if source.layout == "map":
        stored = _MAP_AXES[axis]
        return Held.map(lowering.build.slice(source.value, [start], [end], [stored], [step]))
    plain = as_plain(lowering.build, source)
    return Held.plain(lowering.build.slice(plain, [start], [end], [axis], [step]))


_SLICE = ((1, 0), (2, 0), (3, 2**31 - 1), (4, 1))


def _integer(node: Node, place: int, default: int) -> int:
    value = node.args[place] if len(node.args) > place else default
    return default if value is None else min(int(str(value)), 2**31 - 1)


def select(lowering: Lowering, node: Node, ask: Ask) -> Held:
    """Write one entry of an axis, which is dropped."""
    plain = as_plain(lowering.build, ask(argument_node(node)))
    return Held.plain(lowering.build.select(plain, _integer(node, 1, 0), _integer(node, 2, 0)))


def concatenate(lowering: Lowering, node: Node, ask: Ask) -> Held:
    """Write tensors one after another."""
    sources = [ask(source) for source in _nodes(node.args[0])]
    axis = _integer(node, 1, 0)
    maps = all(source.layout == "map" for source in sources)
    if maps:
        values = [source.value for source in sources]
        return Held.map(lowering.build.concat(values, _MAP_AXES[axis % 4]))
    return Held.plain(lowering.build.concat([as_plain(lowering.build, each) for each in sources], axis))


def stack(lowering: Lowering, node: Node, ask: Ask) -> Held:
    """Write tensors side by side along a new axis."""
    plain = [as_plain(lowering.build, ask(source)) for source in _nodes(node.args[0])]
    return Held.plain(lowering.build.stack(plain, _integer(node, 1, 0)))


def _nodes(argument: object) -> Sequence[Node]:
    assert isinstance(argument, Sequence)
    return [item for item in argument if isinstance(item, Node)]


def index_select(lowering: Lowering, node: Node, ask: Ask) -> Held:
    """Write entries of an axis."""
    source = as_plain(lowering.build, ask(argument_node(node)))
    index = as_plain(lowering.build, ask(argument_node(node, 2)))
    return Held.plain(lowering.build.gather(source, index, axis=_integer(node, 1, 0)))


def max_pool2d(lowering: Lowering, node: Node, ask: Ask) -> Held:
    """Write the largest of each window; beyond the border is less than everything."""
    build, source = lowering.build, ask(argument_node(node))
    value = as_map(build, source)
    window, stride, padding = (_pair(node, place, default) for place, default in ((1, 1), (2, 0), (3, 0)))
    stride = stride if any(stride) else window
    if _pair(node, 4, 1) != (1, 1):
        raise UnsupportedOperator(f"max pool {site_of(node).path} is dilated: TFLite has no such form.")
    if any(padding):
        rows, columns = padding
        lowest = -128 if value.dtype == "int8" else -math.inf
        value = build.pad(value, [0, rows, columns, 0, 0, rows, columns, 0], number=lowest)
    return Held.map(build.max_pool(value, window, stride))


def upsample_nearest2d(lowering: Lowering, node: Node, ask: Ask) -> Held:
    """Write the nearest of each position, rounded down as torch rounds."""
    build, source = lowering.build, ask(argument_node(node))
    value = as_map(build, source)
    batch, channels, height, width = _shape(node)
    size = lowering.writer.constant(np.asarray([height, width], np.int32))
    made = build.op(
        "RESIZE_NEAREST_NEIGHBOR",
        [value, size],
        (batch, height, width, channels),
        value.dtype,
        scale=value.scale,
        options="ResizeNearestNeighborOptions",
        version=2 if value.dtype == "int8" else 1,
        settings={"alignCorners": False, "halfPixelCenters": False},
    )
    return Held.map(made)


def pad(lowering: Lowering, node: Node) -> Held:
    """Write a larger tensor, with one number beyond.

    Raises:
        UnsupportedOperator: what lies beyond is taken from the tensor, or the result is smaller.
    """
    source = as_plain(lowering.build, lowering.real(argument_node(node)))
    given: Any = node.args
    if (len(given) > 2 and given[2] != "constant") or min(given[1]) < 0:
        raise UnsupportedOperator(
            f"pad of {list(given[1])} in {site_of(node).path}: TFLite puts numbers around a tensor, nothing else."
        )
    pairs, rank = [int(number) for number in given[1]], len(source.shape)
    number = float(given[3]) if len(given) > 3 and given[3] is not None else 0.0
    before, after = [0] * rank, [0] * rank
    for place in range(len(pairs) // 2):  # from the last axis on
        before[rank - 1 - place], after[rank - 1 - place] = pairs[2 * place : 2 * place + 2]
    return Held.plain(lowering.build.pad(source, [*before, *after], number=number))


def relu(lowering: Lowering, node: Node, ask: Ask) -> Held:
    """Write values, at least zero."""
    source = ask(argument_node(node))
    value = source.value
    made = lowering.build.op(
        "RELU",
        [value],
        value.shape,
        value.dtype,
        scale=value.scale,
        version=2 if value.dtype == "int8" else 1,
    )
    return Held(made, source.shape, source.layout, source.of)


def _pair(node: Node, place: int, default: int) -> tuple[int, int]:
    value: Any = node.args[place] if len(node.args) > place else default
    sizes = [int(number) for number in value] if isinstance(value, Sequence) else [int(value)]
    return (sizes[0], sizes[-1]) if sizes else (0, 0)
