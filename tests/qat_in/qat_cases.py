"""A checkpoint of every format, what its scales are by the file itself, and the scales of an ONNX artifact."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import qat_models
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision_detectors import build_single_level

from qexport.artifact import Artifact
from qexport.detectors.load import load_detector
from qexport.exporters.onnx import FILE_NAMES

ASSETS = Path(__file__).parent / "assets"
MODELS = Path(__file__).with_name("qat_models.py")


@dataclass(frozen=True, slots=True)
class Case:
    """A format."""

    name: str
    """What the reader calls it."""
    write: Callable[[Path], Path]
    """Writes a checkpoint into a folder."""
    pairs: Mapping[str, str]
    """Buffers that rows have to come from, by key."""
    origins: Mapping[str, int]
    """How many rows come from where."""
    build: Callable[[], GeneralizedRCNN] = lambda: load_detector("demo", None).module
    prepare: str | None = None


def scale_in(path: Path, buffer: str) -> NDArray[np.float32]:
    """Return the float32 scale that a checkpoint holds under a name, read without qexport."""
    if path.suffix == ".json":
        section, name = buffer.split(".", 1)
        found: Any = json.loads(path.read_bytes())[section]
        if isinstance(found, list):
            return np.float32(next(entry for entry in found if entry["name"] == name)["scale"])
        if name.rpartition(".")[0] and name.rpartition(".")[2] == "0":
            name, port, index = name.rsplit(".", 2)
            return np.float32([found[name][port][index]["scale"]])
        return np.float32([entry["scale"] for entry in found[name]])
    loaded = torch.load(path, weights_only=True)
    value: Tensor = loaded.get("model_state_dict", loaded)[buffer]
    if buffer.endswith("_amax"):
        return value.numpy().astype(np.float32).reshape(-1) / np.float32(127)
    return value.numpy().astype(np.float32)


def artifact_scales(artifact: Artifact, folder: Path) -> dict[str, NDArray[np.float32]]:
    """Return the scales in the int8 file, by encodings key."""
    model = onnx.load(folder / FILE_NAMES["int8"])
    values = {entry.name: onnx.numpy_helper.to_array(entry) for entry in model.graph.initializer}
    by_tensor, found = {}, {}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale = values[node.input[1]].reshape(-1)
            by_tensor[node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]] = scale
            if node.input[0] in values and values[node.input[0]].ndim > 1:
                path = node.name.rpartition("/")[0].partition("@")[0]
                found[f"{path}@0/weight"] = scale
    return found | {site.key: by_tensor[site.tensor] for site in artifact.sites if site.tensor in by_tensor}


def write_modelopt(folder: Path, prefix: str = "") -> Path:
    """ModelOpt's quantizers with the demo detector's weights; with a prefix in pytorch-quantization's layout."""
    whole = torch.load(ASSETS / "modelopt_demo.pt", weights_only=True)
    state = dict(load_detector("demo", None).module.state_dict())
    for key, value in whole["model_state_dict"].items():
        layer, quantizer, last = key.rsplit(".", 2)
        state[f"{layer}.{prefix}{quantizer}.{last}"] = value
    path = folder / "checkpoint.pt"
    torch.save(state if prefix else {**whole, "model_state_dict": state}, path)
    return path


def _trained(prepare: Callable[[], GeneralizedRCNN]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        return qat_models.save(qat_models.train_parts(prepare()), folder / "checkpoint.pt")

    return write


EAGER = Case(
    "PyTorch eager QAT",
    _trained(qat_models.prepare_eager),
    {
        "preprocess@0/output:image": "backbone.body.quant.activation_post_process.scale",
        "backbone.body.layer3.1@0/output:add": "backbone.body.module.layer3.1.skip_add.activation_post_process.scale",
        "rpn.head.conv.0.0@0/output:conv2d": "rpn.head.conv.0.0.activation_post_process.scale",
        "rpn.head.conv.0.0@3/output:conv2d": "rpn.head.conv.0.0.activation_post_process.scale",
        "roi_heads.box_head.fc6@0/output:linear": "roi_heads.box_head.fc6.activation_post_process.scale",
        "backbone.body.layer1.0.conv1@0/weight": "backbone.body.module.layer1.0.conv1.weight_fake_quant.scale",
    },
    {"checkpoint": 71, "shared": 6, "calibrated": 3},
)
FX = Case(
    "PyTorch FX QAT",
    _trained(qat_models.prepare_fx),
    {
        "preprocess@0/output:image": "backbone.activation_post_process_0.scale",
        "backbone.body.conv1@0/output:conv2d": "backbone.activation_post_process_1.scale",
        "backbone.body.layer1.0@0/output:add": "backbone.activation_post_process_6.scale",
        "backbone.fpn@0/output:add": "backbone.activation_post_process_26.scale",
        "backbone.fpn@0/output:add#1": "backbone.activation_post_process_30.scale",
        "backbone.fpn.layer_blocks.1.0@0/output:conv2d": "backbone.activation_post_process_27.scale",
        "backbone.body.layer4.0.conv2@0/weight": "backbone.body.layer4.0.conv2.weight_fake_quant.scale",
    },
    {"checkpoint": 50, "shared": 6, "calibrated": 24},
    prepare=f"{MODELS}:prepare_fx",
)
PT2E = Case(
    "PyTorch PT2E QAT",
    _trained(qat_models.prepare_pt2e),
    {
        "preprocess@0/output:image": "backbone.activation_post_process_0.scale",
        "backbone.body.conv1@0/weight": "backbone.activation_post_process_1.scale",
        "backbone.body.conv1@0/output:conv2d": "backbone.activation_post_process_2.scale",
        "backbone.body.layer1.0@0/output:add": "backbone.activation_post_process_10.scale",
        "backbone.fpn.inner_blocks.0.0@0/weight": "backbone.activation_post_process_47.scale",
    },
    # Two tensors have another scale behind the upsampling, for which one scale is kept.
    {"checkpoint": 48, "shared": 6, "requantized": 2, "calibrated": 24},
    prepare=f"{MODELS}:prepare_pt2e",
)
MODELOPT = Case(
    "NVIDIA ModelOpt",
    write_modelopt,
    {
        "preprocess@0/output:image": "backbone.body.conv1.input_quantizer._amax",
        "backbone.body.layer3.0@0/output:add": "backbone.body.layer3.1.conv1.input_quantizer._amax",
        "backbone.fpn@0/output:add": "backbone.fpn.layer_blocks.1.0.input_quantizer._amax",
        "backbone.fpn.layer_blocks.0.0@0/output:conv2d": "rpn.head.conv.0.0.input_quantizer._amax",
        "rpn.head.conv.0.0@2/output:conv2d": "rpn.head.cls_logits.input_quantizer._amax",
        "roi_heads.box_roi_pool@0/output:multiscale_roi_align": "roi_heads.box_head.fc6.input_quantizer._amax",
        "roi_heads.box_head.fc6@0/weight": "roi_heads.box_head.fc6.weight_quantizer._amax",
    },
    {"checkpoint": 53, "shared": 6, "calibrated": 21},
)
PYTORCH_QUANTIZATION = Case(
    "NVIDIA pytorch-quantization",
    # The library does not install beside this torch: its documented layout, with ModelOpt's figures.
    lambda folder: write_modelopt(folder, "_"),
    {
        key: re.sub(r"\.(input|weight)_quantizer\.", r"._\1_quantizer.", buffer)
        for key, buffer in MODELOPT.pairs.items()
    },
    MODELOPT.origins,
)
AIMET_BY_MODULE = Case(
    "AIMET encodings",
    lambda _: ASSETS / "aimet_plain_0.6.1_torch.json",
    {
        "preprocess@0/output:image": "activation_encodings.backbone.0.input.0",
        "backbone.0@0/output:conv2d": "activation_encodings.backbone.2.output.0",
        "backbone.3@0/output:conv2d": "activation_encodings.backbone.4.output.0",
        "backbone.3@0/weight": "param_encodings.backbone.3.weight",
    },
    {"checkpoint": 3, "requantized": 2, "shared": 1, "calibrated": 15},
    build=build_single_level,
)
AIMET_BY_TENSOR = Case(
    "AIMET encodings",
    lambda _: ASSETS / "aimet_folded_1.0.0.json",
    {
        "backbone.0@0/output:conv2d": "activation_encodings./backbone/backbone.2/Relu_output_0",
        "backbone.0@0/weight": "param_encodings.backbone.0.weight",
    },
    {"checkpoint": 1, "requantized": 2, "shared": 1, "calibrated": 17},
    build=build_single_level,
)
CASES = {
    "eager": EAGER,
    "fx": FX,
    "pt2e": PT2E,
    "modelopt": MODELOPT,
    "pytorch-quantization": PYTORCH_QUANTIZATION,
    "aimet-by-module": AIMET_BY_MODULE,
    "aimet-by-tensor": AIMET_BY_TENSOR,
}
