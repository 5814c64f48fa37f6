"""Passes over the ONNX graph for TensorRT: the same values in operator set 17, in float16, with float weights."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper
from tensorrt_models import FLOAT, INT64, Tensor, node, write_model
from torch import nn

from qexport.errors import ExportError
from qexport.plugins.onnx.float_weights import store_weights_as_float
from qexport.plugins.onnx.half_precision import to_half_precision
from qexport.plugins.onnx.names import name_all
from qexport.plugins.onnx.opset_17 import to_opset_17
from qexport.runtimes.onnx_session import make_session

Array = NDArray[Any]
X: Tensor = ("x", FLOAT, (1, 8, 4, 4))
IMAGE = np.linspace(-1, 1, 128, dtype=np.float32).reshape(1, 8, 4, 4)


def run(model: ir.Model, folder: Path, **given: Array) -> list[Array]:
    """Check a model and run it in ONNX Runtime."""
    proto = ir.serde.serialize_model(model)
    del proto.graph.value_info[:]
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, folder / "checked.onnx")
    results: list[Array] = make_session(folder / "checked.onnx").run(None, given)
    return results


def marked(path: Path, sites: dict[str, str] | None = None) -> ir.Model:
    """Load a file; give each node its site: of its name `PATH/Operator`."""
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.load(path)))
    for one in model.graph:
        one.metadata_props["site"] = f"{(one.name or '').rpartition('/')[0]}@0"
    return model


# Operator set 17


class EighteenOperators(nn.Module):
    """What torch.onnx writes in forms that are new in operator set 18."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first, second = x.chunk(2, 1)
        return (
            first - second,
            x.logsumexp(1),
            torch.linalg.vector_norm(x, 1, 1),
            x.amax(1),
            x.mean((2, 3)),
            x.sum(1),
            torch.nn.functional.interpolate(x, scale_factor=2),
        )


@pytest.fixture(scope="module")
def exported() -> bytes:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # torch.onnx's own
        program = torch.onnx.export(
            EighteenOperators().eval(),
            (torch.zeros(1, 8, 4, 4),),
            dynamo=True,
            opset_version=18,
            verbose=False,
        )
    assert program is not None
    return program.model_proto.SerializeToString()


def test_opset_17_of_operators_that_18_changed_computes_the_same(exported: bytes, tmp_path: Path) -> None:
    model = ir.from_proto(onnx.load_from_string(exported))
    name = model.graph.inputs[0].name
    types = [one.op_type for one in model.graph]
    assert {"Split", "ReduceLogSumExp", "ReduceL1", "ReduceMax", "ReduceMean", "ReduceSum", "Resize"} <= set(
        types
    )
    to_opset_17(model)
    found = run(model, tmp_path, **{str(name): IMAGE})
    assert (model.graph.opset_imports[""], model.ir_version) == (17, 8)
    assert [one.op_type for one in model.graph] == types
    with torch.no_grad():
        expected = EighteenOperators()(torch.from_numpy(IMAGE))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other.numpy(), atol=1e-6)


def test_opset_17_reaches_into_loops(tmp_path: Path) -> None:
    body = helper.make_graph(
        [
            helper.make_node("ReduceMax", ["held", "axes"], ["top"], keepdims=1, name="top"),
            helper.make_node("Add", ["held", "top"], ["next"]),
            helper.make_node("Identity", ["going"], ["goes"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", INT64, ()),
            helper.make_tensor_value_info("going", onnx.TensorProto.BOOL, ()),
            helper.make_tensor_value_info("held", FLOAT, (4,)),
        ],
        [
            helper.make_tensor_value_info("goes", onnx.TensorProto.BOOL, ()),
            helper.make_tensor_value_info("next", FLOAT, (4,)),
        ],
        [onnx.numpy_helper.from_array(np.array([0]), "axes")],
    )
    path = write_model(
        tmp_path / "loop.onnx",
        [node("rpn.nms/Loop", ["turns", "yes", "x"], ["y"], body=body)],
        [("x", FLOAT, (4,))],
        [("y", FLOAT, (4,))],
        {"turns": np.array(3), "yes": np.array(True)},
    )
    model = ir.load(path)
    to_opset_17(model)
    (found,) = run(model, tmp_path, x=np.arange(4, dtype=np.float32))
    np.testing.assert_array_equal(found, [21, 22, 23, 24])


@pytest.mark.parametrize(
    ("operator", "inputs", "attributes", "said"),
    [
        (
            "Mish",
            ("x",),
            {},
            r"^backbone\.act: Mish as operator set 18 has it is not in operator set 17.*Replace",
        ),
        ("Pad", ("x", "pads", "", "axes"), {}, r"^backbone\.act: Pad"),
        ("Resize", ("x", "", "scales"), {"antialias": 1}, r"^backbone\.act: Resize with antialias"),
        ("ReduceMax", ("x", "computed"), {}, r"^backbone\.act: ReduceMax over axes that are computed"),
        ("ReduceMax", ("x",), {"noop_with_empty_axes": 1}, r"^backbone\.act: a reduction over no axis"),
        (
            "Split",
            ("x",),
            {"num_outputs": 2, "axis": 1},
            r"^backbone\.act: Split into 2 parts that are not of one",
        ),
    ],
)
def test_opset_17_of_what_it_does_not_have_names_the_module(
    operator: str, inputs: Sequence[str], attributes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    outputs = ("y", "z")[: 1 + (operator == "Split")]
    path = write_model(
        tmp_path / "new.onnx",
        [node(f"backbone.act/{operator}", inputs, outputs, **attributes)],
        [X, ("computed", INT64, (1,))],
        [(name, FLOAT, (1, 8 - 3 * index, 4, 4)) for index, name in enumerate(outputs, start=1)],
        {"pads": np.zeros(2, np.int64), "axes": np.array([1]), "scales": np.ones(4, np.float32)},
    )
    with pytest.raises(ExportError, match=said):
        to_opset_17(marked(path))


# float16


def detector_of(path: Path, weights: Array) -> Path:
    """Write an image's scaling, a convolution with ReLU, and a box decoding that reads both of them."""
    return write_model(
        path,
        [
            node("preprocess/Mul", ["x", "scale"], ["image"]),
            node("backbone.conv/Conv", ["image", "weights"], ["features"], pads=[1, 1, 1, 1]),
            node("backbone.relu/Relu", ["features"], ["rectified"]),
            node("backbone.conv@1/Conv", ["rectified", "weights"], ["again"], pads=[1, 1, 1, 1]),
            node("rpn.proposals/Exp", ["rectified"], ["sizes"]),
            node("rpn.proposals/Mul", ["sizes", "image"], ["boxes"]),
        ],
        [X],
        [("boxes", FLOAT, (1, 8, 4, 4)), ("again", FLOAT, (1, 8, 4, 4))],
        {"scale": np.array(0.5, np.float32), "weights": weights},
    )


def test_half_precision_types_the_trunk_and_leaves_image_and_boxes(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).normal(0, 0.1, (8, 8, 3, 3)).astype(np.float32)
    model = marked(detector_of(tmp_path / "float.onnx", weights))
    wanted = run(model, tmp_path, x=IMAGE)
    to_half_precision(model)
    name_all(model, {})
    found = run(model, tmp_path, x=IMAGE)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == np.float32
        assert 0 < np.abs(one - other).max() < 5e-3
    assert [output.name for output in model.graph.outputs] == ["boxes", "again"]
    casts = [str(one.name) for one in model.graph if one.op_type == "Cast"]
    # Into the trunk, out of it to the boxes, and out to the output that the trunk gives itself.
    assert len(casts) == 3
    assert all(name.startswith("backbone.") for name in casts)
    stored = {str(value.name): value.const_value.numpy() for value in model.graph.initializers.values()}
    assert sorted(array.dtype.name for array in stored.values()) == ["float16", "float32"]


def test_half_precision_of_a_weight_beyond_float16_names_layer_and_limit(tmp_path: Path) -> None:
    model = marked(detector_of(tmp_path / "float.onnx", np.full((8, 8, 3, 3), -7e4, np.float32)))
    said = r"backbone\.conv \(Conv\): weights holds 7e\+04, beyond float16, whose largest is 65504\. Rescale"
    with pytest.raises(ExportError, match=said):
        to_half_precision(model)


# Weights


def quantized_weights(path: Path, codes: Array, scale: Array, axis: int) -> Path:
    zero = np.zeros(scale.shape, np.int8)
    return write_model(
        path,
        [
            node("conv/QuantizeLinear", ["x", "step", "none"], ["x_codes"]),
            node("conv/DequantizeLinear", ["x_codes", "step", "none"], ["x_real"]),
            node("conv/DequantizeLinear_1", ["codes", "scale", "zero"], ["weights"], axis=axis),
            node("conv/Conv", ["x_real", "weights"], ["y"], pads=[1, 1, 1, 1]),
        ],
        [X],
        [("y", FLOAT, (1, codes.shape[0], 4, 4))],
        {
            "step": np.array(0.01, np.float32),
            "none": np.array(0, np.int8),
            "codes": codes,
            "scale": scale,
            "zero": zero,
        },
    )


@pytest.mark.parametrize(
    ("scale", "axis"),
    [(np.array(0.02, np.float32), 0), (np.linspace(1e-3, 0.7, 5, dtype=np.float32), 0)],
    ids=["per tensor", "per channel"],
)
def test_weights_stored_as_float_are_quantized_to_the_same_codes(
    scale: Array, axis: int, tmp_path: Path
) -> None:
    codes = np.random.default_rng(1).integers(-127, 128, (5, 8, 3, 3)).astype(np.int8)
    model = ir.load(quantized_weights(tmp_path / "int8.onnx", codes, scale, axis))
    (wanted,) = run(model, tmp_path, x=IMAGE)
    store_weights_as_float(model)
    (found,) = run(model, tmp_path, x=IMAGE)
    np.testing.assert_array_equal(found, wanted)
    quantizers = [one for one in model.graph if one.op_type == "QuantizeLinear"]
    assert len(quantizers) == 2  # the activation's own stays as it is
    stored = quantizers[1].inputs[0] if quantizers[0].inputs[0].name == "x" else quantizers[0].inputs[0]
    assert stored.const_value.numpy().dtype == np.float32


# Names


def test_names_of_calls_and_of_what_a_loop_holds_are_module_paths(tmp_path: Path) -> None:
    model = marked(detector_of(tmp_path / "float.onnx", np.zeros((8, 8, 3, 3), np.float32)))
    for one in model.graph:  # as mark_paths leaves it
        one.metadata_props["site"] = one.metadata_props["site"].replace("@1@0", "@1")
    name_all(model, {"features": "backbone.conv/output:conv2d"})
    assert [one.name for one in model.graph] == [
        "preprocess/Mul",
        "backbone.conv/Conv",
        "backbone.relu/Relu",
        "backbone.conv@1/Conv",
        "rpn.proposals/Exp",
        "rpn.proposals/Mul",
    ]
    tensors = [str(output.name) for one in model.graph for output in one.outputs]
    assert tensors[:3] == [
        "preprocess/Mul/output",
        "backbone.conv/output:conv2d",
        "backbone.relu/Relu/output",
    ]
    # A weight that several calls read has the name of the first.
    assert set(model.graph.initializers) == {"preprocess/Mul/input_1", "backbone.conv/Conv/input_1"}
    run(model, tmp_path, x=IMAGE)
