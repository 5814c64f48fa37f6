"""An exported graph as calls of torch functions, looked up by name while they run: torch2trt hooks names.

A graph of `torch.export` calls ATen operators, which torch2trt cannot see. Each is called here under the name by
which a module would have called it; a quantizer and its dequantizer are one fake-quantizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from qexport.errors import UnsupportedOperator
from qexport.plugins.torch2trt.dotted import lookup
from qexport.quantization.graph import constant_of, is_dequantize, is_quantize, op_name, site_of

_SAME = (
    *(
        "abs",
        "add",
        "amax",
        "amin",
        "ceil",
        "clamp",
        "clamp_max",
        "clamp_min",
        "clone",
        "cos",
        "cumsum",
        "div",
    ),
    *(
        "eq",
        "erf",
        "exp",
        "floor",
        "floor_divide",
        "gather",
        "ge",
        "gt",
        "index_select",
        "le",
        "log",
        "logical_and",
    ),
    *(
        "logical_not",
        "logical_or",
        "logical_xor",
        "lt",
        "masked_fill",
        "maximum",
        "mean",
        "minimum",
        "mul",
        "narrow",
    ),
    *(
        "ne",
        "neg",
        "permute",
        "pow",
        "reciprocal",
        "remainder",
        "round",
        "rsqrt",
        "rsub",
        "select",
        "sigmoid",
    ),
    *(
        "sign",
        "sin",
        "softmax",
        "sqrt",
        "squeeze",
        "stack",
        "sub",
        "sum",
        "tanh",
        "topk",
        "transpose",
        "unbind",
    ),
    *(
        "unsqueeze",
        "where",
        "bitwise_and",
        "bitwise_not",
        "bitwise_or",
        "flatten",
        "t",
        "cat",
        "split",
        "chunk",
    ),
    *("relu", "zeros_like", "ones_like", "full_like", "arange", "full", "zeros", "ones", "scalar_tensor"),
)
_FUNCTIONAL = (
    *(
        "adaptive_avg_pool2d",
        "adaptive_max_pool2d",
        "avg_pool2d",
        "conv2d",
        "conv_transpose2d",
        "elu",
        "gelu",
    ),
    *(
        "group_norm",
        "hardsigmoid",
        "hardswish",
        "hardtanh",
        "layer_norm",
        "leaky_relu",
        "linear",
        "max_pool2d",
    ),
    *("pad", "relu6", "silu", "softplus"),
)
_METHODS = ("expand", "contiguous", "expand_as")
_OTHER = {
    "__and__": "torch.bitwise_and",
    "__or__": "torch.bitwise_or",
    "_unsafe_view": "torch.reshape",
    "view": "torch.reshape",
    "reshape": "torch.reshape",
    "concat": "torch.cat",
    "split_with_sizes": "torch.split",
}
TORCH_NAMES: dict[str, str] = {
    **{name: f"torch.{name}" for name in _SAME},
    **{name: f"torch.nn.functional.{name}" for name in _FUNCTIONAL},
    **{name: f"torch.Tensor.{name}" for name in _METHODS},
    **_OTHER,
}
"""Torch function of an ATen operator that takes the same arguments, by the operator's name."""
_OPERATORS = "qexport.detectors.operators"
_UPSAMPLING = {
    "upsample_nearest2d": "nearest",
    "_upsample_nearest_exact2d": "nearest-exact",
    "upsample_bilinear2d": "bilinear",
    "upsample_bicubic2d": "bicubic",
}
_FIRST_OF_SEVERAL = {
    "_native_batch_norm_legit_no_training": "torch.nn.functional.batch_norm",
    "max_pool2d_with_indices": "torch.nn.functional.max_pool2d",
}
"""Functions that give the first of the results of an ATen operator."""

Call = tuple[str, tuple[Any, ...], dict[str, Any]]
"""Dotted name of a torch function, its arguments, its keyword arguments."""


def torch_call(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Return the torch function call that a node of an exported graph stands for.

    Args:
        node: calls an ATen operator, or one of `qexport.detectors.operators`.
        args: of the call.
        kwargs: of the call.

    Raises:
        UnsupportedOperator: it is not known under which name a module calls this operator.
    """
    operator, name = str(node.target), op_name(node)
    namespace = operator.partition(".")[0]
    call: Call | None = None
    if namespace == "qexport":
        call = f"{_OPERATORS}.{name}", args, kwargs
    elif name in _UPSAMPLING:
        call = _interpolate(_UPSAMPLING[name], args)
    elif operator == "aten.slice.Tensor":
        call = _slice(*args)
    elif name == "_to_copy" or (name == "to" and "dtype" in kwargs):
        call = "torch.Tensor.to", (args[0], kwargs["dtype"]), {}
    elif name in _FIRST_OF_SEVERAL:
        call = _first_of_several(name, args)
    elif namespace == "aten" and name in TORCH_NAMES:
        call = TORCH_NAMES[name], args, kwargs
    if call is None:
        raise UnsupportedOperator(
            f"{operator} in module {site_of(node).path or '(the model itself)'}: not known under which name PyTorch "
            "calls it, so no converter can be found. Add it to qexport/plugins/torch2trt/functions.py, and a "
            "converter: docs/plugins.md shows how."
        )
    return call


class TorchCalls(nn.Module):
    """A graph of `torch.export`, quantized or not, that runs as calls of torch functions by name.

    int8 weights are held as the real values they stand for, and quantized again by a fake-quantizer: the same
    codes, since each value is a whole multiple of its scale.
    """

    def __init__(self, graph: GraphModule, *, after_node: Callable[[Node, Any], None] | None = None) -> None:
        """Hold a graph.

        Args:
            graph: of `quantization.reference` or `quantization.graph.export_graph`.
            after_node: called with each node and its result, which has its TensorRT tensor while torch2trt converts.
        """
        super().__init__()
        self._interpreter = _Interpreter(graph, after_node)

    @property
    def place(self) -> str:
        """Where the node that is running stands: `PATH`, or `PATH@CALL` from a module's second call on."""
        return self._interpreter.place

    def forward(self, *inputs: Tensor) -> Any:
        """Return what the graph returns."""
        return self._interpreter.run(*inputs)


class _Interpreter(Interpreter):
    def __init__(self, graph: GraphModule, after_node: Callable[[Node, Any], None] | None) -> None:
        super().__init__(graph)
        self.extra_traceback = False
        self.place = ""
        self._graph, self._after_node = graph, after_node
        self._weights = {
            node: _real_weights(graph, node)
            for node in graph.graph.nodes
            if is_dequantize(node) and node.args[0].op == "get_attr"
        }

    def run_node(self, n: Node) -> Any:
        self.place = _place(n)
        if is_quantize(n) or is_dequantize(n):
            result = self._fake_quantize(n)
        elif op_name(n) == "_assert_tensor_metadata":
            result = None  # holds by construction: every shape is fixed
        elif op_name(n):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            name, args, kwargs = torch_call(n, tuple(map(_plain, args)), kwargs)
            result = lookup(name)(*args, **kwargs)
            if op_name(n) in _FIRST_OF_SEVERAL:
                result = (result,)
        else:
            result = super().run_node(n)
        if self._after_node is not None:
            self._after_node(n, result)
        return result

    def _fake_quantize(self, node: Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        if kwargs:
            raise UnsupportedOperator(f"{node.target}: keyword arguments {sorted(kwargs)} are not expected")
        if is_dequantize(node) and node not in self._weights:
            return args[0]  # its quantizer has done it
        value = self._weights.get(node, args[0])
        if "per_channel" in op_name(node):
            scale, zero_point, axis, lowest, highest = args[1:6]
            return lookup("torch.fake_quantize_per_channel_affine")(
                value, scale.to(torch.float32), zero_point.to(torch.int32), axis, lowest, highest
            )
        scale, zero_point, lowest, highest = args[1:5]
        return lookup("torch.fake_quantize_per_tensor_affine")(value, scale, zero_point, lowest, highest)


def _plain(value: Any) -> Any:
    """Return torch.fx's lists of numbers as the tuples that modules pass."""
    is_numbers = isinstance(value, list) and not any(isinstance(member, Tensor) for member in value)
    return tuple(value) if is_numbers else value


def _place(node: Node) -> str:
    """Return `PATH`, or `PATH@CALL` from a module's second call on; a quantizer belongs to what it quantizes."""
    while (is_quantize(node) or is_dequantize(node)) and isinstance(node.args[0], Node):
        inner = node.args[0]
        node = next(iter(node.users), inner) if inner.op == "get_attr" else inner
        if inner.op == "get_attr":
            break
    path, call = site_of(node)
    return f"{path}@{call}" if call else path


def _real_weights(graph: GraphModule, node: Node) -> Tensor:
    """Return the real values of int8 weights."""
    codes, scale, zero_point = (_held(graph, value) for value in node.args[:3])
    if "per_channel" in op_name(node):
        view = [1] * codes.dim()
        view[int(str(node.args[3]))] = -1
        scale, zero_point = scale.reshape(view), zero_point.reshape(view)
    return (codes.to(torch.float32) - zero_point) * scale.to(torch.float32)


def _held(graph: GraphModule, value: object) -> Tensor:
    return constant_of(graph, value) if isinstance(value, Node) else torch.as_tensor(value)


def _first_of_several(name: str, args: tuple[Any, ...]) -> Call:
    if name == "max_pool2d_with_indices":
        return _FIRST_OF_SEVERAL[name], args, {}
    x, weight, bias, mean, variance, momentum, eps = args
    return _FIRST_OF_SEVERAL[name], (x, mean, variance, weight, bias, False, momentum, eps), {}


def _interpolate(mode: str, args: tuple[Any, ...]) -> Call:
    """Return the call for `upsample_*.vec`: input, size, (align_corners,) factors."""
    x, size, factors = args[0], args[1], args[-1]
    named: dict[str, Any] = {"size": size, "scale_factor": factors if size is None else None, "mode": mode}
    if not mode.startswith("nearest"):
        named["align_corners"] = args[2]
    return "torch.nn.functional.interpolate", (x,), named


def _slice(x: Tensor, axis: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Call:
    key = (slice(None),) * (axis % x.dim()) + (slice(start, end, step),)
    return "torch.Tensor.__getitem__", (x, key), {}
