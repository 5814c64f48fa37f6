"""ONNX for ONNX Runtime: the int8 detector, its float baseline, and the form with zero point 0."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

import onnx
import onnx_ir as ir

import qexport
from qexport.artifact import Artifact, TensorSite, describe_file, save_artifact
from qexport.detectors.fingerprint import fingerprint
from qexport.encodings import Encodings
from qexport.exporters.onnx_readback import read_back
from qexport.files import sha256_json, whole_file
from qexport.plugins.onnx import nms, normalised_image, roi_align
from qexport.plugins.onnx.base_graph import BaseGraph, export_base_graph, quantizers_in_order
from qexport.plugins.onnx.integer_kernels import (
    UINT8_ZERO,
    move_activations_after_quantizers,
    quantize_biases,
    shift_to_uint8,
)
from qexport.plugins.onnx.integer_roi_align import lower_to_integer
from qexport.plugins.onnx.names import name_all
from qexport.plugins.onnx.placeholders import NMS_MASK, NORMALISED_IMAGE, ROI_ALIGN
from qexport.quantization.reference import QuantizedDetector
from qexport.versions import package_versions

INT8, ZERO_POINT_0, FP32 = "int8", "int8-zero-point-0", "fp32"
FILE_NAMES = {INT8: "detector.int8.onnx", ZERO_POINT_0: "detector.int8.zp0.onnx", FP32: "detector.fp32.onnx"}
PROPOSALS = "proposals"
"""Name of the proposals among an artifact's float sites."""


def export(
    quantized: QuantizedDetector, encodings: Encodings, folder: Path, *, labels: tuple[str, ...]
) -> Artifact:
    """Write the artifact into `folder`; read the int8 file back in ONNX Runtime before it is called one.

    Raises:
        ExportError: a layer that the encodings call quantized does not run as an integer kernel.
        UnsupportedOperator: an operator of the detector has no ONNX form.
    """
    folder.mkdir(parents=True, exist_ok=True)
    example = quantized.static.example_input()
    base = export_base_graph(quantized.graph, example, quantizers_in_order(quantized.graph, quantized.quantize_nodes))
    zero_point_0 = copy.deepcopy(base)
    sites = lower_for_integer_kernels(base, quantized)
    lower_standard(zero_point_0.model)
    name_all(zero_point_0.model, {})
    _save(zero_point_0.model, folder / FILE_NAMES[ZERO_POINT_0])
    proposals = base.proposals.name
    _save(base.model, folder / FILE_NAMES[INT8])
    float_base = export_base_graph(quantized.float_graph, example, [])
    lower_standard(float_base.model)
    name_all(float_base.model, {})
    _save(float_base.model, folder / FILE_NAMES[FP32])
    layers, kernels = read_back(folder / FILE_NAMES[INT8], quantized, encodings)
    artifact = Artifact(
        target="onnx",
        qexport_version=qexport.__version__,
        versions=package_versions("torch", "torchvision", "torchao", "onnx", "onnxscript", "onnxruntime"),
        detector_sha256=fingerprint(quantized.static),
        encodings_sha256=sha256_json(encodings),
        labels=labels,
        input=quantized.static.spec,
        proposals=quantized.static.proposals,
        detections=quantized.static.detections,
        forms={},
        files=tuple(describe_file(folder, name, role) for role, name in FILE_NAMES.items()),
        sites=tuple(sites),
        float_sites={PROPOSALS: str(proposals)},
        layers=layers,
    )
    save_artifact(artifact, folder)
    return artifact
