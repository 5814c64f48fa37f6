"""From the quantized graph to what XNNPACK and ExecuTorch's own kernels compute.

Layers run in XNNPACK, in integers where the graph says so. Box arithmetic, ranks and suppression have kernels in
ExecuTorch alone. Everything is written when it is first asked for. Asked for the integers of a quantizer, an operator
that has an integer kernel is written as that, with its activation; another is written in float, and quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qexport.errors import UnsupportedOperator
from qexport.layers import stage_of
from qexport.plugins.executorch.activations import limits_of_fused
from qexport.plugins.executorch.builder import KernelBuilder
from qexport.plugins.executorch.checks import check_options, check_result, where
from qexport.plugins.executorch.held import Held, as_map
from qexport.plugins.executorch.steps import Steps, Value
from qexport.plugins.executorch.xnnpack import Limits, SegmentBuilder
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

Moving: TypeAlias = "Callable[[Lowering, Node, Callable[[Node], Held]], Held]"
"""Writes an operator that moves or selects values, of whatever type; asks for its inputs."""
Real: TypeAlias = "Callable[[Lowering, Node], Held | tuple[Held, ...]]"
"""Writes an operator in float32."""
Integer: TypeAlias = "Callable[[Lowering, Node, Limits | None, float], Held | None]"
"""Writes an operator in integers: the node, the limits of the activation fused to it, the scale of the result. None
where this call has no integer form."""

_OWN_KERNELS = ("proposals", "detections")
"""Stages of box arithmetic, ranks and suppression."""


@dataclass(slots=True)
class Given:
    """What is handed in from outside in place of what the graph computes."""

    codes: dict[Node, Held] = field(default_factory=dict)
    """By the node that is quantized."""
    real: dict[Node, Held] = field(default_factory=dict)


class Lowering:
    """Writes a graph as steps.

    Args:
        graph: of `quantization.reference`, or its float form.
        operators: how operators are written.
    """

    def __init__(self, graph: GraphModule, operators: Operators) -> None:
        self.steps = Steps()
        self.kernels, self.xnnpack = KernelBuilder(self.steps), SegmentBuilder(self.steps)
        self.given = Given()
        self._graph, self._operators = graph, operators
        self._real: dict[Node, Held | tuple[Held, ...]] = {}
        self._codes: dict[tuple[Node, float], Held] = {}
        self._stored: dict[tuple[object, ...], Value] = {}
        self._converted: dict[Value, Value] = {}

    def input(self, node: Node) -> Held:
        """Return the program's input; an image is turned channels last once, before all else."""
        if node not in self._real:
            value = node.meta["val"]
            dtype = str(value.dtype).removeprefix("torch.")
            scale = 1.0 if dtype == "uint8" else None
            given = Held.plain(self.steps.input(node.name, value.shape, dtype, scale))
            self.steps.site = "preprocess"
            self._real[node] = Held.map(as_map(self.xnnpack, given)) if value.dim() == 4 else given
        held = self._real[node]
        assert isinstance(held, Held)
        return held

    def real(self, node: Node) -> Held:
        """Return a node's values, not quantized."""
        held = self.several(node)
        assert isinstance(held, Held), f"{node.name} has several results"
        return held

    def several(self, node: Node) -> Held | tuple[Held, ...]:
        """Return a node's values, or the several results that it has."""
        if node in self.given.real:
            return self.given.real[node]
        if node not in self._real:
            written = self._write_real(node)
            check_result(node, written)
            self._real[node] = written
        return self._real[node]

    def codes(self, quantizer: Node) -> Held:
        """Return the int8 codes that a quantize node makes, or that are given in their place."""
        source = argument_node(quantizer)
        return self.given.codes[source] if source in self.given.codes else self.made(quantizer)

    def made(self, quantizer: Node) -> Held:
        """Return the int8 codes that a quantize node makes."""
        identity = argument_node(quantizer), scale_of(quantizer)
        if identity not in self._codes:
            written = self._write_codes(quantizer)
            check_result(quantizer, written)
            self._codes[identity] = written
        return self._codes[identity]

    def quantizer_behind(self, node: object) -> Node | None:
        """Return the quantizer of an activation that a node dequantizes; None for anything else."""
        if not (isinstance(node, Node) and is_dequantize(node)):
            return None
        source = argument_node(node)
        return source if is_quantize(source) else None

    def constant(self, node: object) -> Tensor:
        """Return a constant of the graph."""
        assert isinstance(node, Node)
        return constant_of(self._graph, node)

    def weight(self, node: Node) -> tuple[Tensor, Tensor] | None:
        """Return int8 codes and scales of a quantized weight; None for one in float."""
        if not is_dequantize(node) or argument_node(node).op != "get_attr":
            return None
        scale = node.args[1]
        scales = self.constant(scale) if isinstance(scale, Node) else torch.tensor([float(str(scale))])
        return self.constant(node.args[0]), scales.to(torch.float32)

    def values(self, argument: object) -> Tensor:
        """Return the real values of a constant or of a quantized weight."""
        node = argument
        assert isinstance(node, Node)
        quantized = self.weight(node)
        if quantized is None:
            return self.constant(node)
        codes, scales = quantized
        return codes.to(torch.float32) * scales.reshape(-1, *[1] * (codes.dim() - 1))

    def store(self, tensor: Tensor, *identity: object) -> Value:
        """Return a constant, once for each identity."""
        if identity not in self._stored:
            self._stored[identity] = self.steps.constant(tensor)
        return self._stored[identity]

    def in_xnnpack(self, node: Node) -> bool:
        """Tell whether a node's float arithmetic belongs to a layer, and so in XNNPACK."""
        return stage_of(site_of(node).path) not in _OWN_KERNELS

    def go_to(self, node: Node) -> None:
        """Let what is written from now on belong to the module that a node belongs to."""
        path, call = site_of(node)
        self.steps.site = (f"{path}@{call}" if call else path) or self.steps.site

    def _write_real(self, node: Node) -> Held | tuple[Held, ...]:
        if node.op == "placeholder":
            return self.input(node)
        if node.op == "get_attr":
            return Held.plain(self.store(self.constant(node), node.target))
        if is_dequantize(node):
            quantizer = self.quantizer_behind(node)
            if quantizer is None:
                return Held.plain(self.store(self.values(node), node))
            return self._dequantized(quantizer)
        name = op_name(node) or str(getattr(node.target, "__name__", node.target))
        moving, real = self._operators.moving.get(name), self._operators.real.get(name)
        if moving is None and real is None:
            raise UnsupportedOperator(
                f"{node.target} in module {where(node)}: not known how ExecuTorch computes it. Replace it in the "
                "model, or add it to qexport/plugins/executorch (docs/plugins.md)."
            )
        check_options(node)
        for source in node.all_input_nodes:  # before the place of this node is set
            if source.op != "get_attr" and self._operators.reads_values(node, source):
                self.several(source)
        self.go_to(node)
        if moving is not None:
            return moving(self, node, self.real)
        assert real is not None
        return real(self, node)

    def _dequantized(self, quantizer: Node) -> Held:
        codes = self.codes(quantizer)
        if codes.value not in self._converted:
            self.go_to(base_of(argument_node(quantizer)))
            self._converted[codes.value] = self.xnnpack.convert(codes.value, None)
        return codes.with_value(self._converted[codes.value])

    def _write_codes(self, quantizer: Node) -> Held:
        source, scale = argument_node(quantizer), scale_of(quantizer)
        base = base_of(source)
        name = op_name(base)
        moving, integer = self._operators.moving.get(name), self._operators.integer.get(name)
        held: Held | None = None
        if base.op == "call_function":
            check_options(base)
        if moving is not None and base is source and self._all_integers(base):
            for node in base.all_input_nodes:
                self._behind(node)
            self.go_to(base)
            held = moving(self, base, self._behind)
        elif integer is not None and self.quantizer_behind(base.all_input_nodes[0]) is not None:
            limits = None if base is source else limits_of_fused(source)
            held = integer(self, base, limits, scale)
        if held is None:
            real = self.real(source)
            self.go_to(source)
            held = real.with_value(self.xnnpack.convert(real.value, scale))
        return held

    def _behind(self, node: Node) -> Held:
        quantizer = self.quantizer_behind(node)
        assert quantizer is not None
        return self.codes(quantizer)

    def _all_integers(self, node: Node) -> bool:
        return all(self.quantizer_behind(source) is not None for source in node.all_input_nodes)


class Operators:
    """How operators are written, by their names in the graph."""

    def __init__(
        self, moving: Mapping[str, Moving], real: Mapping[str, Real], integer: Mapping[str, Integer]
    ) -> None:
        self.moving, self.real, self.integer = moving, real, integer

    def reads_values(self, node: Node, source: Node) -> bool:
        """Tell whether a node reads a source's values; a weighted operator takes its weights as constants."""
        return not (op_name(node) in ("conv2d", "linear") and source is not node.args[0])
