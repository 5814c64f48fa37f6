"""Read a file back: which module computes each quantized layer, with which integers, scales and zero points."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qexport.artifact import LayerDecision
from qexport.encodings import Encodings, QuantParams
from qexport.errors import ExportError
from qexport.quantization.graph import (
    IMAGE_KEY,
    CallSite,
    argument_node,
    base_of,
    constant_of,
    is_dequantize,
    op_name,
    site_of,
)
from qexport.quantization.quantizer import BINARY, OWN_SCALE, SHAPE_ONLY, UNARY, WEIGHTED
from qexport.runtimes.qnnpack_library import ZERO_POINT, as_exported, load_module
from qexport.runtimes.qnnpack_program import CALL, Program

_QUANTIZED = "quantized::"
_DEQUANTIZE, _QUANTIZE = "aten::dequantize", "aten::quantize_per_tensor"
_REFORMATS = frozenset({_DEQUANTIZE, _QUANTIZE})


class ReadFile:
    """A file as a runtime loads it, and what it makes of one input.

    Args:
        path: of the file.
        given: the input.
        kept: names of the tensors to look at.
    """

    def __init__(self, path: Path, given: Tensor, kept: frozenset[str]) -> None:
        self.path = path
        self.program = Program(load_module(path), path)
        self.tensors: dict[str, Tensor] = {}
        with as_exported():
            for name, value, _ in self.program.run(given):
                if name in kept or name in self.program.results:
                    self.tensors[name] = value

    def operators(self, part: str) -> tuple[str, ...]:
        """Return the operators of a part."""
        module = self.program.parts[part]
        kinds = (str(node.kind()) for node in module.inlined_graph.nodes())
        return tuple(kind for kind in kinds if not kind.startswith("prim::"))

    def part_of(self, tensor: str) -> str:
        """Return the path of the part that gives a tensor."""
        return next(step.path for step in self.program.steps if tensor in step.outputs)

    def layer(self, site: CallSite) -> str:
        """Return the path of the part that is a layer; empty where there is none."""
        for path in (f"{site.path}{CALL}{site.call}" if site.call else site.path, site.path):
            if path in self.program.parts:
                return path
        return ""

    def weight_and_bias(self, part: str) -> tuple[Tensor, Tensor | None]:
        """Return what a quantized layer computes with; its weight is qint8."""
        module: Any = self.program.parts[part]
        if any("linear" in kind for kind in self.operators(part)):
            weight, bias = torch.ops.quantized.linear_unpack(module._packed_params._packed_params)
        else:
            weight, bias = torch.ops.quantized.conv2d_unpack(module._packed_params)
        return weight, bias


def read_back(
    file: ReadFile,
    graph: GraphModule,
    quantize_nodes: Mapping[str, Node],
    names: Mapping[str, str],
    encodings: Encodings,
) -> tuple[LayerDecision, ...]:
    """Compare a file with the encodings, layer by layer.

    Args:
        file: read, with every tensor of `names`.
        graph: that it was made of.
        quantize_nodes: by key.
        names: of the tensors, by key.
        encodings: the table.

    Raises:
        ExportError: names every layer that is no quantized module, has other integers, scales or zero points than the
            encodings say, or is quantized where it is to be float.
    """
    rows = {row.key: row.params for row in encodings.rows}
    kept_float = {(row.path, row.call) for row in encodings.float_rows}
    wrong, decisions = [], []
    with torch.inference_mode(), as_exported():
        for key, node in quantize_nodes.items():
            wrong += _wrong_tensor(key, file.tensors[names[key]], rows[key])
            base = base_of(argument_node(node))
            if key == IMAGE_KEY or op_name(base) in SHAPE_ONLY or tuple(site_of(base)) in kept_float:
                continue
            if op_name(base) in WEIGHTED:
                wrong += _wrong_layer(file, graph, base, rows)
            decision = _decide(file, base, names[key])
            decisions.append(decision)
            if not decision.integer and not decision.reason:
                wrong.append(f"{key}: {', '.join(decision.kernels)} computes in float")
        wrong += _seized(file, encodings)
    if wrong:
        lines = [f"{file.path.name}: not what the encodings say:", *(f"  {line}" for line in wrong)]
        raise ExportError(
            "\n".join([*lines, "Report the model's structure; --keep-float PATH leaves a layer out."])
        )
    return tuple(decisions)


def _decide(file: ReadFile, base: Node, tensor: str) -> LayerDecision:
    site, op = site_of(base), op_name(base)
    part = (file.layer(site) if op in WEIGHTED else "") or file.part_of(tensor)
    kinds = file.operators(part)
    integer = _DEQUANTIZE not in kinds and _QUANTIZE not in kinds
    reason = ""
    if not integer and op in (*UNARY, *OWN_SCALE):
        reason = f"computed in float32 between uint8 tensors: {op}"
    elif not integer and op in BINARY:
        reason = (
            f"{op} of tensors of several shapes, or of scales that are too far apart: computed in float32"
        )
    computing = [kind for kind in kinds if kind not in _REFORMATS]
    own = [kind for kind in computing if not kind.startswith("aten::")]
    kernels = tuple(dict.fromkeys(own or computing))
    return LayerDecision(
        path=site.path,
        call=site.call,
        op=op,
        kernels=kernels,
        integer=integer,
        reason=reason,
        reformats=sum(kind in _REFORMATS for kind in kinds),
    )


def _wrong_tensor(key: str, found: Tensor, row: QuantParams) -> list[str]:
    if not found.is_quantized or found.dtype != torch.quint8:
        return [f"{key}: {found.dtype}, expected quint8"]
    if (found.q_scale(), found.q_zero_point()) != (row.scale[0], ZERO_POINT):
        return [
            f"{key}: scale {found.q_scale()} and zero point {found.q_zero_point()}, the encodings say {row.scale[0]} "
            f"and {ZERO_POINT}"
        ]
    return []


def _wrong_layer(
    file: ReadFile, graph: GraphModule, node: Node, rows: Mapping[str, QuantParams]
) -> list[str]:
    """Return what of a convolution or linear is not as it is in the graph and the encodings."""
    site = site_of(node)
    where, part = f"{site.path}@{site.call}", file.layer(site)
    if not part or not any(kind.startswith(_QUANTIZED) for kind in file.operators(part)):
        return [
            f"{where}: {', '.join(file.operators(part)) if part else 'nothing'}, expected a quantized module"
        ]
    weight, bias = file.weight_and_bias(part)
    if weight.dtype != torch.qint8 or weight.qscheme() != torch.per_channel_affine:
        return [f"{where}: weight {weight.dtype} {weight.qscheme()}, expected qint8 per channel"]
    row = rows[f"{site.path}@0/weight"]
    wrong = []
    if tuple(weight.q_per_channel_scales().tolist()) != row.scale or weight.q_per_channel_axis() != 0:
        wrong.append(f"{where}: weight of scales that are not the encodings'")
    if weight.q_per_channel_zero_points().any():
        wrong.append(f"{where}: weight of zero points other than 0")
    source = argument_node(node, 1)
    if is_dequantize(source) and not torch.equal(
        weight.int_repr(), constant_of(graph, argument_node(source))
    ):
        wrong.append(f"{where}: weight of other integers than the encodings give")
    given = argument_node(node, 2) if len(node.args) > 2 and node.args[2] is not None else None
    wanted = constant_of(graph, given) if given is not None else torch.zeros(weight.shape[0])
    # QNNPACK holds a bias of zeros where a layer has none.
    if not torch.equal(bias if bias is not None else torch.zeros(weight.shape[0]), wanted):
        wrong.append(f"{where}: another bias than the encodings give")
    return wrong


def _seized(file: ReadFile, encodings: Encodings) -> list[str]:
    """Return layers that the encodings keep in float and that compute in integers."""
    wrong = []
    for row in encodings.float_rows:
        part = file.layer(CallSite(row.path, row.call))
        if row.op in WEIGHTED and part and any(kind.startswith(_QUANTIZED) for kind in file.operators(part)):
            wrong.append(f"{row.path}@{row.call}: was kept in float, is {', '.join(file.operators(part))}")
    return wrong
