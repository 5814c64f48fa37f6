"""Average pools in layers that every runtime takes: no window of 100,000 elements, adaptive pools of any size.

torch.onnx unrolls an irregular adaptive pool into one node for each pair of window elements (10 -> 7: 26 nodes,
1333 -> 7: tens of thousands). `TRANSLATION` keeps it as one placeholder instead, which `split_average_pools`
lowers; the same pass splits the pools of a model from elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript import values

from qexport.errors import ExportError, UnsupportedOperator
from qexport.plugins.adaptive_avg_pool import (
    WINDOW_LIMIT,
    Costs,
    Matrix,
    Pair,
    Pool,
    PoolPlan,
    Reduce,
    Step,
    plan,
    regular_window,
)
from qexport.plugins.onnx.builder import Builder, array_of

DOMAIN = "qexport"
ADAPTIVE_AVERAGE_POOL = "AdaptiveAveragePool"

_operator = values.Op(
    values.Opset(DOMAIN, 1),
    ADAPTIVE_AVERAGE_POOL,
    OpSchema(
        ADAPTIVE_AVERAGE_POOL,
        DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter("input", "tensor(float)")],
        outputs=[OpSchema.FormalParameter("result", "tensor(float)")],
        attributes=[OpSchema.Attribute("output_size", OpSchema.AttrType.INTS)],
    ),
)


def _translate(input: Any, output_size: Sequence[int]) -> Any:
    return _operator(input, output_size=output_size)


TRANSLATION: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.adaptive_avg_pool2d.default: _translate
}
"""For the `custom_translation_table` of `torch.onnx.export`."""


@dataclass(frozen=True, slots=True)
class SplitPool:
    """A pool that was replaced."""

    site: str
    """`PATH@CALL` of the module; empty for a node that no module owns."""
    input_size: Pair
    output_size: Pair
    form: str
    layers: int
    """Layers of TensorRT, constants among them."""


@dataclass(frozen=True, slots=True)
class _Found:
    """An average pool, as its windows say."""

    input_size: Pair
    output_size: Pair
    volume: int
    """Elements of the largest window."""
    kernel: Pair
    adaptive: bool
    """Whether the windows are those of an adaptive pool between the two sizes."""


def split_average_pools(model: ir.Model, *, costs: Costs, every: bool = False) -> list[SplitPool]:
    """Replace average pools by layers within the limits of every runtime; the values stay.

    Placeholders are lowered always, AveragePool, GlobalAveragePool and a ReduceMean over rows and columns where a
    window has 100,000 elements or more (a ReduceMean has no such limit and is replaced with `every` alone).

    Args:
        model: the graph, changed in place; the sites of its nodes are kept.
        costs: of the runtime that the graph is for.
        every: whether smaller pools take the cheapest form as well.

    Raises:
        UnsupportedOperator: a placeholder whose rows and columns are not fixed.
        ExportError: a pool that is no adaptive one has a window of 100,000 elements along one axis.
    """
    done = []
    for node in list(model.graph):
        found = _found(node)
        if found is None:
            continue
        placeholder = node.op_type == ADAPTIVE_AVERAGE_POOL
        limited = placeholder or node.op_type != "ReduceMean"
        if not (placeholder or every or (limited and found.volume >= WINDOW_LIMIT)):
            continue
        if found.adaptive:
            done.append(_lower(node, found, costs))
        elif found.volume >= WINDOW_LIMIT:
            done.append(_separate(node, found))
    return done


def _found(node: ir.Node) -> _Found | None:
    """Return what an average pool does; None for another operator, or sizes that are not known."""
    if (node.domain, node.op_type) not in _READERS:
        return None
    source, result = node.inputs[0], node.outputs[0]
    size = _size(source)
    if size is None:
        if node.op_type == ADAPTIVE_AVERAGE_POOL:
            raise UnsupportedOperator(
                f"the adaptive pool {_site(node) or node.name} has an input of shape "
                f"{source.shape if source is not None else None}: its windows follow from rows and columns, which "
                "have to be fixed. Export with an input of one size."
            )
        return None
    return _READERS[node.domain, node.op_type](node, size, _size(result))


def _adaptive(size: Pair, output: Pair) -> _Found:
    kernel = (-(-size[0] // output[0]), -(-size[1] // output[1]))
    return _Found(size, output, math.prod(kernel), kernel, adaptive=True)


def _read_placeholder(node: ir.Node, size: Pair, output: Pair | None) -> _Found | None:
    asked = node.attributes["output_size"].as_ints()
    return _adaptive(size, (asked[0], asked[1]))


def _read_global(node: ir.Node, size: Pair, output: Pair | None) -> _Found | None:
    return _adaptive(size, (1, 1))


def _read_mean(node: ir.Node, size: Pair, output: Pair | None) -> _Found | None:
    axes = array_of(node.inputs[1]) if len(node.inputs) > 1 else None
    keeps = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1
    if axes is None or not keeps or {int(axis) % 4 for axis in axes.reshape(-1)} != {2, 3}:
        return None
    return _adaptive(size, (1, 1))


def _read_average(node: ir.Node, size: Pair, output: Pair | None) -> _Found | None:
    kernel = node.attributes["kernel_shape"].as_ints()
    strides, pads = _ints(node, "strides", [1, 1]), _ints(node, "pads", [0, 0, 0, 0])
    found = _Found(size, output or (0, 0), math.prod(kernel), (kernel[0], kernel[1]), adaptive=False)
    plain = _ints(node, "dilations", [1, 1]) == [1, 1] and _text(node, "auto_pad", "NOTSET") == "NOTSET"
    if output is None or not plain or (_int(node, "count_include_pad") and any(pads)):
        return found
    for axis in (0, 1):
        window = regular_window(size[axis], output[axis])
        given = (kernel[axis], strides[axis], pads[axis], pads[axis + 2])
        if window is None or given != (window.kernel, window.stride, window.padding, window.padding):
            return found
    return _Found(size, output, found.volume, found.kernel, adaptive=True)


_READERS: dict[tuple[str, str], Callable[[ir.Node, Pair, Pair | None], _Found | None]] = {
    (DOMAIN, ADAPTIVE_AVERAGE_POOL): _read_placeholder,
    ("", "GlobalAveragePool"): _read_global,
    ("", "ReduceMean"): _read_mean,
    ("", "AveragePool"): _read_average,
}


def _lower(node: ir.Node, found: _Found, costs: Costs) -> SplitPool:
    source = node.inputs[0]
    assert source is not None
    steps = _integer_form(node, found)
    chosen = (
        plan(found.input_size, found.output_size, costs=costs, maps=_maps(source))
        if steps is None
        else PoolPlan(found.input_size, found.output_size, steps, 0.0)
    )
    build = Builder(node)
    value, size = source, found.input_size
    for step in chosen.steps:
        value = _write(build, value, step, size)
        size = step.output_size(size)
    split = SplitPool(_site(node), found.input_size, found.output_size, chosen.form, chosen.layers)
    if not chosen.steps:  # a graph's output has to be some node's
        value = build.op("Identity", [source])
    build.replace_with(value)
    return split


def _integer_form(node: ir.Node, found: _Found) -> tuple[Step, ...] | None:
    """Return one pool for a regular pool between quantizers: runtimes have an integer kernel for that alone."""
    producer = node.inputs[0].producer() if node.inputs[0] is not None else None
    users = [use.node.op_type for use in node.outputs[0].uses()]
    if producer is None or producer.op_type != "DequantizeLinear" or set(users) != {"QuantizeLinear"}:
        return None
    windows = [regular_window(n, m) for n, m in zip(found.input_size, found.output_size, strict=True)]
    rows, columns = windows
    if rows is None or columns is None or found.input_size == found.output_size:
        return None
    if rows.kernel * columns.kernel >= WINDOW_LIMIT:
        return None
    return (
        Pool((rows.kernel, columns.kernel), (rows.stride, columns.stride), (rows.padding, columns.padding)),
    )


def _write(build: Builder, value: ir.Value, step: Step, size: Pair) -> ir.Value:
    after = step.output_size(size)
    if isinstance(step, Pool):
        if step.kernel == size:
            return _typed(build.op("GlobalAveragePool", [value]), value, after)
        pads = [*step.padding, *step.padding]
        pooled = build.op(
            "AveragePool", [value], kernel_shape=[*step.kernel], strides=[*step.stride], pads=pads
        )
        return _typed(pooled, value, after)
    if isinstance(step, Reduce):
        axes = build.constant([2 + axis for axis in step.axes], np.int64)
        return _typed(build.op("ReduceMean", [value, axes], keepdims=1), value, after)
    return _multiply(build, value, step, size)


def _multiply(build: Builder, value: ir.Value, step: Matrix, size: Pair) -> ir.Value:
    source, part, after = value, step.inputs // step.groups, step.output_size(size)
    if step.groups > 1:
        shape = [0, -1, part, size[1]] if step.axis == 0 else [0, 0, size[0] * step.groups, part]
        value = build.op("Reshape", [value, build.constant(shape, np.int64)])
        value.dtype = source.dtype
    weights = step.weights() if step.axis == 0 else step.weights().T
    # Of as many axes as the map: TensorRT's parser would add a reshape to bring them about.
    matrix = build.constant(weights[None, None], np.float32)
    value = build.op("MatMul", [matrix, value] if step.axis == 0 else [value, matrix])
    if step.groups > 1:
        value.dtype = source.dtype
        shape = [0, -1, *after] if step.axis == 0 else [0, 0, *after]
        value = build.op("Reshape", [value, build.constant(shape, np.int64)])
    return _typed(value, source, after)


def _separate(node: ir.Node, found: _Found) -> SplitPool:
    """Replace a pool that is no adaptive one by one over each axis: a window's mean is that of its rows' means."""
    if max(found.kernel) >= WINDOW_LIMIT:
        raise ExportError(
            f"the pool {_site(node) or node.name} has a window of {found.kernel[0]} x {found.kernel[1]}; TensorRT "
            f"takes fewer than {WINDOW_LIMIT} elements, along one axis too. Pool in two steps in the model."
        )
    value = node.inputs[0]
    assert value is not None
    build = Builder(node)
    strides, dilations = _ints(node, "strides", [1, 1]), _ints(node, "dilations", [1, 1])
    pads, auto_pad = _ints(node, "pads", [0, 0, 0, 0]), _text(node, "auto_pad", "NOTSET")
    for axis in (1, 0):
        kernel, stride, dilation, pad = [1, 1], [1, 1], [1, 1], [0, 0, 0, 0]
        kernel[axis], stride[axis], dilation[axis] = found.kernel[axis], strides[axis], dilations[axis]
        pad[axis], pad[axis + 2] = pads[axis], pads[axis + 2]
        value = build.op(
            "AveragePool",
            [value],
            kernel_shape=kernel,
            strides=stride,
            ceil_mode=_int(node, "ceil_mode"),
            count_include_pad=_int(node, "count_include_pad"),
        )
        producer = value.producer()
        assert producer is not None
        own = ir.AttrInt64s("pads", pad) if auto_pad == "NOTSET" else ir.AttrString("auto_pad", auto_pad)
        producer.attributes.add(own)
        if "dilations" in node.attributes:  # an attribute since opset 19
            producer.attributes.add(ir.AttrInt64s("dilations", dilation))
        value.dtype = node.outputs[0].dtype
    split = SplitPool(_site(node), found.input_size, found.output_size, "pool of each axis", 2)
    build.replace_with(value)
    return split


def _typed(value: ir.Value, source: ir.Value, size: Pair) -> ir.Value:
    assert source.shape is not None
    value.dtype, value.shape = source.dtype, ir.Shape([*source.shape[:2], *size])
    return value


def _size(value: ir.Value | None) -> Pair | None:
    if value is None or value.shape is None or len(value.shape) != 4:
        return None
    rows, columns = value.shape[2], value.shape[3]
    return (rows, columns) if isinstance(rows, int) and isinstance(columns, int) else None


def _maps(value: ir.Value) -> int:
    assert value.shape is not None
    return math.prod(length for length in value.shape[:2] if isinstance(length, int))


def _ints(node: ir.Node, name: str, default: list[int]) -> list[int]:
    return [*node.attributes[name].as_ints()] if name in node.attributes else default


def _int(node: ir.Node, name: str) -> int:
    return int(node.attributes[name].as_int()) if name in node.attributes else 0


def _text(node: ir.Node, name: str, default: str) -> str:
    return node.attributes[name].as_string() if name in node.attributes else default


def _site(node: ir.Node) -> str:
    return str(node.metadata_props.get("site", ""))
