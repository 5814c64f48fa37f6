"""One static `.tflite`: camera frame in, boxes out, suppression inside; int8, and float32 and float16 beside it."""

from __future__ import annotations

from pathlib import Path

from torch.fx import GraphModule, Node

import qexport
from qexport.artifact import Artifact, TensorSite, describe_file, save_artifact
from qexport.detectors.static import StaticOutput
from qexport.encodings import Encodings
from qexport.files import sha256_json, write_bytes
from qexport.plugins.tflite.lowering import Lowering
from qexport.plugins.tflite.operators import operators
from qexport.plugins.tflite.readback import read_back
from qexport.quantization.local import proposals_node
from qexport.quantization.reference import QuantizedDetector
from qexport.target_options import TfliteOptions
from qexport.versions import package_versions

INT8, FP16, FP32 = "int8", "fp16", "fp32"
FILE_NAMES = {INT8: "detector.int8.tflite", FP16: "detector.fp16.tflite", FP32: "detector.fp32.tflite"}
INPUT = "frame"


def export(
    quantized: QuantizedDetector,
    encodings: Encodings,
    folder: Path,
    *,
    labels: tuple[str, ...],
    options: TfliteOptions,
) -> Artifact:
    """Write the artifact into `folder`; its int8 file is read back first.

    Args:
        quantized: the detector with its encodings applied.
        encodings: the table that `quantized` was made with.
        folder: made where it is missing; files of the same names are replaced.
        labels: class names by label.
        options: forms of operators.

    Raises:
        ExportError: a layer is not what the encodings say: not int8, of other scales, or int8 where it is to be float.
        UnsupportedOperator: an operator of the detector has no TFLite form.
    """
    written = operators(portable_nms=options.nms == "portable")
    lowering = Lowering(quantized.graph, written)
    source = lowering.input(_only(quantized.graph, "placeholder"))
    lowering.writer.rename(source.value, INPUT)
    sites = _sites(lowering, quantized)
    _finish(lowering, quantized.graph, folder / FILE_NAMES[INT8])
    proposals = lowering.writer.name_of(lowering.real(proposals_node(quantized.graph)).value)
    layers = read_back(folder / FILE_NAMES[INT8], quantized.quantize_nodes, encodings)
    for role in (FP16, FP32):
        floats = Lowering(quantized.float_graph, written, half=role == FP16)
        source = floats.input(_only(quantized.float_graph, "placeholder"))
        floats.writer.rename(source.value, INPUT)
        _finish(floats, quantized.float_graph, folder / FILE_NAMES[role])
    artifact = Artifact(
        target="tflite",
        qexport_version=qexport.__version__,
        versions=package_versions("torch", "torchvision", "torchao", "ai-edge-litert", "flatbuffers"),
        detector_sha256=encodings.detector_sha256,
        encodings_sha256=sha256_json(encodings),
        labels=labels,
        input=quantized.static.spec,
        proposals=quantized.static.proposals,
        detections=quantized.static.detections,
        forms={
            "roi_align": "int8 gather, float32 sum",
            "nms": "NON_MAX_SUPPRESSION_V4" if options.nms == "own" else "fixed point",
        },
        files=tuple(describe_file(folder, name, role) for role, name in FILE_NAMES.items()),
        sites=sites,
        float_sites={"proposals": proposals},
        layers=layers,
    )
    save_artifact(artifact, folder)
    return artifact


def _sites(lowering: Lowering, quantized: QuantizedDetector) -> tuple[TensorSite, ...]:
    """Write every quantized activation; return where each is. A tensor is named after the first key that it has."""
    sites, named = [], set[int]()
    for key, node in quantized.quantize_nodes.items():
        held = lowering.codes(node)
        if held.value.index not in named:
            lowering.writer.rename(held.value, key.replace("@0/", "/"))
            named.add(held.value.index)
        stored = held.stored
        sites.append(
            TensorSite(
                key=key,
                tensor=lowering.writer.name_of(held.value),
                zero_point=0,
                shape=held.shape,
                stored_shape=stored[0] if stored else None,
                stored_order=stored[1] if stored else None,
            )
        )
    return tuple(sites)


def _only(graph: GraphModule, kind: str) -> Node:
    found: Node = next(node for node in graph.graph.nodes if node.op == kind)
    return found


def _finish(lowering: Lowering, graph: GraphModule, path: Path) -> None:
    """Write everything that the outputs need, and the file."""
    outputs = []
    results = _only(graph, "output").args[0]
    assert isinstance(results, (tuple, list))
    for name, node in zip(StaticOutput._fields, results, strict=True):
        assert isinstance(node, Node)
        value = lowering.real(node).value
        lowering.writer.rename(value, name)
        outputs.append(value)
    source = lowering.input(_only(graph, "placeholder"))
    write_bytes(path, lowering.writer.finish([source.value], outputs, description="qexport"))
