"""One `.pte`: camera frame in, boxes out; layers in XNNPACK, int8; and a float32 one beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch.fx import GraphModule, Node

import qexport
from qexport.artifact import Artifact, TensorSite, describe_file, save_artifact
from qexport.detectors.static import StaticOutput
from qexport.encodings import Encodings
from qexport.files import sha256_json, write_bytes
from qexport.plugins.executorch.emission import Method, write_program
from qexport.plugins.executorch.held import Held
from qexport.plugins.executorch.lowering import Lowering
from qexport.plugins.executorch.operators import operators
from qexport.plugins.executorch.readback import ReadBack, read_back
from qexport.plugins.executorch.steps import Input, Value
from qexport.quantization.graph import argument_node, constant_of, op_name
from qexport.quantization.local import proposals_node
from qexport.quantization.reference import QuantizedDetector
from qexport.runtimes.executorch_table import FORCED, FORWARD, PROBE, PROPOSALS
from qexport.target_options import TargetOptions
from qexport.versions import package_versions

INT8, FP32 = "int8", "fp32"
FILE_NAMES = {INT8: "detector.int8.pte", FP32: "detector.fp32.pte"}
INPUT = "frame"


def export(
    quantized: QuantizedDetector,
    encodings: Encodings,
    folder: Path,
    *,
    labels: tuple[str, ...],
    options: TargetOptions,
) -> Artifact:
    """Write the artifact into `folder`; its int8 file is read back first.

    Args:
        quantized: the detector with its encodings applied.
        encodings: the table that `quantized` was made with.
        folder: made where it is missing; files of the same names are replaced.
        labels: class names by label.
        options: none.

    Raises:
        ExportError: a layer is not what the encodings say: not in XNNPACK, not int8, of other scales, or int8 where it
            is to be float.
        UnsupportedOperator: an operator of the detector has no form here.
    """
    del options
    lowering = Lowering(quantized.graph, operators())
    outputs = _outputs(lowering, quantized.graph)
    held = {key: lowering.codes(node) for key, node in quantized.quantize_nodes.items()}
    proposals = lowering.real(proposals_node(quantized.graph)).value
    sites = _sites(held)
    inner = {site.tensor: held[site.key].value for site in sites} | {PROPOSALS: proposals}
    written = write_program(
        {
            FORWARD: Method(lowering.steps, outputs),
            PROBE: Method(lowering.steps, outputs | inner),
            FORCED: _forced(quantized, held),
        }
    )
    found = read_back(written, held, quantized.quantize_nodes, encodings, name=FILE_NAMES[INT8])
    write_bytes(folder / FILE_NAMES[INT8], written.data)
    floats = Lowering(quantized.float_graph, operators())
    plain = write_program({FORWARD: Method(floats.steps, _outputs(floats, quantized.float_graph))})
    write_bytes(folder / FILE_NAMES[FP32], plain.data)
    artifact = Artifact(
        target="executorch",
        qexport_version=qexport.__version__,
        versions=package_versions("torch", "torchvision", "torchao", "executorch"),
        detector_sha256=encodings.detector_sha256,
        encodings_sha256=sha256_json(encodings),
        labels=labels,
        input=quantized.static.spec,
        proposals=quantized.static.proposals,
        detections=quantized.static.detections,
        forms={
            "delegated": _share(found, quantized),
            "roi_align": "int8 rows by index_select, float32 mean in XNNPACK",
            "nms": "fixed point: overlaps in XNNPACK, turns by bmm",
        },
        files=tuple(describe_file(folder, name, role) for role, name in FILE_NAMES.items()),
        sites=sites,
        float_sites={PROPOSALS: PROPOSALS},
        layers=found.layers,
    )
    save_artifact(artifact, folder)
    return artifact


def _outputs(lowering: Lowering, graph: GraphModule) -> dict[str, Value]:
    lowering.input(_only(graph, "placeholder"))
    results = _only(graph, "output").args[0]
    assert isinstance(results, (tuple, list))
    return {
        name: lowering.real(node).value
        for name, node in zip(StaticOutput._fields, results, strict=True)
        if isinstance(node, Node)
    }


def _forced(quantized: QuantizedDetector, held: Mapping[str, Held]) -> Method:
    """Return every quantized layer on inputs that are given, in the layouts that the program has them in."""
    lowering = Lowering(quantized.graph, operators())
    lowering.input(_only(quantized.graph, "placeholder"))
    for key, node in quantized.quantize_nodes.items():
        own = held[key]
        given = lowering.steps.input(key, own.value.shape, own.value.dtype, own.value.scale)
        lowering.given.codes[argument_node(node)] = own.with_value(given)
    boxes = proposals_node(quantized.graph)
    shape = boxes.meta["val"].shape
    lowering.given.real[boxes] = Held.plain(lowering.steps.input(PROPOSALS, shape, "float32"))
    made = {key: lowering.made(node) for key, node in quantized.quantize_nodes.items()}
    return Method(lowering.steps, {key: _own(lowering, one, held[key]) for key, one in made.items()})


def _own(lowering: Lowering, made: Held, like: Held) -> Value:
    """Return a result in the layout that it has in the program; one that is an input as a copy of it."""
    assert made.stored == like.stored
    if isinstance(made.value.maker, Input):
        return lowering.kernels.call(torch.clone, made.value, scale=made.value.scale)
    return made.value


def _sites(held: Mapping[str, Held]) -> tuple[TensorSite, ...]:
    """Return where every quantized activation is: a tensor is named after the first key that it has."""
    names: dict[Value, str] = {}
    sites = []
    for key, one in held.items():
        name = names.setdefault(one.value, key.replace("@0/", "/"))
        stored = one.stored
        sites.append(
            TensorSite(
                key=key,
                tensor=name,
                zero_point=0,
                shape=one.shape,
                stored_shape=stored[0] if stored else None,
                stored_order=stored[1] if stored else None,
            )
        )
    return tuple(sites)


def _share(found: ReadBack, quantized: QuantizedDetector) -> str:
    """Return what part of the detector XNNPACK computes."""
    macs = 0
    for node in quantized.float_graph.graph.nodes:
        if op_name(node) in ("conv2d", "linear"):
            weight = constant_of(quantized.float_graph, argument_node(node, 1))
            macs += node.meta["val"].numel() * weight[0].numel()
    share = found.delegated_macs / macs
    everything = found.delegated_nodes + found.kernels
    return (
        f"XNNPACK: {100 * share:.1f} % of the multiply-accumulates of convolutions and linear layers, "
        f"{found.delegated_nodes} of {everything} operators, {found.subgraphs} subgraphs"
    )


def _only(graph: GraphModule, kind: str) -> Node:
    found: Node = next(node for node in graph.graph.nodes if node.op == kind)
    return found
