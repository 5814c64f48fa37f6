"""Cross-layer equalisation: let the channels between two layers have ranges that one scale can hold.

Between a layer and the next, a channel may be divided by any positive number and the next layer's weights multiplied
by it: ReLU and max pooling let it pass, so that nothing changes in float (Nagel et al., Data-Free Quantization Through
Weight Equalization and Bias Correction, 2019, section 4.1). Where weights have a scale for each output channel it is
the activation whose channels have to be brought together: the factor is that of SmoothQuant (Xiao et al., 2023,
equation 4, alpha 0.5), square root of the activation's range over that of the weights that read it. Where a weight has
one scale, its channels have to be: the factor is that of the former paper, square root of the range of the channel's
own weights over that of those that read it, over and over until they hold still.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from qexport.detectors.static import StaticDetector
from qexport.quantization.graph import argument_node, export_graph, op_name, site_of
from qexport.quantization.quantizer import WEIGHTED
from qexport.settings import WeightScales

_PASSES = ("relu", "max_pool2d", "dropout")
"""What a positive factor passes through."""
_SMALLEST = 1e-6
SWEEPS = 20
"""How often all links are gone through where weights are brought together: each moves what its neighbours found."""


@dataclass(frozen=True, slots=True)
class Link:
    """A layer, and all that read its output, which are layers too."""

    producer: str
    readers: tuple[str, ...]


def equalize(
    folded: StaticDetector,
    frames: Iterable[NDArray[np.generic]],
    *,
    weight_scales: WeightScales = "per-channel",
) -> tuple[StaticDetector, tuple[Link, ...]]:
    """Return a detector that computes the same with channels of more equal range.

    Args:
        folded: the static detector, BatchNorm folded; it is not changed.
        frames: what it takes; looked at only where weights have a scale for each channel.
        weight_scales: how the weights are quantized, which decides what is brought together.

    Returns:
        The detector, and between which layers channels were scaled.
    """
    graph = export_graph(folded)
    links = find_links(graph)
    whole = weight_scales == "per-tensor"
    ranges = {} if whole else _channel_ranges(graph, links, frames)
    equal = copy.deepcopy(folded)
    with torch.no_grad():
        for link in links * (SWEEPS if whole else 1):
            producer = equal.get_submodule(link.producer)
            readers = [equal.get_submodule(path) for path in link.readers]
            own = _output_ranges(producer) if whole else ranges[link.producer]
            read = torch.stack([_input_ranges(reader) for reader in readers]).amax(0)
            factors = (own.clamp(min=_SMALLEST) / read.clamp(min=_SMALLEST)).sqrt()
            # A channel that is silent, or that nothing reads, has nothing to be equalised.
            factors[(own < _SMALLEST) | (read < _SMALLEST)] = 1.0
            _scale(producer, readers, factors)
    return equal, links


def find_links(graph: GraphModule) -> tuple[Link, ...]:
    """Return where a channel can be scaled: every reader, behind ReLU and max pooling, is a layer.

    It is of one group or depthwise, so that it has weights of its own for each channel that it reads.
    """
    nodes: dict[str, list[Node]] = {}
    for node in graph.graph.nodes:
        if op_name(node) in WEIGHTED:
            nodes.setdefault(site_of(node).path, []).append(node)
    links = []
    taken: set[str] = set()
    for path, calls in nodes.items():
        readers = [reader for call in calls for reader in _readers(call)]
        paths = tuple(
            dict.fromkeys(site_of(reader).path for reader in readers if op_name(reader) in WEIGHTED)
        )
        whole = all(op_name(reader) in WEIGHTED and _reads_channels(reader) for reader in readers)
        # A layer that reads this output in one call and another in the next cannot be scaled for both.
        alone = all(_reads_only(nodes[reader], calls) for reader in paths) and not taken & set(paths)
        if readers and whole and alone and path not in paths:
            links.append(Link(path, paths))
            taken |= set(paths)
    return tuple(links)


def _readers(node: Node) -> list[Node]:
    found = []
    for user in node.users:
        found += _readers(user) if op_name(user) in _PASSES else [user]
    return found


def _reads_only(readers: list[Node], producers: list[Node]) -> bool:
    return all(_source(reader) in producers for reader in readers)


def _source(reader: Node) -> Node:
    node = reader.args[0]
    while isinstance(node, Node) and op_name(node) in _PASSES:
        node = node.args[0]
    assert isinstance(node, Node)
    return node


def _groups(node: Node) -> int:
    groups = node.args[6] if op_name(node) == "conv2d" and len(node.args) > 6 else 1
    assert isinstance(groups, int)
    return groups


def _reads_channels(node: Node) -> bool:
    """Tell whether a layer has weights of its own for each channel that it reads."""
    return _groups(node) == 1 or argument_node(node, 1).meta["val"].shape[1] == 1


def _channel_ranges(
    graph: GraphModule, links: Iterable[Link], frames: Iterable[NDArray[np.generic]]
) -> Mapping[str, Tensor]:
    watcher = _Watcher(graph, {link.producer for link in links})
    with torch.no_grad():
        for frame in frames:
            watcher.run(torch.from_numpy(frame))
    return watcher.ranges


class _Watcher(Interpreter):
    """Notes the largest magnitude of each channel that the readers of a layer see."""

    def __init__(self, graph: GraphModule, paths: set[str]) -> None:
        super().__init__(graph)
        self._paths = paths
        self.ranges: dict[str, Tensor] = {}

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        path = site_of(node).path
        if op_name(node) in WEIGHTED and path in self._paths:
            passed = result.relu() if any(op_name(user) == "relu" for user in node.users) else result
            seen = passed.abs().transpose(0, 1).flatten(1).amax(1)
            self.ranges[path] = torch.maximum(self.ranges[path], seen) if path in self.ranges else seen
        return result


def _output_ranges(producer: nn.Module) -> Tensor:
    weight = producer.weight
    assert isinstance(weight, Tensor)
    return weight.flatten(1).abs().amax(1)


def _input_ranges(reader: nn.Module) -> Tensor:
    weight, groups = reader.weight, _groups_of(reader)
    assert isinstance(weight, Tensor)
    by_input = weight.reshape(groups, -1) if groups > 1 else weight.transpose(0, 1).flatten(1)
    return by_input.abs().amax(1)


def _groups_of(reader: nn.Module) -> int:
    return reader.groups if isinstance(reader, nn.Conv2d) else 1


def _scale(producer: nn.Module, readers: list[nn.Module], factors: Tensor) -> None:
    weight, bias = producer.weight, producer.bias
    assert isinstance(weight, Tensor)
    weight /= factors.reshape(-1, *[1] * (weight.dim() - 1))
    if isinstance(bias, Tensor):
        bias /= factors
    for reader in readers:
        read = reader.weight
        assert isinstance(read, Tensor)
        # Depthwise, the outputs of a channel lie together: (channels * outputs of each, 1, ...).
        each = (
            factors.repeat_interleave(len(read) // len(factors)) if _groups_of(reader) > 1 else factors[None]
        )
        read *= each.reshape(*each.shape, *[1] * (read.dim() - each.dim()))
