"""What a static detector is made of, and what will be quantized."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Interpreter, Node
from torch.utils.flop_counter import FlopCounterMode
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from qexport.detectors.static import StaticDetector
from qexport.layers import Kind, Layer, stage_of
from qexport.quantization.fold import fold_batch_norm
from qexport.quantization.graph import (
    ACTIVATIONS,
    base_of,
    constant_of,
    export_graph,
    is_float,
    op_name,
    port_keys,
    site_of,
)
from qexport.quantization.observers import ChannelMax, MagnitudeHistogram
from qexport.quantization.quantizer import (
    FLOAT_STAGES,
    QUANTIZED_STAGES,
    SHAPE_ONLY,
    SymmetricInt8Quantizer,
    activation_spec,
    check_patterns,
    weight_spec,
)

_KINDS: dict[str, Kind] = {
    "conv2d": "convolution",
    "linear": "linear",
    "max_pool2d": "pooling",
    "avg_pool2d": "pooling",
    "adaptive_avg_pool2d": "pooling",
    "mean": "pooling",
    "add": "elementwise",
    "mul": "elementwise",
    "upsample_nearest2d": "resize",
    "cat": "concatenation",
    "multiscale_roi_align": "roi_align",
    "batched_nms_mask": "nms",
    **dict.fromkeys(("relu", "relu6", "hardswish", "hardsigmoid", "sigmoid", "silu", "gelu"), "activation"),
}
_STAGE_OPERATOR = {"preprocess": "preprocess", "proposals": "decode and NMS", "detections": "decode and NMS"}


def inspect_layers(static: StaticDetector, *, keep_float: tuple[str, ...] = ()) -> tuple[Layer, ...]:
    """Return the layers in order of execution, each with what will become of it.

    A stage that is float as a whole (preprocessing, proposals, detections) is one layer.

    Raises:
        CalibrationError: a pattern of `keep_float` matches nothing.
    """
    graph = export_graph(fold_batch_norm(static))
    keys = port_keys(graph)
    quantizer = SymmetricInt8Quantizer(
        lambda _: activation_spec(MagnitudeHistogram),
        lambda _: weight_spec(ChannelMax),
        keep_float=keep_float,
    )
    quantizer.annotate(graph)
    paths = sorted({site_of(node).path for node in graph.graph.nodes if node.op == "call_function"})
    check_patterns(keep_float, quantizer.plan, paths)
    reasons = {(row.path, row.call, row.op): row.reason for row in quantizer.plan.float_rows}
    counter = _MacCounter(graph)
    with torch.no_grad():
        counter.run(static.example_input())
    layers: list[Layer] = []
    counted: set[str] = set()
    whole_stages: set[str] = set()
    for node in graph.graph.nodes:
        site, op = site_of(node), op_name(node)
        stage = stage_of(site.path)
        if node.op != "call_function" or not site.path:
            continue
        if stage not in QUANTIZED_STAGES:
            if stage not in whole_stages:
                whole_stages.add(stage)
                layers.append(_whole_stage(len(layers), node))
            continue
        if not op or op in SHAPE_ONLY or not is_float(node):
            continue
        if op in ACTIVATIONS and base_of(node) is not node:
            continue
        weights = [
            constant_of(graph, arg) for arg in node.args if isinstance(arg, Node) and arg.op == "get_attr"
        ]
        reason = reasons.get((site.path, site.call, op), "")
        layers.append(
            Layer(
                order=len(layers),
                path=site.path,
                call=site.call,
                op=keys[node.name].partition("/output:")[2],
                kind=_KINDS.get(op, "other"),
                stage=stage,
                shape=tuple(node.meta["val"].shape),
                parameters=0 if site.path in counted else sum(weight.numel() for weight in weights),
                macs=counter.macs.get(node.name, 0),
                quantized=Q_ANNOTATION_KEY in node.meta and not reason,
                reason=reason,
            )
        )
        if weights:
            counted.add(site.path)
    return tuple(layers)


def _whole_stage(order: int, node: Node) -> Layer:
    site = site_of(node)
    stage = stage_of(site.path)
    return Layer(
        order=order,
        path=site.path,
        call=site.call,
        op=_STAGE_OPERATOR[stage],
        kind="nms" if stage in ("proposals", "detections") else "other",
        stage=stage,
        shape=(),  # several operators, several shapes
        parameters=0,
        macs=0,
        quantized=False,
        reason=FLOAT_STAGES[stage],
    )


class _MacCounter(Interpreter):
    """Counts multiply-accumulates of each node by PyTorch's own flop counter."""

    macs: dict[str, int]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.macs = {}
        return super().run(*args, **kwargs)

    def run_node(self, node: Node) -> Any:
        if op_name(node) not in ("conv2d", "linear"):
            return super().run_node(node)
        with FlopCounterMode(display=False) as counter:
            result = super().run_node(node)
        self.macs[node.name] = counter.get_total_flops() // 2
        return result
