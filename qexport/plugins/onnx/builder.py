"""Write ONNX nodes into a graph, named after the module they belong to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike


class Builder:
    """Inserts nodes before a given node.

    Args:
        before: the node that the new ones are written for, mostly a placeholder that they replace.
    """

    def __init__(self, before: ir.Node) -> None:
        graph = before.graph
        assert isinstance(graph, ir.Graph)
        self.graph = graph
        self._before = before
        self._constants = 0
        self._prefix = before.outputs[0].name or ""

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        outputs: int = 1,
        domain: str = "",
        **attributes: int | float | str | Sequence[int] | ir.Graph,
    ) -> ir.Value:
        """Append one operator and return its first output."""
        node = ir.node(op_type, list(inputs), attributes, domain=domain, num_outputs=outputs)
        node.metadata_props.update(self._before.metadata_props)
        self.graph.insert_before(self._before, node)
        return node.outputs[0]

    def constant(self, value: ArrayLike, dtype: np.dtype[np.generic] | type[np.generic]) -> ir.Value:
        """Return an initializer that holds `value`."""
        name = f"{self._prefix}/constant_{self._constants}"
        self._constants += 1
        return add_initializer(self.graph, name, np.asarray(value, dtype=dtype))

    def replace_with(self, output: ir.Value) -> None:
        """Give `output` to everyone who used the node's first output, and remove the node."""
        old = self._before.outputs[0]
        output.dtype, output.shape = old.dtype, old.shape
        old.replace_all_uses_with(output, replace_graph_outputs=True)
        self.graph.remove(self._before, safe=True)


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Register an array as an initializer of the graph and return its value."""
    tensor = ir.tensor(
        np.asarray(array, order="C"), name=name
    )  # ascontiguousarray would add an axis to a scalar
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def array_of(value: ir.Value | None) -> np.ndarray | None:
    """Return the constant that a value holds; None where it is computed."""
    if value is None or value.const_value is None:
        return None
    array: np.ndarray = value.const_value.numpy()
    return array


def scalar_of(value: ir.Value | None) -> float:
    """Return a constant of one element."""
    array = array_of(value)
    if array is None or array.size != 1:
        raise ValueError(f"{value.name if value else None} is no constant of one element")
    return float(array.reshape(()))
