"""Look inside the graphs: the local, teacher-forced reference, and a recorder of whole runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from qexport.quantization.graph import argument_node, constant_of, is_dequantize, is_quantize, op_name
from qexport.quantization.reference import QuantizedDetector


class LocalReference:
    """Answers for one quantized tensor: given the integers that a runtime fed to the layer, which came out?

    A disagreement of more than a step is then the runtime's or the lowering's, and belongs to this layer alone.
    """

    def __init__(self, detector: QuantizedDetector) -> None:
        self._graph = detector.graph
        self._nodes = detector.quantize_nodes
        self._key_of = {node.args[0]: key for key, node in detector.quantize_nodes.items()}
        self._proposals = proposals_node(detector.graph)
        self._constants: dict[Node, Tensor] = {}

    def expected(self, key: str, codes: Mapping[str, Tensor], frame: Tensor, proposals: Tensor) -> Tensor:
        """Return the int8 codes that should have come out.

        Args:
            key: of the tensor that is asked for.
            codes: int8, by key, as the runtime computed them. What it fed to the layer is among them; a tensor that
                is not to be had is computed from those before it.
            frame: the artifact's input.
            proposals: (R, 4) float32, as the runtime computed them.
        """
        node = self._nodes[key]
        values: dict[Node, Any] = {self._proposals: proposals}
        with torch.no_grad():
            source = self._value(argument_node(node), values, codes, frame)
            result: Tensor = node.target(source, *node.args[1:])  # type: ignore[operator]
        return result

    def _value(self, node: Node, values: dict[Node, Any], codes: Mapping[str, Tensor], frame: Tensor) -> Any:
        if node in values:
            return values[node]
        if node.op == "placeholder":
            return frame
        if node.op == "get_attr":
            return constant_of(self._graph, node)
        if is_dequantize(node):
            source = argument_node(node)
            if not (is_quantize(source) and source.args[0] in self._key_of):
                return self._constant(node)
            key = self._key_of[source.args[0]]
            stored = codes[key] if key in codes else self._value(source, values, codes, frame)
            values[node] = node.target(stored, *node.args[1:])  # type: ignore[operator]
            return values[node]
        arguments = map_arg(node.args, lambda arg: self._value(arg, values, codes, frame))
        keywords = map_arg(node.kwargs, lambda arg: self._value(arg, values, codes, frame))
        values[node] = node.target(*arguments, **keywords)  # type: ignore[operator]
        return values[node]

    def _constant(self, node: Node) -> Tensor:
        """Return a dequantized weight, computed once."""
        if node not in self._constants:
            arguments = map_arg(node.args, lambda arg: constant_of(self._graph, arg))
            self._constants[node] = node.target(*arguments)  # type: ignore[operator]
        return self._constants[node]


class Recorder(Interpreter):
    """Runs a graph and keeps the values that were asked for.

    Args:
        graph: to run.
        wanted: key to keep a value under, by node name.
        pinned: values that replace what a node computes for everyone after it, by node name. What the node
            itself computed is recorded where it is wanted.
    """

    def __init__(
        self, graph: GraphModule, wanted: Mapping[str, str], pinned: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(graph)
        self._wanted, self._pinned = wanted, pinned or {}
        self.values: dict[str, Tensor] = {}

    def run_node(self, node: Node) -> Any:
        """Run one node, keep it if it is wanted, replace it if it is pinned."""
        result = super().run_node(node)
        if node.name in self._wanted:
            self.values[self._wanted[node.name]] = result
        return self._pinned.get(node.name, result)


def proposals_node(graph: GraphModule) -> Node:
    """Return the node whose value the box head pools: (R, 4) float32, pixels of the resized image."""
    roi_align = next(node for node in graph.graph.nodes if op_name(node) == "multiscale_roi_align")
    boxes = roi_align.args[1]
    assert isinstance(boxes, Node)
    return boxes
