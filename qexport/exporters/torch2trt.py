"""TensorRT by torch2trt: the quantized graph, called as torch functions, becomes a network layer by layer.

There is no ONNX on this road. The network that torch2trt and our converters made is what the artifact holds; the
engine is built from it here and now, and its layers are read back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.fx import GraphModule, Node

import qexport
from qexport.artifact import Artifact, TensorSite, UnquantizedRow, describe_file, save_artifact
from qexport.detectors.static import StaticOutput
from qexport.encodings import Encodings
from qexport.files import sha256_json
from qexport.plugins.tensorrt.readback import read_back
from qexport.plugins.tensorrt.residual_fusion import FUSED, fused_residuals
from qexport.plugins.torch2trt.conversion import convert
from qexport.plugins.torch2trt.functions import TorchCalls
from qexport.plugins.torch2trt.interface import TRT_TENSOR
from qexport.quantization.graph import argument_node
from qexport.quantization.local import proposals_node
from qexport.quantization.reference import QuantizedDetector, without_quantizers
from qexport.runtimes.tensorrt_builder import BuiltEngine, EngineBuilder, write_engine
from qexport.runtimes.tensorrt_library import load_library
from qexport.runtimes.tensorrt_network import Network, read_network, save_network
from qexport.target_options import Torch2trtOptions
from qexport.versions import package_versions

INT8, FP32 = "int8", "fp32"
FILE_NAMES = {INT8: "detector.int8.network", FP32: "detector.fp32.network"}
INPUT = "frame"


def export(
    quantized: QuantizedDetector,
    encodings: Encodings,
    folder: Path,
    *,
    labels: tuple[str, ...],
    options: Torch2trtOptions,
) -> Artifact:
    """Write the artifact into `folder`, build its engines, and read the int8 one back first.

    Args:
        quantized: the detector with its encodings applied.
        encodings: the table that `quantized` was made with.
        folder: made where it is missing; files of the same names are replaced.
        labels: class names by label.
        options: of the builder.

    Raises:
        TargetUnavailable: TensorRT or torch2trt is not here.
        UnsupportedOperator: an operator has no converter.
        ExportError: a layer that the encodings call quantized does not compute in int8.
    """
    fused = fused_residuals(quantized)
    placed = without_quantizers(quantized, fused)
    network, built, tensors = _convert(placed.graph, quantized, folder, INT8, options)
    library = network.described.library
    layers = read_back(built.layers, quantized.quantize_nodes, encodings, library=library)
    _convert(quantized.float_graph, quantized, folder, FP32, options)
    quantizers = {
        layer.outputs[0]: layer.inputs[0] for layer in network.described.layers if layer.kind == "DEQUANTIZE"
    }
    artifact = Artifact(
        target="torch2trt",
        qexport_version=qexport.__version__,
        versions={
            **package_versions("torch", "torchvision", "torchao", "torch2trt"),
            library.partition(" ")[0]: library.partition(" ")[2],
        },
        detector_sha256=encodings.detector_sha256,
        encodings_sha256=sha256_json(encodings),
        labels=labels,
        input=quantized.static.spec,
        proposals=quantized.static.proposals,
        detections=quantized.static.detections,
        forms={"roi_align": "grid", "nms": "loop"},
        files=tuple(describe_file(folder, name, role) for role, name in FILE_NAMES.items()),
        sites=_sites(placed.quantize_nodes, tensors, quantizers),
        float_sites={"proposals": tensors[proposals_node(placed.graph).name]},
        layers=layers,
        unquantized=tuple(UnquantizedRow(key, FUSED) for key in fused),
        rung="built",
    )
    save_artifact(artifact, folder)
    return artifact


def _convert(
    graph: GraphModule, quantized: QuantizedDetector, folder: Path, role: str, options: Torch2trtOptions
) -> tuple[Network, BuiltEngine, dict[str, str]]:
    """Convert a graph, save its network, build its engine; return also the network's tensor of each node."""
    engine = EngineBuilder(load_library())
    made: dict[str, Any] = {}

    def remember(node: Node, result: Any) -> None:
        if hasattr(result, TRT_TENSOR):
            made[node.name] = getattr(result, TRT_TENSOR)

    calls = TorchCalls(graph, after_node=remember)
    conversion = convert(
        calls,
        [quantized.static.example_input()],
        input_names=[INPUT],
        output_names=list(StaticOutput._fields),
        place=lambda: calls.place,
        logger=engine.logger,
    )
    engine.take(conversion.builder, conversion.network)
    network = read_network(engine.library.trt, engine.network, library=engine.library.name)
    save_network(network, folder / FILE_NAMES[role])
    built = write_engine(engine, folder, FILE_NAMES, role, role, options)
    return network, built, {name: str(tensor.name) for name, tensor in made.items()}


def _sites(
    quantize_nodes: Mapping[str, Node], tensors: Mapping[str, str], quantizers: Mapping[str, str]
) -> tuple[TensorSite, ...]:
    """Return where each row of the encodings is found: the integers between quantizer and dequantizer.

    Args:
        quantize_nodes: by encodings key.
        tensors: the network's tensor of each node; that of a quantizer is what its dequantizer makes.
        quantizers: what each dequantizer reads.
    """
    return tuple(
        TensorSite(
            key=key,
            tensor=quantizers[tensors[node.name]],
            zero_point=0,
            shape=tuple(argument_node(node).meta["val"].shape),
        )
        for key, node in quantize_nodes.items()
    )
