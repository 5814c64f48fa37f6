"""The exported graph of a static detector, and the name of every place in it."""

from __future__ import annotations

import operator
import warnings
from collections import Counter
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qexport.detectors.static import StaticDetector
from qexport.encodings import row_key
from qexport.layers import stage_of

ACTIVATIONS = ("relu", "relu6", "hardtanh", "clamp")
"""Activations that every integer kernel applies by saturation, and which are therefore fused."""
_SPLITS = ("split", "split_with_sizes", "chunk", "tensor_split")

IMAGE_KEY = row_key("preprocess", 0, "output:image")
"""Key of the normalised image, whatever operator ends the preprocessing."""


class CallSite(NamedTuple):
    """A module, and which of its calls."""

    path: str
    call: int


def export_graph(static: StaticDetector) -> GraphModule:
    """Return the functional ATen graph of a static detector; every node knows its module and call."""
    return export_module(static, static.example_input())


def export_module(
    module: nn.Module, example: Tensor, sizes: dict[int, torch.export.Dim] | None = None
) -> GraphModule:
    """Return the functional ATen graph of a module of one input; every node knows its module and call.

    Args:
        module: to export.
        example: its input.
        sizes: the dimensions of the input that stay open.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.export's own deprecations; nothing a user could act on
        program = torch.export.export(module, (example,), dynamic_shapes=(sizes,) if sizes else None)
        graph = program.run_decompositions({}).module()
    assert isinstance(graph, GraphModule)
    for node in list(graph.graph.nodes):
        if node.op == "call_module" or op_name(node) == "_assert_tensor_metadata":
            graph.graph.erase_node(node)  # guards on shapes that are fixed by construction
    _slice_splits(graph)
    graph.graph.lint()
    graph.recompile()
    return graph


def _slice_splits(graph: GraphModule) -> None:
    """Replace each part of a split by the slice that it is: one operator, which every target has."""
    for node in [node for node in graph.graph.nodes if op_name(node) in _SPLITS]:
        parts = node.meta["val"]
        axis = int(str(node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0))) % parts[0].dim()
        ends = list(accumulate(part.shape[axis] for part in parts))
        if not all(isinstance(end, int) for end in ends):
            continue  # along an axis whose size is open
        for taken in list(node.users):
            place = int(str(taken.args[1])) % len(parts)
            start = ends[place] - parts[place].shape[axis]
            with graph.graph.inserting_before(taken):
                part = graph.graph.call_function(
                    torch.ops.aten.slice.Tensor, (argument_node(node), axis, start, ends[place])
                )
            part.meta = {**taken.meta}
            taken.replace_all_uses_with(part)
            graph.graph.erase_node(taken)
        graph.graph.erase_node(node)


def site_of(node: Node) -> CallSite:
    """Return the module path and call that a node belongs to; an empty path for a node without a module."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return CallSite("", 0)
    key, (path, _) = list(stack.items())[-1]
    _, at, call = key.rpartition("@")
    return CallSite(path, int(call) if at else 0)


def op_name(node: object) -> str:
    """Return `conv2d` for `aten.conv2d.default`; empty for what is no operator."""
    schema = getattr(getattr(node, "target", None), "_schema", None)
    return schema.name.split("::")[1] if schema is not None else ""


def computed_by(node: Node) -> str:
    """Return the name of the operator that computes a node; of one of several results, that of their operator."""
    return op_name(node.args[0] if node.target is operator.getitem else node)


def port_keys(module: GraphModule) -> dict[str, str]:
    """Return the encodings key of what each operator computes, by node name.

    Ask an exported graph, before anything is inserted: names stay, neighbours do not.
    """
    keys: dict[str, str] = {}
    seen: Counter[tuple[CallSite, str]] = Counter()
    for node in module.graph.nodes:
        op = computed_by(node)
        if is_image(node):
            keys[node.name] = IMAGE_KEY
        if node.name in keys or not op or isinstance(node.meta.get("val"), (tuple, list)):
            continue  # of several results, each has a key
        site = site_of(node)
        index = seen[site, op]
        seen[site, op] += 1
        keys[node.name] = row_key(site.path, site.call, f"output:{op}" + (f"#{index}" if index else ""))
    return keys


def is_image(node: Node) -> bool:
    """Tell whether a node is the image that preprocessing hands to the trunk, inside or outside the artifact."""
    if not is_float(node) or not (node.op == "placeholder" or stage_of(site_of(node).path) == "preprocess"):
        return False
    return any(site_of(user).path and stage_of(site_of(user).path) != "preprocess" for user in node.users)


def weight_key(node: Node) -> str:
    """Return the encodings key of the weight that a convolution or linear node uses; one for all calls."""
    return row_key(site_of(node).path, 0, "weight")


def base_of(node: Node) -> Node:
    """Return the node whose key names a fused chain: the convolution of convolution + relu."""
    while op_name(node) in ACTIVATIONS and isinstance(node.args[0], Node) and len(node.args[0].users) == 1:
        producer = node.args[0]
        if op_name(producer) not in FUSES_ACTIVATION:
            break
        node = producer
    return node


FUSES_ACTIVATION = ("conv2d", "linear", "add")
"""Operators whose kernels take an activation with them."""


def argument_node(node: Node, index: int = 0) -> Node:
    """Return an argument of a node that is a node itself: torch.fx types arguments as almost anything."""
    value = node.args[index]
    if not isinstance(value, Node):
        raise TypeError(f"argument {index} of {node.name} is {value!r}, no node")
    return value


def scale_of(node: Node) -> float:
    """Return the scale of a per-tensor quantize or dequantize node."""
    value = node.args[1]
    if not isinstance(value, float):
        raise TypeError(f"scale of {node.name} is {value!r}, no number")
    return value


def constant_of(module: GraphModule, node: Node) -> Tensor:
    """Return the tensor that a get_attr node stands for."""
    value: object = module
    for name in str(node.target).split("."):
        value = getattr(value, name)
    if not isinstance(value, Tensor):
        raise TypeError(f"{node.target} is no tensor")
    return value


def is_quantize(node: object) -> bool:
    """Tell whether a node makes integers of real values."""
    return op_name(node).startswith("quantize_per_")


def is_dequantize(node: object) -> bool:
    """Tell whether a node makes real values of integers."""
    return op_name(node).startswith("dequantize_per_")


def is_float(node: Node) -> bool:
    """Tell whether a node computes one float32 tensor."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32
