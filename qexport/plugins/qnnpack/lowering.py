"""From the quantized graph to parts that PyTorch runs by itself: quantized modules, and operators between them.

Where the graph quantizes what an operator computes, and PyTorch has an integer kernel for it, it becomes that, with its
activation; another operator is computed in float and quantized. Float operators read codes through a dequantize of
their own. Every quantizer's codes are what some part gives, so that they can be looked at and replaced.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from qexport.errors import UnsupportedOperator
from qexport.plugins.qnnpack.addition import write_sum
from qexport.plugins.qnnpack.modules import float_module, packed_weight, quantized_module
from qexport.plugins.qnnpack.names import PartNames, where, whole_stage
from qexport.plugins.qnnpack.operators import FORMS, facts_of, shape_of
from qexport.plugins.qnnpack.parts import Parts
from qexport.quantization.graph import (
    argument_node,
    base_of,
    constant_of,
    is_dequantize,
    is_quantize,
    op_name,
    scale_of,
    site_of,
)
from qexport.quantization.local import proposals_node
from qexport.quantization.quantizer import BINARY, SAME_SCALE, WEIGHTED
from qexport.runtimes.qnnpack_library import ZERO_POINT

PROPOSALS = "proposals"
"""Key of the boxes that are pooled."""
_MOVING = frozenset(SAME_SCALE) | {"clone", "contiguous", "select", "unsqueeze", "_unsafe_view"}
"""Operators that move or select values, and that PyTorch runs on codes as they are."""
_VIEWS = ("view", "_unsafe_view")
"""Written as reshape: quantized maps are channels last in memory, where a view may not do."""
_NAMESPACES = ("aten", "torchvision")
"""Whose operators a process has that imports torch and torchvision."""


class Lowering:
    """Writes a graph as parts.

    Args:
        graph: of `quantization.reference`, or its float form.
        quantizers: the quantize nodes whose codes are to be found again, by key; none of a float graph.
    """

    def __init__(self, graph: GraphModule, quantizers: Mapping[str, Node]) -> None:
        self._graph, self._quantizers = graph, quantizers
        self._nodes = list(graph.graph.nodes)
        self._names = PartNames(self._nodes)
        self._parts = Parts()
        self._owners: dict[Node, str] = {}
        self._real: dict[Node, Node] = {}
        self._codes: dict[Node, Node] = {}
        self._dequantized: dict[tuple[str, Node], Node] = {}
        self._weights: dict[str, Tensor] = {}

    def write(self) -> tuple[GraphModule, dict[str, str]]:
        """Write everything that the graph quantizes and gives.

        Returns:
            The whole; and the name of every quantizer's codes, and of the proposals where the graph has such, by key.

        Raises:
            UnsupportedOperator: an operator that PyTorch and torchvision do not have, or a form without a module.
        """
        needed = self._needed_in_float()
        for node in self._nodes:
            if node.op == "placeholder":
                self._real[node] = self._parts.given
            elif _is_activation_quantizer(node):
                source = argument_node(node)
                if source not in self._codes:
                    self._codes[source] = self._write_codes(node, source)
            elif node in needed:
                self._real[node] = self._write_real(node)
        results: Any = self._nodes[-1].args[0]
        wanted = {key: self._codes[argument_node(node)] for key, node in self._quantizers.items()}
        if any(op_name(node) == "multiscale_roi_align" for node in self._nodes):
            wanted[PROPOSALS] = self._real[proposals_node(self._graph)]
        return self._parts.finish([self._result(result) for result in results], wanted)

    def _needed_in_float(self) -> set[Node]:
        """Return the nodes whose real values are read: by outputs, by float operators, by quantizers of such."""
        needed: set[Node] = set()
        for node in reversed(self._nodes):
            if node.op == "output" or node in needed:
                needed |= {each for each in node.all_input_nodes if self._behind(each) is None}
            elif _is_activation_quantizer(node) and self._integer_form(node) == "":
                needed.add(argument_node(node))
        return {node for node in needed if node.op == "call_function" and not is_dequantize(node)}

    def _result(self, node: Node) -> Node:
        source = self._behind(node)
        if source is None:
            return self._real[node]
        owner = self._names.operator(site_of(base_of(source)), "dequantize")
        return self._parts.call(owner, torch.dequantize, (self._codes[source],))

    def _behind(self, node: object) -> Node | None:
        """Return what was quantized, of an activation that a node dequantizes; None for anything else."""
        if not (isinstance(node, Node) and is_dequantize(node)):
            return None
        quantizer = argument_node(node)
        return argument_node(quantizer) if _is_activation_quantizer(quantizer) else None

    # Codes

    def _integer_form(self, quantizer: Node) -> str:
        """Return how codes are computed from codes: as a layer, of two tensors, moved; empty where in float."""
        source = argument_node(quantizer)
        base, scale = base_of(source), scale_of(quantizer)
        op = op_name(base)
        if op in WEIGHTED and self._behind(base.args[0]) is not None and _is_quantized_weight(base.args[1]):
            return "layer" if source is base or _limits(source) is not None else ""
        if op in BINARY and (source is base or _limits(source) is not None) and self._takes_codes(base):
            return "binary"
        if op in _MOVING and base is source and self._keeps_scale(base, scale):
            return "moved"
        return ""

    def _write_codes(self, quantizer: Node, source: Node) -> Node:
        form, base, scale = self._integer_form(quantizer), base_of(source), scale_of(quantizer)
        if form == "moved":
            return self._move(base)
        if form == "":
            return self._quantize(source, scale)
        low, high = _active_limits(source, scale) if source is not base else (None, None)
        relu = low == 0.0
        made = (
            self._layer(base, scale, relu=relu) if form == "layer" else self._binary(base, scale, relu=relu)
        )
        if (relu and high is None) or (low, high) == (None, None):
            return made
        owner = self._names.operator(site_of(base), op_name(source))
        return self._saturate(owner, made, low, high, scale)

    def _layer(self, node: Node, scale: float, *, relu: bool) -> Node:
        site, source = site_of(node), self._behind(node.args[0])
        assert source is not None
        if site.path not in self._weights:
            codes, scales = (self._constant(place) for place in argument_node(node, 1).args[:2])
            self._weights[site.path] = packed_weight(codes, scales)
        bias = self._bias(node)
        module = quantized_module(node, self._weights[site.path], bias, scale=scale, relu=relu)
        return self._parts.module(self._names.layer(site), module, self._codes[source])

    def _binary(self, node: Node, scale: float, *, relu: bool) -> Node:
        codes = [self._codes[source] for source in map(self._behind, node.args[:2]) if source is not None]
        owner = self._owner(node)
        if op_name(node) == "mul":
            kernel = torch.ops.quantized.mul_relu if relu else torch.ops.quantized.mul
            return self._parts.call(owner, kernel.default, (*codes, scale, ZERO_POINT))
        summands = [argument_node(node, place) for place in (0, 1)]
        return write_sum(
            self._parts,
            owner,
            codes,
            shapes=[shape_of(each) for each in summands],
            scales=[scale_of(each) for each in summands],
            scale=scale,
            shape=shape_of(node),
            relu=relu,
        )

    def _saturate(self, owner: str, value: Node, low: float | None, high: float | None, scale: float) -> Node:
        """Write an activation that saturates at numbers, on codes: limits round to codes as values do."""
        low, high = (-128 * scale if low is None else low), (127 * scale if high is None else high)
        # QNNPACK's clamp reads channels last and says that it wrote channels first.
        plain = self._parts.call(owner, torch.ops.aten.contiguous.default, (value,))
        return self._parts.call(owner, torch.ops.aten.clamp.default, (plain, low, high))

    def _move(self, node: Node) -> Node:
        codes = {each: self._codes[source] for each in node.all_input_nodes if (source := self._behind(each))}
        if op_name(node) == "relu6":
            value, scale = codes[argument_node(node)], scale_of(argument_node(node))
            return self._saturate(self._owner(node), value, 0.0, 6.0, scale)
        return self._call(self._owner(node), node, codes.__getitem__)

    def _quantize(self, source: Node, scale: float) -> Node:
        """Quantize real values: in the part that computes them, behind a layer or the input in one of its own."""
        value = self._real[source]
        base = base_of(source)
        owner = self._parts.owner(value) or (
            "preprocess" if source.op == "placeholder" else self._names.operator(site_of(base), "quantize")
        )
        return self._parts.call(owner, torch.quantize_per_tensor, (value, scale, ZERO_POINT, torch.quint8))

    def _takes_codes(self, node: Node) -> bool:
        """Tell whether PyTorch has a kernel for two tensors of codes."""
        behind = [self._behind(argument) for argument in node.args[:2]]
        return None not in behind and bool(node.kwargs.get("alpha", 1) == 1)

    def _keeps_scale(self, node: Node, scale: float) -> bool:
        """Tell whether an operator reads codes alone, of the scale that its result is to have."""
        inputs = node.all_input_nodes
        return bool(inputs) and all(
            self._behind(each) is not None and scale_of(each) == scale for each in inputs
        )

    # Float

    def _write_real(self, node: Node) -> Node:
        if op_name(node) in WEIGHTED and not whole_stage(node):
            site, owner = site_of(node), self._owner_of_conversion(node)
            module = float_module(node, self._weight_values(node), self._bias(node))
            return self._parts.module(site.path, module, self._read(owner, argument_node(node)))
        return self._call(self._owner(node), node, lambda each: self._read(self._owner(node), each))

    def _read(self, owner: str, node: Node) -> Node:
        """Return the real values of an argument, for a part that reads it."""
        if node.op == "get_attr":
            return self._parts.constant(owner, str(node.target), self._constant(node))
        source = self._behind(node)
        if source is not None:
            if (owner, source) not in self._dequantized:
                made = self._parts.call(owner, torch.dequantize, (self._codes[source],))
                self._dequantized[owner, source] = made
            return self._dequantized[owner, source]
        return self._real[node]

    def _call(self, owner: str, node: Node, read: Any) -> Node:
        arguments: Any = map_arg(node.args, read)
        options = map_arg(node.kwargs, read)
        name = op_name(node)
        if name in _VIEWS:
            return self._parts.call(
                owner, torch.ops.aten.reshape.default, (arguments[0], list(shape_of(node)))
            )
        if name == "max_pool2d" and set(arguments[1]) == {1}:  # QNNPACK's kernel crashes on these
            return self._every_other(owner, node, arguments[0])
        function = _function(node)
        if function in FORMS.values():
            arguments = (facts_of(node), *arguments)
        return self._parts.call(owner, function, arguments, **options)

    def _every_other(self, owner: str, node: Node, source: Node) -> Node:
        """Write a pool of 1x1 windows, which takes values as they are."""
        given: Any = [*node.args, *[None] * 4]
        if any(given[3] or ()):
            raise UnsupportedOperator(
                f"{node.target} in module {where(node)}: pads 1x1 windows. Take the padding out."
            )
        steps = given[2] or (1,)
        for axis, step in ((2, steps[0]), (3, steps[-1])):
            source = self._parts.call(owner, torch.ops.aten.slice.Tensor, (source, axis, 0, 2**63 - 1, step))
        return source

    def _owner(self, node: Node) -> str:
        """Return the part that an operator is written into; an activation's is its producer's module."""
        if node not in self._owners:
            if node.target is operator.getitem:
                self._owners[node] = self._owner(argument_node(node))
            else:
                name = op_name(node)
                self._owners[node] = whole_stage(node) or self._names.operator(site_of(base_of(node)), name)
        return self._owners[node]

    def _owner_of_conversion(self, node: Node) -> str:
        """Return the part that dequantizes what a layer in float reads."""
        return (
            self._names.operator(site_of(node), "dequantize")
            if self._behind(node.args[0]) is not None
            else ""
        )

    # Constants

    def _constant(self, node: object) -> Tensor:
        assert isinstance(node, Node)
        return constant_of(self._graph, node)

    def _bias(self, node: Node) -> Tensor | None:
        given = node.args[2] if len(node.args) > 2 else None
        return None if given is None else self._constant(given)

    def _weight_values(self, node: Node) -> Tensor:
        weight = argument_node(node, 1)
        if not _is_quantized_weight(weight):
            return self._constant(weight)
        codes, scales = (self._constant(place) for place in weight.args[:2])
        return codes.float() * scales.reshape(-1, *[1] * (codes.dim() - 1))


def _function(node: Node) -> Any:
    """Return what computes an operator; refuse one that PyTorch and torchvision do not have."""
    schema = getattr(node.target, "_schema", None)
    namespace, _, name = (schema.name if schema is not None else "").partition("::")
    if node.target is operator.getitem or namespace in _NAMESPACES:
        return node.target
    if namespace == "qexport" and name in FORMS:
        return FORMS[name]
    raise UnsupportedOperator(
        f"{node.target} in module {where(node)}: a file with it would not load with torch and torchvision alone. "
        "Replace it in the model by operators of theirs, or add it to qexport/plugins/qnnpack/operators.py."
    )


def _limits(node: Node) -> tuple[float | None, float | None] | None:
    """Return between which numbers an activation saturates; None for another activation."""
    name = op_name(node)
    given: list[Any] = list(node.args[1:])
    if name == "relu":
        return 0.0, None
    if name == "relu6":
        return 0.0, 6.0
    if name == "clamp":
        low, high = (
            given[place] if len(given) > place else node.kwargs.get(key)
            for place, key in enumerate(("min", "max"))
        )
    elif name == "hardtanh":
        low, high = (
            given[place] if len(given) > place else node.kwargs.get(key, limit)
            for place, (key, limit) in enumerate((("min_val", -1.0), ("max_val", 1.0)))
        )
    else:
        return None
    if isinstance(low, Node) or isinstance(high, Node):
        return None
    return (None if low is None else float(low)), (None if high is None else float(high))  # type: ignore[arg-type]


def _active_limits(node: Node, scale: float) -> tuple[float | None, float | None]:
    """Return the limits that int8 codes of this scale do not have by themselves."""
    low, high = _limits(node) or (None, None)
    return (
        None if low is None or round(low / scale) <= -128 else low,
        None if high is None or round(high / scale) >= 127 else high,
    )


def _is_activation_quantizer(node: Node) -> bool:
    return is_quantize(node) and argument_node(node).op != "get_attr"


def _is_quantized_weight(node: object) -> bool:
    return isinstance(node, Node) and is_dequantize(node) and argument_node(node).op == "get_attr"
