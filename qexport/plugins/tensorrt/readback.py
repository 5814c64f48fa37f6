"""Read back what TensorRT made of a network: in which type each quantized layer computes, and what it reformats."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch.fx import Node

from qexport.artifact import LayerDecision
from qexport.encodings import Encodings
from qexport.errors import ExportError
from qexport.layers import Kind
from qexport.quantization.graph import IMAGE_KEY, argument_node, base_of, op_name
from qexport.quantization.quantizer import SHAPE_ONLY, WEIGHTED
from qexport.runtimes.tensorrt_layers import EngineLayer

_INT8 = "Int8"
_WEIGHTED_KINDS: tuple[Kind, ...] = ("convolution", "linear")
_NUMBER = re.compile(r"_\d+$")
_NAMES: Mapping[str, tuple[str, ...]] = {
    "conv2d": ("Conv", "conv2d"),
    "linear": ("Gemm", "MatMul", "linear"),
    "add": ("Add", "add"),
    "mul": ("Mul", "mul"),
    "max_pool2d": ("MaxPool", "max_pool2d"),
    "upsample_nearest2d": ("Resize", "interpolate"),
    "cat": ("Concat", "cat"),
    "adaptive_avg_pool2d": ("GlobalAveragePool", "AveragePool", "ReduceMean", "adaptive_avg_pool2d"),
    "avg_pool2d": ("AveragePool", "avg_pool2d"),
    "mean": ("ReduceMean", "GlobalAveragePool", "mean"),
    "relu": ("Relu", "Clip", "relu"),
    "multiscale_roi_align": ("GridSample", "RoiAlign", "multiscale_roi_align"),
    "hardswish": ("HardSwish", "hardswish"),
    "hardsigmoid": ("HardSigmoid", "hardsigmoid"),
    "sigmoid": ("Sigmoid", "sigmoid"),
}
"""How a network's layer is called, `PATH/NAME`, that carries an operator of the detector: in ONNX, in torch."""
_IN_FLOAT = {
    "multiscale_roi_align": "samples and averages in float between int8 tensors",
    "cat": "no kernel of its own",
}


def read_back(
    layers: Iterable[EngineLayer], quantize_nodes: Mapping[str, Node], encodings: Encodings, *, library: str
) -> tuple[LayerDecision, ...]:
    """Say how the engine computes every layer that the encodings quantize.

    Args:
        layers: of the engine.
        quantize_nodes: quantize node of each activation, by encodings key.
        encodings: the table.
        library: name of the TensorRT, for messages.

    Raises:
        ExportError: a convolution or linear that the encodings call quantized does not read int8, or one that
            is kept in float does.
    """
    engine = tuple(layers)
    kept_float = {(row.path, row.call) for row in encodings.float_rows}
    decisions = []
    for key, node in quantize_nodes.items():
        op = op_name(base_of(argument_node(node)))
        if key != IMAGE_KEY and op not in SHAPE_ONLY and _site(key) not in kept_float:
            decisions.append(_decide(engine, *_site(key), op))
    wrong = [each for each in decisions if each.op in WEIGHTED and not each.integer]
    seized = [
        name
        for row in encodings.float_rows
        if row.op in WEIGHTED
        for layer in _own(engine, row.path, row.call, row.op)
        # What is fused at run time may read int8 and cast it: a kernel of its own is what was seized.
        if layer.kind in _WEIGHTED_KINDS and layer.inputs[:1] == (_INT8,)
        for name in layer.nodes[:1]
    ]
    if wrong or seized:
        raise ExportError(_complaint(library, wrong, seized))
    return tuple(decisions)


def reformats_in(layers: Iterable[EngineLayer], prefixes: tuple[str, ...]) -> list[EngineLayer]:
    """Return the kernels that only change layout or type, between modules whose paths begin so."""
    return [
        layer
        for layer in layers
        if layer.is_reformat and layer.modules and all(path.startswith(prefixes) for path in layer.modules)
    ]


def _decide(engine: tuple[EngineLayer, ...], path: str, call: int, op: str) -> LayerDecision:
    own = _own(engine, path, call, op)
    site = _site_name(path, call)
    reformats = [
        layer
        for layer in engine
        if layer.is_reformat and layer.nodes and layer.nodes[0].partition("/")[0] == site
    ]
    # A weighted kernel reads its feature map first; one that was fused of element-wise work, in any order.
    seen = [layer.inputs[:1] if op in WEIGHTED else layer.inputs for layer in own]
    integer = bool(own) and all(_INT8 in types for types in seen)
    reason = ""
    if not own:
        reason = _IN_FLOAT.get(op, "no layer of that name in the engine")
    elif not integer:
        types = ", ".join(sorted({layer.inputs[0] if layer.inputs else "nothing" for layer in own}))
        reason = _IN_FLOAT.get(op, f"reads {types}")
    return LayerDecision(
        path=path,
        call=call,
        op=op,
        kernels=tuple(sorted({layer.kernel for layer in own})),
        integer=integer,
        reason=reason,
        reformats=len(reformats),
    )


def _own(engine: tuple[EngineLayer, ...], path: str, call: int, op: str) -> list[EngineLayer]:
    """Return the engine's layers that compute an operator of a module's call."""
    names, site = _NAMES.get(op, (op,)), _site_name(path, call)
    wanted = {(site, name) for name in names}
    own = [
        layer
        for layer in engine
        if not layer.is_reformat and any(_split(node) in wanted for node in layer.nodes)
    ]
    if op in WEIGHTED:  # the bias, the activation and the rounding may stand in a kernel of their own
        return [layer for layer in own if layer.kind in _WEIGHTED_KINDS] or own
    return own


def _split(node: str) -> tuple[str, str]:
    """Return module call and operator of `backbone.body.conv1/Conv_1`."""
    site, _, operator = node.partition("/")
    return site, _NUMBER.sub("", operator.partition("/")[0])


def _site(key: str) -> tuple[str, int]:
    path, _, call = key.partition("/")[0].partition("@")
    return path, int(call or 0)


def _site_name(path: str, call: int) -> str:
    return f"{path}@{call}" if call else path


def _complaint(library: str, wrong: list[LayerDecision], seized: list[str]) -> str:
    lines = [f"{library} does not run every layer as the encodings say:"]
    lines += [f"  {_site_name(each.path, each.call)} ({each.op}): {each.reason}" for each in wrong]
    lines += [f"  {name}: was kept in float, reads int8" for name in seized]
    lines.append("Give the first kind to --keep-float PATH, or report the model's structure.")
    return "\n".join(lines)
