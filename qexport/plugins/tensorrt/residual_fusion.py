"""Place quantizers where TensorRT fuses: convolution, bias, residual add and ReLU become one int8 kernel.

TensorRT adds the residual inside the kernel, in float, before the one rounding at the end. A quantizer between
a convolution and the add would cut that kernel in two, so it is taken out: that tensor is then more exact than
the encodings say, and the artifact lists it.
"""

from __future__ import annotations

from torch.fx import Node

from qexport.quantization.graph import argument_node, is_dequantize, is_quantize, op_name
from qexport.quantization.reference import QuantizedDetector

FUSED = "added inside the convolution's kernel, before its one rounding: the tensor never exists, and is more exact"
"""Why such a tensor is not quantized, for the artifact."""


def fused_residuals(quantized: QuantizedDetector) -> tuple[str, ...]:
    """Return the encodings keys of convolutions that the add after them takes into their kernel; one of each add.

    Of two convolutions that meet in an add, the later one runs it; the other is quantized as before.
    """
    nodes = list(quantized.graph.graph.nodes)
    order = {node: index for index, node in enumerate(nodes)}
    key_of = {node: key for key, node in quantized.quantize_nodes.items()}
    found = []
    for add in [node for node in nodes if op_name(node) == "add"]:
        quantizers = [_quantizer_behind(value) for value in add.args[:2]]
        behind = [node for node in quantizers if node in key_of]
        if behind:
            found.append(key_of[max(behind, key=lambda node: order[argument_node(node)])])
    return tuple(found)


def _quantizer_behind(value: object) -> Node | None:
    """Return the quantizer of the convolution that ends in `value` alone; None for anything else."""
    if not (isinstance(value, Node) and is_dequantize(value)):
        return None
    quantizer = argument_node(value)
    if not is_quantize(quantizer):
        return None
    convolution = argument_node(quantizer)
    if op_name(convolution) != "conv2d" or not all(is_dequantize(one) for one in convolution.args[:2]):
        return None  # a convolution that is kept in float has no int8 kernel to take the add into
    return quantizer if all(len(node.users) == 1 for node in (convolution, quantizer, value)) else None
