"""ONNX for ONNX Runtime: the int8 detector, its float baseline, and the form with zero point 0."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

import qexport
from qexport.artifact import Artifact, TensorSite, describe_file, save_artifact
from qexport.encodings import Encodings
from qexport.files import sha256_json, whole_file
from qexport.plugins.adaptive_avg_pool import ONNX_RUNTIME
from qexport.plugins.onnx import nms, normalised_image, roi_align
from qexport.plugins.onnx.base_graph import BaseGraph, export_base_graph, quantizers_in_order
from qexport.plugins.onnx.integer_kernels import (
    UINT8_ZERO,
    move_activations_after_quantizers,
    quantize_biases,
    shield_float_layers,
    shift_to_uint8,
)
from qexport.plugins.onnx.integer_roi_align import ChannelsLast, lower_to_integer
from qexport.plugins.onnx.names import name_all
from qexport.plugins.onnx.placeholders import NMS_MASK, NORMALISED_IMAGE, ROI_ALIGN
from qexport.plugins.onnx.readback import read_back
from qexport.plugins.onnx.split_average_pool import split_average_pools
from qexport.quantization.graph import argument_node
from qexport.quantization.reference import QuantizedDetector
from qexport.target_options import TargetOptions
from qexport.versions import package_versions

INT8, ZERO_POINT_0, FP32 = "int8", "int8-zero-point-0", "fp32"
FILE_NAMES = {INT8: "detector.int8.onnx", ZERO_POINT_0: "detector.int8.zp0.onnx", FP32: "detector.fp32.onnx"}


def export(
    quantized: QuantizedDetector,
    encodings: Encodings,
    folder: Path,
    *,
    labels: tuple[str, ...],
    options: TargetOptions,
) -> Artifact:
    """Write the artifact into `folder`; its int8 file is opened in ONNX Runtime and read back first.

    Args:
        quantized: the detector with its encodings applied.
        encodings: the table that `quantized` was made with.
        folder: made where it is missing; files of the same names are replaced.
        labels: class names by label.
        options: none; ONNX Runtime leaves no choice.

    Raises:
        ExportError: a layer that the encodings call quantized does not run as an integer kernel.
        UnsupportedOperator: an operator of the detector has no ONNX form.
    """
    del options
    example = quantized.static.example_input()
    base = export_base_graph(
        quantized.graph, example, quantizers_in_order(quantized.graph, quantized.quantize_nodes)
    )
    split_average_pools(base.model, costs=ONNX_RUNTIME)
    zero_point_0 = base.model.clone()
    channels_last = lower_for_integer_kernels(base.model)
    sites = _name(base, quantized, channels_last)
    _save(base.model, folder / FILE_NAMES[INT8])
    layers = read_back(folder / FILE_NAMES[INT8], quantized.quantize_nodes, encodings)
    lower_standard(zero_point_0)
    name_all(zero_point_0, {})
    _save(zero_point_0, folder / FILE_NAMES[ZERO_POINT_0])
    fp32 = export_base_graph(quantized.float_graph, example, []).model
    split_average_pools(fp32, costs=ONNX_RUNTIME)
    lower_standard(fp32)
    name_all(fp32, {})
    _save(fp32, folder / FILE_NAMES[FP32])
    artifact = Artifact(
        target="onnx",
        qexport_version=qexport.__version__,
        versions=package_versions("torch", "torchvision", "torchao", "onnx", "onnxscript", "onnxruntime"),
        detector_sha256=encodings.detector_sha256,
        encodings_sha256=sha256_json(encodings),
        labels=labels,
        input=quantized.static.spec,
        proposals=quantized.static.proposals,
        detections=quantized.static.detections,
        forms={"roi_align": "int8 gather" if channels_last else "atlas", "nms": "NonMaxSuppression"},
        files=tuple(describe_file(folder, name, role) for role, name in FILE_NAMES.items()),
        sites=sites,
        float_sites={"proposals": str(base.proposals.name)},
        layers=layers,
    )
    save_artifact(artifact, folder)
    return artifact


def lower_for_integer_kernels(model: ir.Model) -> list[ChannelsLast]:
    """Bring a quantized graph into the form that ONNX Runtime runs on integer kernels, in this order."""
    quantize_biases(model)
    shield_float_layers(model)
    move_activations_after_quantizers(model)
    shift_to_uint8(model)
    channels_last = lower_to_integer(model)
    lower_standard(model)
    return channels_last


def lower_standard(model: ir.Model) -> None:
    """Replace every placeholder that is left by standard operators that any runtime takes."""
    lowerings = {
        NMS_MASK: nms.lower,
        NORMALISED_IMAGE: normalised_image.lower,
        ROI_ALIGN: roi_align.lower_to_atlas,
    }
    RemoveUnusedNodesPass()(model)  # a placeholder that an integer form stands for is dead by now
    for node in list(model.graph):
        if node.op_type in lowerings:
            lowerings[node.op_type](node)
    RemoveUnusedOpsetsPass()(model)


def _name(
    base: BaseGraph, quantized: QuantizedDetector, channels_last: list[ChannelsLast]
) -> tuple[TensorSite, ...]:
    """Name nodes and tensors after modules; return where each row of the encodings is found."""
    stored = {pooled.replaces: pooled for pooled in channels_last}
    values = {output.name: output for node in base.model.graph for output in node.outputs}
    found: dict[str, ir.Value] = {}
    for key, name in base.quantized_names.items():
        found[key] = stored[name].value if name in stored else values[name]
    name_all(base.model, {str(value.name): key.replace("@0/", "/") for key, value in found.items()})
    sites = []
    for key, value in found.items():
        shape = tuple(argument_node(quantized.quantize_nodes[key]).meta["val"].shape)
        layout = stored.get(base.quantized_names[key])
        sites.append(
            TensorSite(
                key=key,
                tensor=str(value.name),
                zero_point=UINT8_ZERO,
                shape=shape,
                stored_shape=layout.stored_shape if layout else None,
                stored_order=(0, 3, 1, 2) if layout else None,
            )
        )
    return tuple(sites)


def _save(model: ir.Model, path: Path) -> None:
    proto = ir.serde.serialize_model(model)
    del proto.graph.value_info[:]  # shapes of tensors that passes have replaced
    onnx.checker.check_model(proto)
    with whole_file(path) as partial:
        onnx.save(proto, partial)
