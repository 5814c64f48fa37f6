"""From the quantized graph to TFLite operators: what can be integers is, where the graph says so.

Everything is written when it is first asked for. Asked for the integers of a quantizer, an operator that has an
integer kernel is written as that, with its activation; another is written in float, and quantized. Asked for real
values, integers are dequantized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import GraphModule, Node

from qexport.errors import UnsupportedOperator
from qexport.plugins.tflite.activations import activation_of
from qexport.plugins.tflite.builder import TfliteBuilder
from qexport.plugins.tflite.checks import check_options, check_result, where
from qexport.plugins.tflite.held import Held, as_map
from qexport.plugins.tflite.writer import ModelWriter, Value
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
Integer: TypeAlias = "Callable[[Lowering, Node, str, float], Held | None]"
"""Writes an operator in integers: the node, the activation fused to it, the scale of the result. None where this call
has no integer form."""


class Lowering:
    """Writes a graph into a model.

    Args:
        graph: of `quantization.reference`, or its float form.
        operators: how operators are written.
        half: whether weights in float are held as float16; arithmetic stays float32 where a kernel has no float16.
    """

    def __init__(self, graph: GraphModule, operators: Operators, *, half: bool = False) -> None:
        self.half = half
        self.writer = ModelWriter()
        self.build = TfliteBuilder(self.writer)
        self._graph, self._operators = graph, operators
        self._real: dict[Node, Held | tuple[Held, ...]] = {}
        self._codes: dict[Node, Held] = {}
        self._inputs: dict[Node, Held] = {}

    def input(self, node: Node) -> Held:
        """Return the model's input; an image is turned channels last once, before all else."""
        shape = tuple(node.meta["val"].shape)
        dtype = str(node.meta["val"].dtype).removeprefix("torch.")
        if node not in self._inputs:
            given = Held.plain(self.writer.tensor(shape, dtype, name=node.name))
            self._inputs[node] = self._real[node] = given
            if len(shape) == 4:
                self.writer.place = "preprocess"
                self._real[node] = Held.map(as_map(self.build, given))
        return self._inputs[node]

    def real(self, node: Node) -> Held:
        """Return a node's values, not quantized."""
        held = self.several(node)
        assert isinstance(held, Held), f"{node.name} has several results"
        return held

    def several(self, node: Node) -> Held | tuple[Held, ...]:
        """Return a node's values, or the several results that it has."""
        if node not in self._real:
            written = self._write_real(node)
            check_result(node, written)
            self._real[node] = written
        return self._real[node]

    def codes(self, quantizer: Node) -> Held:
        """Return the int8 codes that a quantize node makes."""
        if quantizer not in self._codes:
            written = self._write_codes(quantizer)
            check_result(quantizer, written)
            self._codes[quantizer] = written
        return self._codes[quantizer]

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

    def is_constant(self, node: object) -> bool:
        """Tell whether a node is a constant of the graph."""
        return isinstance(node, Node) and node.op == "get_attr"

    def weight(self, node: Node) -> tuple[Tensor, Tensor] | None:
        """Return int8 codes and scales of a quantized weight; None for one in float."""
        if not is_dequantize(node) or argument_node(node).op != "get_attr":
            return None
        scale = node.args[1]
        scales = self.constant(scale) if isinstance(scale, Node) else torch.tensor([float(str(scale))])
        return self.constant(node.args[0]), scales

    def float_weight(self, array: NDArray[np.generic]) -> Value:
        """Return a weight in float32, or in float16 with its conversion."""
        if not self.half:
            return self.writer.constant(array, name="weight")
        stored = self.writer.constant(array.astype(np.float16), name="weight")
        return self.build.dequantize(stored)

    def values(self, argument: object) -> Tensor:
        """Return the real values of a constant or of a quantized weight."""
        node = argument
        assert isinstance(node, Node)
        quantized = self.weight(node)
        if quantized is None:
            return self.constant(node)
        codes, scales = quantized
        return codes.to(torch.float32) * scales.reshape(-1, *[1] * (codes.dim() - 1))

    def _write_real(self, node: Node) -> Held | tuple[Held, ...]:
        if node.op == "get_attr":
            return Held.plain(self.build.constant(*_as_array(self.constant(node))))
        if is_dequantize(node):
            quantizer = self.quantizer_behind(node)
            if quantizer is None:
                return Held.plain(self.build.constant(self.values(node).numpy(), np.float32))
            codes = self.codes(quantizer)
            self._go_to(node)
            return Held(self.build.dequantize(codes.value), codes.shape, codes.layout, codes.of)
        name = op_name(node) or str(getattr(node.target, "__name__", node.target))
        moving, real = self._operators.moving.get(name), self._operators.real.get(name)
        if moving is None and real is None:
            raise UnsupportedOperator(
                f"{node.target} in module {where(node)}: not known how TFLite computes "
                "it. Replace it in the model, or add it to qexport/plugins/tflite (docs/plugins.md)."
            )
        check_options(node)
        self._ask_inputs(node)
        self._go_to(node)
        if moving is not None:
            return moving(self, node, self.real)
        assert real is not None
        return real(self, node)

    def _ask_inputs(self, node: Node) -> None:
        """Write what a node reads before its own place is set."""
        for source in node.all_input_nodes:
            if source.op != "get_attr" and self._operators.reads_values(node, source):
                self.several(source)

    def _write_codes(self, quantizer: Node) -> Held:
        source, scale = argument_node(quantizer), scale_of(quantizer)
        base = base_of(source)
        name = op_name(base)
        moving, integer = self._operators.moving.get(name), self._operators.integer.get(name)
        held: Held | None = None
        check_options(base)
        if moving is not None and base is source and self._all_integers(base):
            for node in base.all_input_nodes:
                self._behind(node)
            self._go_to(base)
            held = moving(self, base, self._behind)
        elif integer is not None and self._reads_integers(base):
            held = integer(self, base, "" if base is source else activation_of(source), scale)
        if held is None:
            real = self.real(source)
            self._go_to(quantizer)
            held = Held(self.build.quantize(real.value, scale), real.shape, real.layout, real.of)
        return held

    def _behind(self, node: Node) -> Held:
        quantizer = self.quantizer_behind(node)
        assert quantizer is not None
        return self.codes(quantizer)

    def _all_integers(self, node: Node) -> bool:
        return all(self.quantizer_behind(source) is not None for source in node.all_input_nodes)

    def _reads_integers(self, node: Node) -> bool:
        return self.quantizer_behind(node.all_input_nodes[0]) is not None

    def go_to(self, node: Node) -> None:
        """Let what is written from now on be named after the module that a node belongs to."""
        self._go_to(node)

    def _go_to(self, node: Node) -> None:
        path, call = site_of(node)
        self.writer.place = (f"{path}@{call}" if call else path) or self.writer.place


class Operators:
    """How operators are written, by their names in the graph."""

    def __init__(
        self, moving: Mapping[str, Moving], real: Mapping[str, Real], integer: Mapping[str, Integer]
    ) -> None:
        self.moving, self.real, self.integer = moving, real, integer

    def reads_values(self, node: Node, source: Node) -> bool:
        """Tell whether a node reads a source's values; a weighted operator takes its weights as constants."""
        del self
        return not (op_name(node) in ("conv2d", "linear") and source is not node.args[0])


def _as_array(tensor: Tensor) -> tuple[Any, type[np.generic]]:
    array = tensor.detach().numpy()
    return array, array.dtype.type
