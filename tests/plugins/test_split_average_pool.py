"""Average pools of ONNX graphs, split: the same values in ONNX Runtime, few layers in TensorRT."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from qexport.errors import ExportError, UnsupportedOperator
from qexport.plugins.adaptive_avg_pool import ONNX_RUNTIME, TENSORRT, WINDOW_LIMIT
from qexport.plugins.onnx.names import mark_paths, name_all
from qexport.plugins.onnx.split_average_pool import (
    ADAPTIVE_AVERAGE_POOL,
    DOMAIN,
    TRANSLATION,
    split_average_pools,
)
from qexport.runtimes.onnx_session import make_session
from qexport.runtimes.tensorrt_library import installed_flavour, load_library, network_flags

Array = NDArray[Any]
COSTS = {"ONNX Runtime": ONNX_RUNTIME, "TensorRT": TENSORRT}
needs_tensorrt = pytest.mark.skipif(
    installed_flavour() is None, reason="TensorRT is not installed (the extra tensorrt-cpu)"
)


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize(
    ("size", "output"),
    [
        ((10, 10), 7),
        ((50, 50), 7),
        ((50, 50), 1),
        ((40, 30), (None, 10)),
        ((1333, 800), 7),
        ((90, 60), (60, 40)),
    ],
)
def test_exported_adaptive_pool_equals_torch(size: tuple[int, int], output: Any, name: str) -> None:
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    model = exported(nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(output)), x)
    (split,) = split_average_pools(model, costs=COSTS[name])
    expected = nn.AdaptiveAvgPool2d(output)(x.double()).numpy()
    assert split.output_size == expected.shape[2:]
    assert split.layers <= 6
    np.testing.assert_allclose(run(model, x.numpy()), expected, rtol=1e-6)


@settings(max_examples=40)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(sorted(COSTS)), st.data())
def test_placeholder_of_any_size_equals_torch(
    rows: int, columns: int, name: str, data: st.DataObject
) -> None:
    output = (data.draw(st.integers(1, min(rows, 64))), data.draw(st.integers(1, min(columns, 64))))
    x = np.random.default_rng(0).random((1, 2, rows, columns), np.float32)
    model = graph_of(ADAPTIVE_AVERAGE_POOL, x.shape, (1, 2, *output), domain=DOMAIN, output_size=output)
    split_average_pools(model, costs=COSTS[name])
    expected = nn.AdaptiveAvgPool2d(output)(torch.from_numpy(x).double()).numpy()
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-6)


def test_split_pool_keeps_the_name_of_its_module() -> None:
    x = torch.rand(1, 3, 10, 10)
    module = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(7))
    model = exported(module, x)
    mark_paths(model, {"relu": "0@0", "adaptive_avg_pool2d": "backbone.pool@0"})
    (split,) = split_average_pools(model, costs=ONNX_RUNTIME)
    name_all(model, {})
    assert split.site == "backbone.pool@0"
    assert {node.name for node in model.graph} == {"0/Relu", "backbone.pool/MatMul", "backbone.pool/MatMul_1"}


@pytest.mark.parametrize("op_type", ["GlobalAveragePool", "AveragePool"])
def test_pool_of_a_large_window_is_split_and_equals_torch(op_type: str) -> None:
    x = np.random.default_rng(0).random((1, 2, 400, 800), np.float32)
    attributes = {} if op_type == "GlobalAveragePool" else {"kernel_shape": [400, 400], "strides": [400, 400]}
    columns = 1 if op_type == "GlobalAveragePool" else 2
    model = graph_of(op_type, x.shape, (1, 2, 1, columns), **attributes)
    (split,) = split_average_pools(model, costs=TENSORRT)
    assert split.layers <= (4 if columns == 1 else 6)
    check_windows(model)
    expected = x.astype(np.float64).reshape(1, 2, 400, columns, -1).mean((2, 4))[:, :, None]
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "attributes",
    [
        {"strides": [90, 45], "pads": [150, 10, 0, 20]},
        {"strides": [90, 45], "pads": [150, 10, 20, 20], "count_include_pad": 1},
        {"strides": [200, 100], "ceil_mode": 1},
        {"strides": [100, 45], "auto_pad": "SAME_UPPER"},
        {"strides": [300, 80], "dilations": [2, 1]},
    ],
)
def test_pool_that_is_no_adaptive_one_is_parted_by_axis_and_equals_itself(attributes: dict[str, Any]) -> None:
    x = np.random.default_rng(0).random((1, 2, 700, 400), np.float32)
    kernel = [320, 320]
    model = graph_of("AveragePool", x.shape, (None,) * 4, kernel_shape=kernel, **attributes)
    expected = run(model, x)
    (split,) = split_average_pools(model, costs=TENSORRT)
    assert split.layers == 2
    check_windows(model)
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-4)  # ONNX Runtime sums 102,400 one by one


def test_pool_with_one_axis_of_a_large_window_is_refused() -> None:
    model = graph_of(
        "AveragePool", (1, 1, 1, 150_001), (1, 1, 1, 2), kernel_shape=[1, 100_001], strides=[1, 50_000]
    )
    with pytest.raises(ExportError, match="along one axis"):
        split_average_pools(model, costs=TENSORRT)


@pytest.mark.parametrize("op_type", ["GlobalAveragePool", "ReduceMean"])
def test_small_pools_are_split_where_every_pool_is_asked_for(op_type: str) -> None:
    x = np.random.default_rng(0).random((1, 2, 300, 300), np.float32)
    for every in (False, True):
        model = graph_of(op_type, x.shape, (1, 2, 1, 1), axes=(2, 3) if op_type == "ReduceMean" else None)
        done = split_average_pools(model, costs=ONNX_RUNTIME, every=every)
        assert [split.form for split in done] == (["reduce(0) reduce(1)"] if every else [])
        expected = x.astype(np.float64).mean((2, 3), keepdims=True)
        np.testing.assert_allclose(run(model, x), expected, rtol=1e-6 if every else 2e-5)


def test_mean_over_other_axes_is_left() -> None:
    model = graph_of("ReduceMean", (1, 2, 400, 400), (1, 1, 400, 1), axes=(1, 3))
    assert split_average_pools(model, costs=TENSORRT, every=True) == []


def test_regular_pool_between_quantizers_stays_one_pool() -> None:
    for output, kept in ((1, "GlobalAveragePool"), (10, "AveragePool"), (7, "MatMul")):
        model = quantized(output, size=100)
        split_average_pools(model, costs=ONNX_RUNTIME)
        between = [node.op_type for node in model.graph if "Linear" not in node.op_type]
        assert between == [kept] * (2 if kept == "MatMul" else 1)


def test_placeholder_of_rows_that_are_not_fixed_is_refused() -> None:
    shape = (1, 2, "rows", 8)
    model = graph_of(ADAPTIVE_AVERAGE_POOL, shape, (1, 2, 3, 3), domain=DOMAIN, output_size=(3, 3))
    with pytest.raises(UnsupportedOperator, match="Export with an input of one size"):
        split_average_pools(model, costs=TENSORRT)


@needs_tensorrt
@pytest.mark.parametrize(
    ("size", "output", "most"),
    [((1333, 800), 1, 4), ((1333, 800), 7, 6), ((1333, 800), 10, 6), ((400, 400), 1, 4), ((10, 10), 7, 6)],
)
def test_split_pool_is_parsed_and_built_by_tensorrt_in_few_layers(
    size: tuple[int, int], output: int, most: int
) -> None:
    model = exported(nn.AdaptiveAvgPool2d(output), torch.rand(1, 3, *size))
    split_average_pools(model, costs=TENSORRT)
    trt = load_library().trt
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(serialized(model)), parser.get_error(0)
    kinds = [network.get_layer(index).type.name for index in range(network.num_layers)]
    assert len(kinds) <= most, kinds
    assert builder.build_serialized_network(network, builder.create_builder_config()) is not None


def exported(module: nn.Module, x: torch.Tensor) -> ir.Model:
    """Return what torch.onnx makes of a module, adaptive pools as placeholders."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # deprecations inside torch.onnx
        program = torch.onnx.export(
            torch.export.export(module.eval(), (x,)),
            dynamo=True,
            opset_version=18,
            custom_translation_table=TRANSLATION,
            verbose=False,
        )
    assert program is not None
    return program.model


def graph_of(
    op_type: str,
    shape: Sequence[int | str],
    result: Sequence[int | None],
    *,
    domain: str = "",
    axes: Sequence[int] | None = None,
    **attributes: Any,
) -> ir.Model:
    """Return a graph of one operator."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
    inputs = [x]
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 19, DOMAIN: 1})
    if axes is not None:
        tensor = ir.tensor(np.asarray(axes, np.int64), name="axes")
        inputs.append(ir.Value(name="axes", const_value=tensor))
        graph.register_initializer(inputs[-1])
    node = ir.node(op_type, inputs, attributes, domain=domain)
    graph.append(node)
    output = node.outputs[0]
    output.name, output.dtype, output.shape = "y", ir.DataType.FLOAT, ir.Shape(result)
    graph.outputs.append(output)
    return ir.Model(graph, ir_version=10)


def quantized(output: int, *, size: int) -> ir.Model:
    """Return a graph of an adaptive pool between quantizers."""
    model = graph_of(
        ADAPTIVE_AVERAGE_POOL,
        (1, 2, size, size),
        (1, 2, output, output),
        domain=DOMAIN,
        output_size=(output, output),
    )
    graph = model.graph
    (pool,) = list(graph)
    scale, zero = (
        ir.Value(name=name, const_value=ir.tensor(array, name=name))
        for name, array in (("scale", np.float32(0.1)), ("zero", np.int8(0)))
    )
    for value in (scale, zero):
        graph.register_initializer(value)
    x = graph.inputs[0]
    before = ir.node("QuantizeLinear", [x, scale, zero])
    given = ir.node("DequantizeLinear", [before.outputs[0], scale, zero])
    given.outputs[0].dtype, given.outputs[0].shape = ir.DataType.FLOAT, x.shape
    pool.replace_input_with(0, given.outputs[0])
    after = ir.node("QuantizeLinear", [pool.outputs[0], scale, zero])
    graph.insert_before(pool, [before, given])
    graph.insert_after(pool, [after])
    graph.outputs[0] = after.outputs[0]
    return model


def serialized(model: ir.Model) -> bytes:
    for index, value in enumerate(model.graph.outputs):
        value.name = value.name or f"result_{index}"
    return bytes(ir.serde.serialize_model(model).SerializeToString())


def run(model: ir.Model, x: Array) -> Array:
    """Run in ONNX Runtime; return the output."""
    session = make_session(serialized(model))
    result: Array = session.run(None, {session.get_inputs()[0].name: x})[0]
    return result


def check_windows(model: ir.Model) -> None:
    for node in model.graph:
        assert node.op_type != "GlobalAveragePool"
        if node.op_type == "AveragePool":
            assert math.prod(node.attributes["kernel_shape"].as_ints()) < WINDOW_LIMIT
