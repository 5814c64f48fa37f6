"""The quantized reference: the PT2E graph that a detector and its encodings give, bit for bit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from qexport.detectors.fingerprint import fingerprint
from qexport.detectors.static import StaticDetector
from qexport.encodings import ACTIVATIONS, Encodings, QuantParams
from qexport.errors import EncodingsError
from qexport.quantization.fold import fold_batch_norm
from qexport.quantization.graph import (
    argument_node,
    base_of,
    constant_of,
    export_graph,
    is_dequantize,
    is_quantize,
    op_name,
    port_keys,
    site_of,
    weight_key,
)
from qexport.quantization.quantizer import WEIGHTED, preset_quantizer

BIAS_LIMIT = 2**30
"""Largest bias code that a scale may lead to: half of int32, so that accumulators have room."""


@dataclass(frozen=True, slots=True)
class QuantizedDetector:
    """A static detector with its encodings applied."""

    static: StaticDetector
    """BatchNorm folded."""
    float_graph: GraphModule
    """The same graph in float32; node names are those of `graph`."""
    graph: GraphModule
    """PT2E: quantize and dequantize nodes around float operators, int8 weights, biases on their int32 grid."""
    quantize_nodes: Mapping[str, Node]
    """The quantize node of each activation, by encodings key, in order of execution."""

    def weight_codes(self) -> Iterator[NDArray[np.int8]]:
        """Yield the int8 weights of every quantized layer, each once."""
        seen: set[str] = set()
        for node in self.graph.graph.nodes:
            if not is_dequantize(node) or node.args[0].op != "get_attr" or node.args[0].target in seen:
                continue
            seen.add(node.args[0].target)
            yield constant_of(self.graph, node.args[0]).numpy()


def quantize(static: StaticDetector, encodings: Encodings) -> QuantizedDetector:
    """Apply a table of encodings to a static detector.

    Raises:
        EncodingsError: the table is of another detector: its fingerprint differs, or rows are missing, left
            over or of the wrong width.
    """
    own = fingerprint(static)
    if encodings.detector_sha256 != own:
        raise EncodingsError(
            f"the encodings are of another detector (fingerprint {encodings.detector_sha256[:12]}, this one's "
            f"{own[:12]}): its weights, layers or image size differ. Calibrate this one again."
        )
    folded = fold_batch_norm(static)
    graph = export_graph(folded)
    float_graph = copy.deepcopy(graph)
    params = {row.key: row.params for row in encodings.rows}
    _check_rows(graph, params)
    quantizer = preset_quantizer(params, encodings.keep_float, weights=encodings.scheme != ACTIVATIONS)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torchao announces future moves of its own modules
            prepared = prepare_pt2e(graph, quantizer)
            converted = convert_pt2e(prepared)
    except KeyError as error:
        raise EncodingsError(
            f"the encodings have no row for {error.args[0]}, which this detector quantizes. "
            "They are of another detector, or a row was removed: calibrate this one again."
        ) from error
    _snap_biases(converted)
    nodes = _quantize_nodes(converted, port_keys(float_graph))
    unknown = sorted(params.keys() - nodes.keys() - _quantized_weights(converted))
    if unknown:
        raise EncodingsError(
            f"{len(unknown)} rows of the encodings name nothing that this detector quantizes, first {unknown[0]}. "
            "They are of another detector, or of other --keep-float patterns: calibrate this one again."
        )
    return QuantizedDetector(folded, float_graph, converted, nodes)


def without_quantizers(detector: QuantizedDetector, keys: Collection[str]) -> QuantizedDetector:
    """Return a detector some of whose activations are left as they are computed; the one given stays as it is.

    Args:
        detector: to begin with.
        keys: of the activations whose quantizers are taken out, such as a target declares.
    """
    if not keys:
        return detector
    graph = copy.deepcopy(detector.graph)
    by_name = {node.name: node for node in graph.graph.nodes}
    nodes = {key: by_name[node.name] for key, node in detector.quantize_nodes.items()}
    taken = {argument_node(nodes[key]) for key in keys}
    for quantizer in [node for node in graph.graph.nodes if is_quantize(node) and node.args[0] in taken]:
        for dequantizer in list(quantizer.users):
            dequantizer.replace_all_uses_with(argument_node(quantizer))
            graph.graph.erase_node(dequantizer)
        graph.graph.erase_node(quantizer)
    graph.graph.lint()
    graph.recompile()
    left = {key: node for key, node in nodes.items() if key not in keys}
    return QuantizedDetector(detector.static, detector.float_graph, graph, left)


def _quantize_nodes(graph: GraphModule, keys: Mapping[str, str]) -> dict[str, Node]:
    found: dict[str, Node] = {}
    for node in graph.graph.nodes:
        if is_quantize(node) and node.args[0].op != "get_attr":
            found.setdefault(keys[base_of(node.args[0]).name], node)
    return found


def _quantized_weights(graph: GraphModule) -> set[str]:
    return {
        weight_key(node)
        for node in graph.graph.nodes
        if op_name(node) in WEIGHTED and is_dequantize(node.args[1])
    }


def _check_rows(graph: GraphModule, params: Mapping[str, QuantParams]) -> None:
    for node in graph.graph.nodes:
        if op_name(node) not in WEIGHTED or weight_key(node) not in params:
            continue
        channels, scales = node.args[1].meta["val"].shape[0], len(params[weight_key(node)].scale)
        if channels != scales:
            raise EncodingsError(
                f"{site_of(node).path} has {channels} output channels, its encodings {scales} scales. "
                "They are of another detector: calibrate this one again."
            )
    for key, row in params.items():
        if not key.endswith("/weight") and len(row.scale) != 1:
            raise EncodingsError(
                f"{key} has {len(row.scale)} scales; an activation has one for the whole tensor. "
                "The table was not written by qexport: calibrate again."
            )


def _snap_biases(graph: GraphModule) -> None:
    """Round each bias to the int32 grid of its call: scale of the input times scale of the channel."""
    for node in graph.graph.nodes:
        if op_name(node) not in WEIGHTED or not is_dequantize(node.args[1]):
            continue
        if len(node.args) < 3 or node.args[2] is None:
            continue
        source, weight = node.args[0], node.args[1]
        step = torch.tensor(source.args[1], dtype=torch.float32) * constant_of(graph, weight.args[1])
        bias = constant_of(graph, node.args[2])
        name = f"{node.name}_bias"
        graph.register_buffer(name, torch.round(bias / step) * step)
        with graph.graph.inserting_before(node):
            constant = graph.graph.get_attr(name)
        constant.meta = {**node.args[2].meta}
        node.update_arg(2, constant)
    graph.graph.eliminate_dead_code()
    graph.recompile()
