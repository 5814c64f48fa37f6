"""A network with the ports of a detector and one quantized convolution, and the artifact around it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from plain_artifact import write_artifact

from qexport.artifact import Artifact

HEIGHT, WIDTH, CHANNELS, DETECTIONS = 16, 16, 8, 4
CONV, RELU, POOL = "backbone.body.conv1", "backbone.body.relu", "roi_heads.box_roi_pool"
CODES = f"{CONV}/input"
"""The quantized image."""
FILE_NAME = "detector.int8.onnx"


def make_network(path: Path, *, seed: int = 0) -> Path:
    """Write the network: (16, 16, 3) uint8 in; 4 boxes, scores and labels, and their count out."""
    random = np.random.default_rng(seed)
    scales = np.full(CHANNELS, 1 / 64, np.float32)
    codes = random.integers(-127, 128, (CHANNELS, 3, 3, 3)).astype(np.float32)
    constants = {
        "brightest": np.float32(255),
        "image_scale": np.float32(1 / 127),
        "image_zero": np.int8(0),
        "weight": codes * scales.reshape(-1, 1, 1, 1),
        "weight_scales": scales,
        "weight_zeros": np.zeros(CHANNELS, np.int8),
        "bias": random.normal(0, 1, CHANNELS).astype(np.float32),
        "batch_axis": np.array([0]),
        "boxes_shape": np.array([DETECTIONS, 4 * CHANNELS]),
        "starts": np.array([0, 0]),
        "ends": np.array([DETECTIONS, 4]),
        "last_axis": np.array([1]),
        "nothing": np.float32(0.5),
    }
    nodes = [
        _node("preprocess/Cast", ["frame"], ["floats"], to=TensorProto.FLOAT),
        _node("preprocess/Div", ["floats", "brightest"], ["unit"]),
        _node("preprocess/Transpose", ["unit"], ["planes"], perm=[2, 0, 1]),
        _node("preprocess/Unsqueeze", ["planes", "batch_axis"], ["image"]),
        _node(f"{CONV}/QuantizeLinear", ["image", "image_scale", "image_zero"], [CODES]),
        _node(f"{CONV}/DequantizeLinear", [CODES, "image_scale", "image_zero"], ["image_dq"]),
        _node(f"{CONV}/QuantizeLinear_1", ["weight", "weight_scales", "weight_zeros"], ["weight_q"], axis=0),
        _node(
            f"{CONV}/DequantizeLinear_1", ["weight_q", "weight_scales", "weight_zeros"], ["weight_dq"], axis=0
        ),
        _node(f"{CONV}/Conv", ["image_dq", "weight_dq", "bias"], ["convolved"], pads=[1, 1, 1, 1]),
        _node(f"{RELU}/Relu", ["convolved"], ["features"]),
        _node(f"{POOL}/AveragePool", ["features"], ["pooled"], kernel_shape=[4, 4], strides=[4, 4]),
        _node(f"{POOL}/Reshape", ["pooled", "boxes_shape"], ["rows"]),
        _node("roi_heads/Slice", ["rows", "starts", "ends"], ["boxes"]),
        _node("roi_heads/ReduceMax", ["rows", "last_axis"], ["scores"], keepdims=0),
        _node("roi_heads/ArgMax", ["boxes"], ["labels"], axis=1, keepdims=0),
        _node("roi_heads/Greater", ["scores", "nothing"], ["found"]),
        _node("roi_heads/Cast", ["found"], ["found_count"], to=TensorProto.INT64),
        _node("roi_heads/ReduceSum", ["found_count"], ["count"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info("frame", TensorProto.UINT8, [HEIGHT, WIDTH, 3])],
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [DETECTIONS, 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, [DETECTIONS]),
            helper.make_tensor_value_info("labels", TensorProto.INT64, [DETECTIONS]),
            helper.make_tensor_value_info("count", TensorProto.INT64, []),
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def make_artifact(folder: Path) -> Artifact:
    """Write the network and its manifest, without an engine."""
    make_network(folder / FILE_NAME)
    return write_artifact(
        folder,
        target="tensorrt",
        files={"int8": FILE_NAME},
        frame_px=(HEIGHT, WIDTH),
        detections=DETECTIONS,
    )


def _node(name: str, inputs: list[str], outputs: list[str], **attributes: object) -> onnx.NodeProto:
    operator = name.partition("/")[2].partition("_")[0]
    return helper.make_node(operator, inputs, outputs, name=name, **attributes)
