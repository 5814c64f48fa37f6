"""Place quantizers where TensorRT fuses: convolution, bias, residual add and ReLU become one int8 kernel.

TensorRT adds the residual inside the kernel, in float, before the one rounding at the end. A quantizer between
a convolution and the add would cut that kernel in two, so it is taken out: that tensor is then more exact than
the encodings say, and the artifact lists it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NamedTuple

from torch.fx import GraphModule, Node

from qexport.quantization.graph import argument_node, is_dequantize, is_quantize, op_name

FUSED = "added inside the convolution's kernel, before its one rounding: the tensor never exists, and is more exact"
"""Why such a tensor is not quantized, for the artifact."""


class FusedGraph(NamedTuple):
    """A quantized graph as TensorRT is given it."""

    graph: GraphModule
    quantize_nodes: dict[str, Node]
    """The quantize node of each activation that is left, by encodings key."""
    removed: tuple[str, ...]
    """Keys of the activations that are not quantized any more."""


def fuse_residual_adds(graph: GraphModule, quantize_nodes: Mapping[str, Node]) -> FusedGraph:
    """Take out the quantizer between a convolution and the add that follows it; one branch of each add.

    Of two convolutions that meet in an add, the later one runs it; the other is quantized as before.

    Args:
        graph: of the quantized reference; it stays as it is.
        quantize_nodes: quantize node of each activation, by encodings key.
    """
    fused = copy.deepcopy(graph)
    order = {node: index for index, node in enumerate(fused.graph.nodes)}
    by_name = {node.name: node for node in order}
    left = {key: by_name[node.name] for key, node in quantize_nodes.items()}
    removed: list[str] = []
    for add in [node for node in order if op_name(node) == "add"]:
        branches = [
            (order[chain[0]], index, chain)
            for index, value in enumerate(add.args[:2])
            if (chain := _convolution_behind(value)) is not None
        ]
        if not branches:
            continue
        _, index, (convolution, quantizer, dequantizer) = max(branches, key=lambda branch: branch[0])
        add.update_arg(index, convolution)
        fused.graph.erase_node(dequantizer)
        fused.graph.erase_node(quantizer)
        removed += [key for key, node in left.items() if node is quantizer]
    fused.graph.lint()
    fused.recompile()
    return FusedGraph(fused, {key: node for key, node in left.items() if key not in removed}, tuple(removed))


def _convolution_behind(value: object) -> tuple[Node, Node, Node] | None:
    """Return convolution, quantizer and dequantizer that end in `value` alone; None for anything else."""
    if not (isinstance(value, Node) and is_dequantize(value)):
        return None
    quantizer = argument_node(value)
    if not is_quantize(quantizer):
        return None
    convolution = argument_node(quantizer)
    if op_name(convolution) != "conv2d" or not is_dequantize(argument_node(convolution)):
        return None
    chain = (convolution, quantizer, value)
    return chain if all(len(node.users) == 1 for node in chain) else None
