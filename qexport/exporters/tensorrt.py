"""ONNX for TensorRT, and the engines of this machine: int8 with explicit Q/DQ, float16 and float32 beside it.

The `.onnx` files are what travels: any TensorRT that takes their operators builds an engine from them. The int8
engine is built here and now, and its layers are read back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

import qexport
from qexport.artifact import Artifact, TensorSite, UnquantizedRow, describe_file, save_artifact
from qexport.encodings import Encodings
from qexport.files import sha256_json, whole_file, write_bytes
from qexport.plugins.adaptive_avg_pool import TENSORRT
from qexport.plugins.onnx import loop_nms, nms, normalised_image, roi_align
from qexport.plugins.onnx.base_graph import BaseGraph, export_base_graph, quantizers_in_order
from qexport.plugins.onnx.float_weights import store_weights_as_float
from qexport.plugins.onnx.half_precision import to_half_precision
from qexport.plugins.onnx.names import name_all
from qexport.plugins.onnx.opset_17 import to_opset_17
from qexport.plugins.onnx.placeholders import NMS_MASK, NORMALISED_IMAGE, ROI_ALIGN
from qexport.plugins.onnx.split_average_pool import split_average_pools
from qexport.plugins.tensorrt.readback import read_back
from qexport.plugins.tensorrt.residual_fusion import FUSED, fused_residuals
from qexport.quantization.graph import argument_node, scale_of
from qexport.quantization.reference import QuantizedDetector, without_quantizers
from qexport.runtimes import calibration_cache
from qexport.runtimes.tensorrt_builder import build_from_file
from qexport.runtimes.tensorrt_library import CLASSIC, TensorrtLibrary, load_library
from qexport.target_options import TensorrtOptions
from qexport.versions import package_versions

INT8, FP16, FP32, CACHE = "int8", "fp16", "fp32", "calibration-cache"
FILE_NAMES = {
    INT8: "detector.int8.onnx",
    FP16: "detector.fp16.onnx",
    FP32: "detector.fp32.onnx",
    CACHE: calibration_cache.FILE_NAME,
}


def export(
    quantized: QuantizedDetector,
    encodings: Encodings,
    folder: Path,
    *,
    labels: tuple[str, ...],
    options: TensorrtOptions,
) -> Artifact:
    """Write the artifact into `folder`, build its engines, and read the int8 one back first.

    Args:
        quantized: the detector with its encodings applied.
        encodings: the table that `quantized` was made with.
        folder: made where it is missing; files of the same names are replaced.
        labels: class names by label.
        options: forms of operators, and of the builder.

    Raises:
        TargetUnavailable: there is no TensorRT, or its bindings are of another version than its library.
        ExportError: a layer that the encodings call quantized does not compute in int8.
        UnsupportedOperator: an operator of the detector has no form that TensorRT takes.
    """
    library = load_library()
    forms = choose_forms(library, options)
    example = quantized.static.example_input()
    fused = fused_residuals(quantized)
    placed = without_quantizers(quantized, fused)
    base = export_base_graph(placed.graph, example, quantizers_in_order(placed.graph, placed.quantize_nodes))
    if options.weights == "float":
        store_weights_as_float(base.model)
    lower(base.model, forms)
    sites = _name(base, quantized)
    _save(base.model, folder / FILE_NAMES[INT8])
    _write_floats(quantized, forms, folder)
    built = build_from_file(library, folder, FILE_NAMES, INT8, options)
    layers = read_back(built.layers, quantized.quantize_nodes, encodings, library=library.name)
    for role in (FP16, FP32):
        build_from_file(library, folder, FILE_NAMES, role, options)
    artifact = Artifact(
        target="tensorrt",
        qexport_version=qexport.__version__,
        versions={
            **package_versions("torch", "torchvision", "torchao", "onnx", "onnxscript"),
            library.flavour: library.version,
        },
        detector_sha256=encodings.detector_sha256,
        encodings_sha256=sha256_json(encodings),
        labels=labels,
        input=quantized.static.spec,
        proposals=quantized.static.proposals,
        detections=quantized.static.detections,
        forms=forms,
        files=tuple(describe_file(folder, name, role) for role, name in FILE_NAMES.items()),
        sites=sites,
        float_sites={"proposals": str(base.proposals.name)},
        layers=layers,
        unquantized=tuple(UnquantizedRow(key, FUSED) for key in fused),
        rung="built",
    )
    save_artifact(artifact, folder)
    return artifact


def choose_forms(library: TensorrtLibrary, options: TensorrtOptions) -> dict[str, str]:
    """Return the form of RoIAlign and of NMS: as asked, else what the library has."""
    classic = library.flavour == CLASSIC
    roi_align_form, nms_form = options.roi_align, options.nms
    if roi_align_form == "auto":
        roi_align_form = "plugin" if classic and _has_plugin(library, "ROIAlign_TRT") else "grid"
    if nms_form == "auto":
        nms_form = "layer" if classic and hasattr(library.trt.INetworkDefinition, "add_nms") else "loop"
    return {"roi_align": roi_align_form, "nms": nms_form}


def _has_plugin(library: TensorrtLibrary, name: str) -> bool:
    trt = library.trt
    trt.init_libnvinfer_plugins(trt.Logger(trt.Logger.ERROR), "")
    return any(creator.name == name for creator in trt.get_plugin_registry().plugin_creator_list)


def lower(model: ir.Model, forms: Mapping[str, str]) -> None:
    """Replace every placeholder by operators that TensorRT's parser takes."""
    lowerings = {
        NMS_MASK: loop_nms.lower if forms["nms"] == "loop" else nms.lower,
        NORMALISED_IMAGE: _lower_image,
        ROI_ALIGN: roi_align.lower_to_grid if forms["roi_align"] == "grid" else roi_align.lower_to_atlas,
    }
    RemoveUnusedNodesPass()(model)
    for node in list(model.graph):
        if node.op_type in lowerings:
            lowerings[node.op_type](node)
    RemoveUnusedOpsetsPass()(model)
    split_average_pools(model, costs=TENSORRT)
    to_opset_17(model)


def _lower_image(node: ir.Node) -> None:
    normalised_image.lower(node, integers_move=False)


def _write_floats(quantized: QuantizedDetector, forms: Mapping[str, str], folder: Path) -> None:
    """Write the float files, and the calibration cache, whose names are those of the float32 file."""
    fp32 = export_base_graph(quantized.float_graph, quantized.static.example_input(), []).model
    # Lowering replaces a placeholder's value; a use of it keeps the place.
    uses = {
        str(output.name): use
        for node in fp32.graph
        for output in node.outputs
        for use in list(output.uses())[:1]
    }
    lower(fp32, forms)
    half = fp32.clone()
    name_all(fp32, {})
    _save(fp32, folder / FILE_NAMES[FP32])
    to_half_precision(half)
    name_all(half, {})
    _save(half, folder / FILE_NAMES[FP16])
    scales = {}
    for node in quantized.quantize_nodes.values():
        use = uses.get(argument_node(node).name)
        value = use.node.inputs[use.idx] if use is not None else None
        if value is not None:
            scales[str(value.name)] = scale_of(node)
    write_bytes(folder / FILE_NAMES[CACHE], calibration_cache.write_cache(scales).encode())


def _name(base: BaseGraph, quantized: QuantizedDetector) -> tuple[TensorSite, ...]:
    """Name nodes and tensors after modules; return where each row of the encodings is found."""
    values = {str(output.name): output for node in base.model.graph for output in node.outputs}
    found = {key: values[name] for key, name in base.quantized_names.items()}
    name_all(base.model, {str(value.name): key.replace("@0/", "/") for key, value in found.items()})
    return tuple(
        TensorSite(
            key=key,
            tensor=str(value.name),
            zero_point=0,
            shape=tuple(argument_node(quantized.quantize_nodes[key]).meta["val"].shape),
        )
        for key, value in found.items()
    )


def _save(model: ir.Model, path: Path) -> None:
    proto = ir.serde.serialize_model(model)
    del proto.graph.value_info[:]  # shapes of tensors that passes have replaced
    onnx.checker.check_model(proto)
    with whole_file(path) as partial:
        onnx.save(proto, partial)
