"""Write ONNX nodes into a graph, named after the module they belong to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike

from qexport.plugins.operations import Dtype, Operations, Shared

Integers = Sequence[int] | Shared[ir.Value]


class Builder:
    """Inserts nodes before a given node: the ONNX back end of `Operations`.

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
        **attributes: int | float | str | Sequence[int] | ir.Graph | ir.TensorProtocol,
    ) -> ir.Value:
        """Append one operator and return its first output."""
        node = ir.node(op_type, list(inputs), attributes, domain=domain, num_outputs=outputs)
        self._place(node)
        return node.outputs[0]

    def _place(self, node: ir.Node) -> None:
        node.metadata_props.update(self._before.metadata_props)
        self.graph.insert_before(self._before, node)

    def constant(self, value: ArrayLike, dtype: Dtype) -> ir.Value:
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

    def integers(self, *numbers: int) -> Shared[ir.Value]:
        """Return integers that several operations take, as one initializer."""
        return Shared(numbers, self.constant(list(numbers), np.int64))

    def _stored(self, numbers: Integers) -> ir.Value:
        if isinstance(numbers, Shared):
            return numbers.stored
        return self.constant(list(numbers), np.int64)

    def add(self, first: ir.Value, second: ir.Value) -> ir.Value:
        """Write Add."""
        return self.op("Add", [first, second])

    def sub(self, first: ir.Value, second: ir.Value) -> ir.Value:
        """Write Sub."""
        return self.op("Sub", [first, second])

    def mul(self, first: ir.Value, second: ir.Value) -> ir.Value:
        """Write Mul."""
        return self.op("Mul", [first, second])

    def div(self, first: ir.Value, second: ir.Value) -> ir.Value:
        """Write Div."""
        return self.op("Div", [first, second])

    def minimum(self, first: ir.Value, second: ir.Value) -> ir.Value:
        """Write Min."""
        return self.op("Min", [first, second])

    def maximum(self, first: ir.Value, second: ir.Value) -> ir.Value:
        """Write Max."""
        return self.op("Max", [first, second])

    def clip(self, value: ir.Value, low: float, high: float) -> ir.Value:
        """Write Clip."""
        return self.op("Clip", [value, self.constant(low, np.float32), self.constant(high, np.float32)])

    def floor(self, value: ir.Value) -> ir.Value:
        """Write Floor."""
        return self.op("Floor", [value])

    def log(self, value: ir.Value) -> ir.Value:
        """Write Log."""
        return self.op("Log", [value])

    def sqrt(self, value: ir.Value) -> ir.Value:
        """Write Sqrt."""
        return self.op("Sqrt", [value])

    def absolute(self, value: ir.Value) -> ir.Value:
        """Write Abs."""
        return self.op("Abs", [value])

    def equal(self, first: ir.Value, second: ir.Value) -> ir.Value:
        """Write Equal."""
        return self.op("Equal", [first, second])

    def greater(self, first: ir.Value, second: ir.Value) -> ir.Value:
        """Write Greater."""
        return self.op("Greater", [first, second])

    def less_or_equal(self, first: ir.Value, second: ir.Value) -> ir.Value:
        """Write LessOrEqual."""
        return self.op("LessOrEqual", [first, second])

    def logical_and(self, first: ir.Value, second: ir.Value) -> ir.Value:
        """Write And."""
        return self.op("And", [first, second])

    def logical_or(self, first: ir.Value, second: ir.Value) -> ir.Value:
        """Write Or."""
        return self.op("Or", [first, second])

    def logical_not(self, value: ir.Value) -> ir.Value:
        """Write Not."""
        return self.op("Not", [value])

    def cast(self, value: ir.Value, dtype: Dtype) -> ir.Value:
        """Write Cast."""
        return self.op("Cast", [value], to=ir.DataType.from_numpy(np.dtype(dtype)))

    def gather(self, value: ir.Value, index: ir.Value, axis: int | None = None) -> ir.Value:
        """Write Gather."""
        if axis is None:
            return self.op("Gather", [value, index])
        return self.op("Gather", [value, index], axis=axis)

    def slice(self, value: ir.Value, starts: Integers, ends: Integers, axes: Integers) -> ir.Value:
        """Write Slice."""
        return self.op("Slice", [value, self._stored(starts), self._stored(ends), self._stored(axes)])

    def concat(self, values: Sequence[ir.Value], axis: int) -> ir.Value:
        """Write Concat."""
        return self.op("Concat", values, axis=axis)

    def reshape(self, value: ir.Value, shape: Integers) -> ir.Value:
        """Write Reshape."""
        return self.op("Reshape", [value, self._stored(shape)])

    def unsqueeze(self, value: ir.Value, axes: Integers) -> ir.Value:
        """Write Unsqueeze."""
        return self.op("Unsqueeze", [value, self._stored(axes)])

    def squeeze(self, value: ir.Value, axes: Integers) -> ir.Value:
        """Write Squeeze."""
        return self.op("Squeeze", [value, self._stored(axes)])

    def transpose(self, value: ir.Value, order: Sequence[int]) -> ir.Value:
        """Write Transpose."""
        return self.op("Transpose", [value], perm=order)

    def expand(self, value: ir.Value, shape: Integers) -> ir.Value:
        """Write Expand."""
        return self.op("Expand", [value, self._stored(shape)])

    def pad(self, value: ir.Value, counts: Integers, *, edge: bool = False) -> ir.Value:
        """Write Pad."""
        if edge:
            return self.op("Pad", [value, self._stored(counts)], mode="edge")
        return self.op("Pad", [value, self._stored(counts)])

    def reduce_mean(self, value: ir.Value, axes: Integers) -> ir.Value:
        """Write ReduceMean."""
        return self.op("ReduceMean", [value, self._stored(axes)], keepdims=1)

    def largest(self, value: ir.Value) -> ir.Value:
        """Write ReduceMax over all axes."""
        return self.op("ReduceMax", [value], keepdims=0)

    def matmul(self, first: ir.Value, second: ir.Value) -> ir.Value:
        """Write MatMul."""
        return self.op("MatMul", [first, second])

    def average_pool(self, value: ir.Value, window: Sequence[int], stride: Sequence[int]) -> ir.Value:
        """Write AveragePool."""
        return self.op("AveragePool", [value], kernel_shape=window, strides=stride)

    def grid_sample(self, value: ir.Value, grid: ir.Value) -> ir.Value:
        """Write GridSample; opset 18 calls the mode bilinear."""
        return self.op("GridSample", [value, grid], mode="bilinear", padding_mode="border", align_corners=1)

    def repeat(
        self,
        start: ir.Value,
        turn: Callable[[Operations[ir.Value], ir.Value], tuple[ir.Value, ir.Value]],
        most: int,
        *,
        name: str,
    ) -> ir.Value:
        """Write Loop; `start` is float32."""
        number = ir.Value(name="turn", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
        going = ir.Value(name="going", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
        kept = ir.Value(name="kept", type=ir.TensorType(ir.DataType.FLOAT), shape=start.shape)
        inner = _LoopBody(self._before)
        again, after = turn(inner, kept)
        again.type, again.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([])
        after.type, after.shape = ir.TensorType(ir.DataType.FLOAT), start.shape
        for index, node in enumerate(inner.nodes):
            node.name = node.outputs[0].name = f"{start.name}/loop/{node.op_type}_{index}"
        body = ir.Graph([number, going, kept], [again, after], nodes=inner.nodes, name=name)
        limits = [self.constant(most, np.int64), self.constant(True, np.bool_)]
        return self.op("Loop", [*limits, start], body=body)


class _LoopBody(Builder):
    """Collects the nodes of a loop's body, its constants among them."""

    def __init__(self, before: ir.Node) -> None:
        super().__init__(before)
        self.nodes: list[ir.Node] = []

    def _place(self, node: ir.Node) -> None:
        self.nodes.append(node)

    def constant(self, value: ArrayLike, dtype: Dtype) -> ir.Value:
        """Write Constant: a body has no initializers."""
        return self.op("Constant", [], value=ir.tensor(np.asarray(value, dtype=dtype)))


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
