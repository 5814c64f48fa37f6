"""The quantized reference with any of its quantizers switched off: what each of them costs, without a new graph.

Which quantizers a choice of float layers leaves is asked of the quantizer itself, so that a detector that is tried
here is, bit for bit, the one that `keep_float` would give.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

import msgspec
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torchao.quantization.pt2e.quantizer import QuantizationSpec
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from qexport.encodings import Encodings, digest_of_rows
from qexport.layers import stage_of
from qexport.quantization.graph import (
    argument_node,
    base_of,
    constant_of,
    is_dequantize,
    is_quantize,
    op_name,
    scale_of,
    site_of,
    weight_key,
)
from qexport.quantization.observers import ChannelMax, MagnitudeHistogram
from qexport.quantization.quantizer import (
    QUANTIZED_STAGES,
    WEIGHTED,
    Plan,
    SymmetricInt8Quantizer,
    activation_spec,
    weight_spec,
)
from qexport.quantization.reference import QuantizedDetector

Values: TypeAlias = dict[Node, Any]
"""What every node of the graph computed, in one run."""


class PartlyQuantized:
    """Runs a quantized detector with some of its rows.

    Args:
        detector: the detector with all of its rows; it is not changed.
    """

    def __init__(self, detector: QuantizedDetector) -> None:
        self._detector = detector
        self._key_of = {argument_node(node): key for key, node in detector.quantize_nodes.items()}
        floats = {node.name: node for node in detector.float_graph.graph.nodes}
        self._output_keys = {base_of(source): key for source, key in self._key_of.items()}
        self._weights: dict[Node, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = {}
        self._order = [node for node in detector.graph.graph.nodes if not self._is_weight(node)]
        for node in self._order:
            if op_name(node) in WEIGHTED and is_dequantize(node.args[1]):
                self._weights[node] = (self._quantized_weight(node), self._float_weight(floats[node.name]))
        self._scales: dict[str, float] = {}
        self.keys = frozenset(self._key_of.values()) | {weight_key(node) for node in self._weights}

    def keys_with(self, keep_float: Collection[str]) -> tuple[frozenset[str], Plan]:
        """Return the keys of the rows that patterns of module paths leave, and what becomes float."""
        asked: set[str] = set()

        def activation(key: str) -> QuantizationSpec:
            asked.add(key)
            return activation_spec(MagnitudeHistogram)

        def weight(key: str) -> QuantizationSpec:
            asked.add(key)
            return weight_spec(ChannelMax)

        quantizer = SymmetricInt8Quantizer(
            activation, weight if self._weights else None, keep_float=tuple(keep_float)
        )
        graph = self._detector.float_graph
        try:
            quantizer.annotate(graph)
        finally:
            for node in graph.graph.nodes:
                node.meta.pop(Q_ANNOTATION_KEY, None)
        return frozenset(asked), quantizer.plan

    def rows_of(self, path: str) -> frozenset[str]:
        """Return the keys of a layer's own rows: weights, what it reads, what it gives."""
        keys = set()
        for node, key in self._output_keys.items():
            if site_of(node).path == path:
                reads = [source for source in node.all_input_nodes if is_dequantize(source)]
                keys |= {key, *(self._key_at(source) for source in reads if not self._is_weight(source))}
                keys |= {weight_key(node)} if node in self._weights else set()
        return frozenset(keys)

    def encodings_with(self, encodings: Encodings, keep_float: Collection[str]) -> Encodings:
        """Return the table that patterns of module paths leave: its rows are those of the whole one.

        Args:
            encodings: the table that the detector was quantized with.
            keep_float: the patterns; those that the table has already are kept.
        """
        patterns = tuple(dict.fromkeys((*encodings.keep_float, *keep_float)))
        keys, plan = self.keys_with(patterns)
        rows = tuple(row for row in encodings.rows if row.key in keys)
        return msgspec.structs.replace(
            encodings,
            keep_float=patterns,
            rows=rows,
            float_rows=plan.float_rows,
            rows_sha256=digest_of_rows(rows, plan.float_rows),
        )

    def layers(self) -> tuple[str, ...]:
        """Return the module paths of the quantized convolutions and linears, in order of execution."""
        return tuple(dict.fromkeys(site_of(node).path for node in self._weights))

    def nodes_of(self, path: str) -> tuple[Node, ...]:
        """Return the calls of a convolution or linear."""
        return tuple(node for node in self._weights if site_of(node).path == path)

    def weight_shape(self, path: str) -> tuple[int, ...]:
        """Return the shape of a layer's weights."""
        return tuple(self._weights[self.nodes_of(path)[0]][0][0].shape)

    def replace_layer(self, path: str, *, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        """Let a layer compute with other weights where it is quantized.

        Args:
            path: of the convolution or linear.
            weight: real values that its scales hold exactly; None: its own.
            bias: real values, which are put on the grid of each call; None: its own.
        """
        for node in self.nodes_of(path):
            own, floats = self._weights[node]
            new = [own[0] if weight is None else weight, *own[1:]]
            if bias is not None:
                graph = self._detector.graph
                stored = argument_node(node, 1)
                step = scale_of(argument_node(node)) * constant_of(graph, argument_node(stored, 1))
                new[1:] = [torch.round(bias / step) * step]
            self._weights[node] = (tuple(new), floats)

    def replace_scales(self, scales: Mapping[str, float]) -> None:
        """Let activations be quantized with other scales, by key; those that are not named have their own."""
        self._scales = dict(scales)

    def run(
        self, frame: Tensor, keys: Collection[str], *, pinned: Mapping[Node, Tensor] | None = None
    ) -> Values:
        """Return what every node computes when only the rows of these keys are applied.

        Args:
            frame: what the static detector takes.
            keys: of activations and weights.
            pinned: values that stand for what a node computes.
        """
        values: Values = {}
        for node in self._order:
            values[node] = self._compute(node, values, keys, frame, pinned or {})
        return values

    def rerun(
        self,
        base: Values,
        base_keys: Collection[str],
        keys: Collection[str],
        *,
        pinned: Collection[Node] = (),
        touched: Collection[str] = (),
    ) -> Values:
        """Return what `run` would with other keys; computes only what changes.

        Args:
            base: of a run on the same frame.
            base_keys: the keys of that run.
            keys: the keys now.
            pinned: nodes whose values stay as they are.
            touched: module paths of layers, and keys of activations, that were replaced since.
        """
        changed = frozenset(base_keys) ^ frozenset(keys)
        other = {*changed, *touched}
        values: Values = {}
        fresh: set[Node] = set()
        for node in self._order:
            mine = node in self._weights and (weight_key(node) in changed or site_of(node).path in touched)
            mine = mine or self._key_at(node) in other
            if node in pinned or not (mine or any(source in fresh for source in node.all_input_nodes)):
                values[node] = base[node]
                continue
            values[node] = self._compute(node, values, keys, base[self._order[0]], {})
            if not _same(values[node], base[node]):
                fresh.add(node)
        return values

    def outputs(self, values: Values) -> tuple[Tensor, ...]:
        """Return what the detector gives: boxes, scores, labels, count."""
        given = self._order[-1].args[0]
        assert isinstance(given, (tuple, list))
        return tuple(values[node] for node in given)

    def head_outputs(self) -> dict[str, tuple[Node, ...]]:
        """Return the nodes whose values box arithmetic reads, by module path: logits and deltas of both heads."""
        found: dict[str, list[Node]] = {}
        for node in self._order:
            if not is_dequantize(node):
                continue
            source = argument_node(argument_node(node))
            readers = {stage_of(site_of(user).path) for user in node.users}
            if readers - QUANTIZED_STAGES:
                found.setdefault(site_of(source).path, []).append(node)
        return {path: tuple(nodes) for path, nodes in found.items()}

    def _compute(
        self,
        node: Node,
        values: Values,
        keys: Collection[str],
        frame: Tensor,
        pinned: Mapping[Node, Tensor],
    ) -> Any:
        if node in pinned:
            return pinned[node]
        if node.op == "placeholder":
            return frame
        if node.op == "get_attr":
            return constant_of(self._detector.graph, node)
        if node.op == "output":
            return None
        if self._is_off(node, values, keys):
            return values[argument_node(node)]
        arguments = map_arg(node.args, values.get)
        keywords = map_arg(node.kwargs, values.get)
        scale = self._scales.get(self._key_at(node))
        if scale is not None:
            arguments = (arguments[0], scale, *arguments[2:])
        if node in self._weights:
            weights = self._weights[node][0 if weight_key(node) in keys else 1]
            arguments = (arguments[0], *weights, *arguments[1 + len(weights) :])
        with torch.no_grad():
            return node.target(*arguments, **keywords)  # type: ignore[operator]

    def _key_at(self, node: Node) -> str:
        """Return the key of the activation that a node quantizes or dequantizes; empty for any other node."""
        if is_quantize(node):
            return self._key_of[argument_node(node)]
        return self._key_of[argument_node(argument_node(node))] if is_dequantize(node) else ""

    def _is_off(self, node: Node, values: Values, keys: Collection[str]) -> bool:
        """Tell whether a quantizer is to be left out, or a dequantizer has nothing to do after one that was."""
        if is_quantize(node):
            return self._key_of[argument_node(node)] not in keys
        return is_dequantize(node) and bool(values[argument_node(node)].is_floating_point())

    @staticmethod
    def _is_weight(node: Node) -> bool:
        """Tell whether a node is but a step to a quantized weight, or the bias beside one."""
        if is_dequantize(node):
            return argument_node(node).op == "get_attr"
        return node.op == "get_attr" and all(
            is_dequantize(user) or (op_name(user) in WEIGHTED and is_dequantize(user.args[1]))
            for user in node.users
        )

    def _quantized_weight(self, node: Node) -> tuple[Tensor, ...]:
        graph, stored = self._detector.graph, argument_node(node, 1)
        arguments = map_arg(stored.args, lambda arg: constant_of(graph, arg))
        with torch.no_grad():
            weight: Tensor = stored.target(*arguments)  # type: ignore[operator]
        return weight, *_bias(graph, node)

    def _float_weight(self, node: Node) -> tuple[Tensor, ...]:
        graph = self._detector.float_graph
        return constant_of(graph, argument_node(node, 1)), *_bias(graph, node)


def _bias(graph: GraphModule, node: Node) -> tuple[Tensor, ...]:
    return (constant_of(graph, argument_node(node, 2)),) if len(node.args) > 2 and node.args[2] else ()


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, (tuple, list)):
        return all(_same(one, other) for one, other in zip(first, second, strict=True))
    return bool(first == second)
