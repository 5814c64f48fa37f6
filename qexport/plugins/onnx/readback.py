"""Read back what ONNX Runtime makes of a file: which kernel each quantized layer really runs on."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx
from torch.fx import Node

from qexport.artifact import LayerDecision
from qexport.encodings import Encodings
from qexport.errors import ExportError
from qexport.quantization.graph import IMAGE_KEY, argument_node, base_of, op_name
from qexport.quantization.quantizer import SHAPE_ONLY, UNARY, WEIGHTED
from qexport.runtimes.onnx_session import make_session

INTEGER_KERNELS = frozenset(
    {
        "QLinearConv",
        "QGemm",
        "QLinearMatMul",
        "QLinearAdd",
        "QLinearMul",
        "QLinearConcat",
        "QLinearAveragePool",
        "QLinearGlobalAveragePool",
        "QLinearSigmoid",
        "QLinearLeakyRelu",
    }
)
MOVING_KERNELS = frozenset(
    {"MaxPool", "NhwcMaxPool", "Resize", "Concat", "Slice", "Clip", "Reshape", "Transpose", "Gather"}
)
"""Kernels that move or select values: integer when what they are given is."""
FLOAT_KERNELS = frozenset(
    {"Conv", "FusedConv", "NhwcFusedConv", "ConvInteger", "Gemm", "FusedGemm", "MatMul"}
)
WEIGHTED_KERNELS = FLOAT_KERNELS | {"QLinearConv", "QGemm", "QLinearMatMul"}
ONNX_OPERATORS: Mapping[str, tuple[str, ...]] = {
    "conv2d": ("Conv",),
    "linear": ("Gemm", "MatMul"),
    "add": ("Add",),
    "mul": ("Mul",),
    "max_pool2d": ("MaxPool",),
    "upsample_nearest2d": ("Resize",),
    "cat": ("Concat",),
    "adaptive_avg_pool2d": ("GlobalAveragePool", "AveragePool", "ReduceMean"),
    "avg_pool2d": ("AveragePool",),
    "mean": ("ReduceMean", "GlobalAveragePool"),
    "relu": ("Relu", "Clip"),
    "multiscale_roi_align": ("QLinearMatMul", "RoiAlign"),
    **dict.fromkeys(UNARY, ()),
}
"""Which ONNX operator carries an operator of the detector, to find it among a site's nodes."""


def read_back(
    path: Path, quantize_nodes: Mapping[str, Node], encodings: Encodings
) -> tuple[LayerDecision, ...]:
    """Open the file in ONNX Runtime and name the kernel of every quantized layer.

    Raises:
        ExportError: a layer that the encodings call quantized does not run as an integer kernel, a
            convolution or linear that nobody kept in float runs in float, or one that was kept in float does not.
    """
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        make_session(path, optimized=optimized)
        graph = onnx.load(optimized, load_external_data=False).graph
    producers = {name: node for node in graph.node for name in node.output}
    sites: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        sites.setdefault(node.name.partition("/")[0], []).append(node)
    kept_float = {(row.path, row.call) for row in encodings.float_rows}
    decisions = [
        _decide(key, node, sites, producers)
        for key, node in quantize_nodes.items()
        if _is_layer(key, node, kept_float)
    ]
    failed = [decision for decision in decisions if not decision.integer and not decision.reason]
    strays = [
        node.name
        for node in graph.node
        if node.op_type in FLOAT_KERNELS and _site(node.name) not in kept_float
    ]
    weighted = {(row.path, row.call) for row in encodings.float_rows if row.op in WEIGHTED}
    seized = [
        node.name
        for node in graph.node
        if _site(node.name) in weighted
        and node.op_type in WEIGHTED_KERNELS
        and (node.op_type not in FLOAT_KERNELS or _dequantizes(producers.get(node.input[1])))
    ]
    if failed or strays or seized:
        raise ExportError(_complaint(path, failed, strays, seized))
    return tuple(decisions)


def _is_layer(key: str, node: Node, kept_float: set[tuple[str, int]]) -> bool:
    return (
        key != IMAGE_KEY
        and op_name(base_of(argument_node(node))) not in SHAPE_ONLY
        and _site(key) not in kept_float
    )


def _decide(
    key: str,
    node: Node,
    sites: Mapping[str, list[onnx.NodeProto]],
    producers: Mapping[str, onnx.NodeProto],
) -> LayerDecision:
    path, call = _site(key)
    op = op_name(base_of(argument_node(node)))
    written = ONNX_OPERATORS.get(op, ())
    own = [
        kernel
        for kernel in sites.get(_site_name(path, call), [])
        if kernel.name.partition("/")[2].split("_")[0] in written
    ]
    if op in UNARY:
        return LayerDecision(
            path=path,
            call=call,
            op=op,
            kernels=(),
            integer=False,
            reason=f"ONNX Runtime has no integer {op}: computed in float between int8 tensors",
        )
    kernels = tuple(sorted({kernel.op_type for kernel in own}))
    return LayerDecision(
        path=path,
        call=call,
        op=op,
        kernels=kernels,
        integer=bool(own) and all(_is_integer(kernel, producers) for kernel in own),
    )


def _dequantizes(node: onnx.NodeProto | None) -> bool:
    return node is not None and node.op_type == "DequantizeLinear"


def _is_integer(node: onnx.NodeProto, producers: Mapping[str, onnx.NodeProto]) -> bool:
    if node.op_type in INTEGER_KERNELS:
        return True
    return node.op_type in MOVING_KERNELS and not _dequantizes(producers.get(node.input[0]))


def _site(name: str) -> tuple[str, int]:
    # ONNX Runtime puts "fused " before the name of a float operator that it joined with an activation.
    path, _, call = name.removeprefix("fused ").partition("/")[0].partition("@")
    return path, int(call or 0)


def _site_name(path: str, call: int) -> str:
    return f"{path}@{call}" if call else path


def _complaint(path: Path, failed: list[LayerDecision], strays: list[str], seized: list[str]) -> str:
    lines = [f"{path.name}: ONNX Runtime does not run every layer as the encodings say:"]
    for decision in failed:
        ran = ", ".join(decision.kernels) or "no kernel of that name: it was fused into another"
        lines.append(f"  {_site_name(decision.path, decision.call)} ({decision.op}): {ran}")
    lines += [f"  {name}: runs in float" for name in strays]
    lines += [f"  {name}: was kept in float, runs with int8 weights" for name in seized]
    lines.append("Give the first kind to --keep-float PATH, or report the model's structure.")
    return "\n".join(lines)
