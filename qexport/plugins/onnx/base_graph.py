"""The ONNX graph that every ONNX-borne target starts from: placeholders in it, sites marked, tensors known."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch.fx import GraphModule, Node

from qexport.detectors.static import StaticOutput
from qexport.errors import ExportError, UnsupportedOperator
from qexport.plugins.onnx.builder import scalar_of
from qexport.plugins.onnx.global_average_pool import use_global_average_pool
from qexport.plugins.onnx.names import mark_paths
from qexport.plugins.onnx.placeholders import ROI_ALIGN, translation_table
from qexport.plugins.onnx.split_average_pool import TRANSLATION as ADAPTIVE_POOLS
from qexport.quantization.graph import is_quantize, site_of

OPSET = 18
INPUT = "frame"


@dataclass(frozen=True, slots=True)
class BaseGraph:
    """An exported graph before a target lowers it."""

    model: ir.Model
    quantized_names: dict[str, str]
    """Name of each quantized activation, by encodings key."""
    proposals: ir.Value
    """(R, 4) float32 proposals, xyxy, pixels of the resized image."""


def export_base_graph(
    graph: GraphModule, example: torch.Tensor, keys_in_order: list[tuple[str, float]]
) -> BaseGraph:
    """Export a float or a quantized graph through torch.onnx.

    Args:
        graph: of a static detector.
        example: an input.
        keys_in_order: encodings key and scale of each quantize node, in the order of the graph.

    Raises:
        UnsupportedOperator: an operator of the detector has no ONNX form.
        ExportError: quantizers were lost or reordered on the way.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")  # deprecations inside torch.onnx; nothing a user could act on
        program = torch.export.export(graph, (example,))
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table={**translation_table(), **ADAPTIVE_POOLS},
                input_names=[INPUT],
                output_names=list(StaticOutput._fields),
                optimize=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise UnsupportedOperator(
                f"the detector has an operator that torch.onnx cannot export: {str(error).strip().splitlines()[-1]}. "
                "Replace it in the model by standard operators."
            ) from error
    assert exported is not None and exported.exported_program is not None
    model = exported.model
    sites = {
        node.name: "{}@{}".format(*site_of(node)) if site_of(node).path else ""
        for node in exported.exported_program.graph.nodes
    }
    mark_paths(model, sites)
    use_global_average_pool(model)
    quantizers = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    found = [scalar_of(node.inputs[1]) for node in quantizers]
    wanted = [float(np.float32(scale)) for _, scale in keys_in_order]
    if found != wanted:
        raise ExportError(
            f"torch.onnx wrote {len(found)} quantizers, {len(wanted)} were decided, or their order changed. "
            "This torch is not one that qexport was tested with: see constraints.txt."
        )
    by_key: dict[str, str] = {}
    for (key, _), quantizer in zip(keys_in_order, quantizers, strict=True):
        quantizer.metadata_props["site"] = key.partition("/")[0]
        by_key.setdefault(key, str(quantizer.outputs[0].name))
    roi_align = next(node for node in model.graph if node.op_type == ROI_ALIGN)
    assert roi_align.inputs[0] is not None
    return BaseGraph(model, by_key, roi_align.inputs[0])


def quantizers_in_order(graph: GraphModule, keys: Mapping[str, Node]) -> list[tuple[str, float]]:
    """Return key and scale of every quantize node of an activation, in the order of the graph."""
    key_of = {node.args[0]: key for key, node in keys.items()}
    return [
        (key_of[node.args[0]], float(node.args[1]))
        for node in graph.graph.nodes
        if is_quantize(node) and node.args[0] in key_of
    ]
