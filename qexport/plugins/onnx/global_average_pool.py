"""The mean over height and width as GlobalAveragePool: the same values, and runtimes have an integer kernel for it.

torch.onnx writes ReduceMean, which ONNX Runtime computes in float alone.
"""

from __future__ import annotations

import onnx_ir as ir

from qexport.plugins.onnx.builder import array_of

_SPATIAL = {2, 3}


def use_global_average_pool(model: ir.Model) -> None:
    """Replace each ReduceMean over the spatial axes of a feature map that keeps them, as 1 x 1."""
    for node in list(model.graph):
        if node.op_type != "ReduceMean" or len(node.inputs) < 2:
            continue
        source, axes = node.inputs[0], array_of(node.inputs[1])
        keeps = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1
        if source is None or source.shape is None or len(source.shape) != 4 or axes is None or not keeps:
            continue
        if {int(axis) % 4 for axis in axes.reshape(-1)} != _SPATIAL:
            continue
        pool = ir.node("GlobalAveragePool", [source])
        pool.metadata_props.update(node.metadata_props)
        model.graph.insert_before(node, pool)
        old, new = node.outputs[0], pool.outputs[0]
        new.name, new.dtype, new.shape = old.name, old.dtype, old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
