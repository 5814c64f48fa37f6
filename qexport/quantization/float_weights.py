"""The quantized reference with float weights: feature maps alone are quantized."""

from __future__ import annotations

import copy

from torch.fx import Node

from qexport.quantization.graph import constant_of, is_dequantize, op_name
from qexport.quantization.quantizer import WEIGHTED
from qexport.quantization.reference import QuantizedDetector


def with_float_weights(detector: QuantizedDetector) -> QuantizedDetector:
    """Return a detector whose weights and biases are those of the float graph; the one given stays as it is."""
    graph = copy.deepcopy(detector.graph)
    floats = {node.name: node for node in detector.float_graph.graph.nodes}
    for node in list(graph.graph.nodes):
        if op_name(node) not in WEIGHTED or not is_dequantize(node.args[1]):
            continue
        for place, source in enumerate(floats[node.name].args[1:3], start=1):
            if isinstance(source, Node):
                name = f"{node.name}_float_{place}"
                graph.register_buffer(name, constant_of(detector.float_graph, source))
                with graph.graph.inserting_before(node):
                    constant = graph.graph.get_attr(name)
                constant.meta = {**source.meta}
                node.update_arg(place, constant)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()
    by_name = {node.name: node for node in graph.graph.nodes}
    nodes = {key: by_name[node.name] for key, node in detector.quantize_nodes.items()}
    return QuantizedDetector(detector.static, detector.float_graph, graph, nodes)
