"""Operators of TFLite: what XNNPACK makes of each, and what kind of work each is."""

from __future__ import annotations

from qexport.layers import Kind

ACTIVATIONS = frozenset(
    {"RELU", "RELU6", "RELU_N1_TO_1", "LOGISTIC", "HARD_SWISH", "LEAKY_RELU", "TANH", "ELU"}
)

NODES: dict[str, tuple[str, ...]] = {
    "ABS": ("Abs",),
    "ADD": ("Add",),
    "AVERAGE_POOL_2D": ("Average Pooling", "Global Average Pooling"),
    "BATCH_MATMUL": ("Batch Matrix Multiply", "Fully Connected"),
    "CEIL": ("Ceiling",),
    "CONCATENATION": ("Concatenate", "Copy"),
    "CONV_2D": ("Convolution", "Fully Connected"),
    "DEPTHWISE_CONV_2D": ("Convolution", "Depthwise Convolution"),
    "DEQUANTIZE": ("Convert",),
    "DIV": ("Divide",),
    "ELU": ("ELU",),
    "EXP": ("Exp",),
    "EXPAND_DIMS": ("Static Expand Dims", "Static Reshape", "Copy"),
    "FLOOR": ("Floor",),
    "FULLY_CONNECTED": ("Fully Connected",),
    "HARD_SWISH": ("HardSwish", "Hard Swish"),
    "LEAKY_RELU": ("Leaky ReLU",),
    "LOG": ("Log",),
    "LOGISTIC": ("Sigmoid",),
    "MAXIMUM": ("Maximum", "Clamp"),
    "MAX_POOL_2D": ("Max Pooling",),
    "MEAN": ("Mean", "Global Average Pooling"),
    "MINIMUM": ("Minimum", "Clamp"),
    "MUL": ("Multiply",),
    "NEG": ("Negate",),
    "PAD": ("Constant Pad",),
    "PADV2": ("Constant Pad",),
    "QUANTIZE": ("Convert",),
    "RELU": ("Clamp", "ReLU"),
    "RELU6": ("Clamp",),
    "RELU_N1_TO_1": ("Clamp",),
    "RESHAPE": ("Static Reshape", "Copy"),
    "RESIZE_BILINEAR": ("Resize Bilinear",),
    "ROUND": ("Bankers Rounding", "Bankers' Rounding"),
    "RSQRT": ("Reciprocal Square Root",),
    "SLICE": ("Slice", "Static Slice"),
    "SOFTMAX": ("Softmax",),
    "SPLIT": ("Slice", "Even Split", "Copy"),
    "SQRT": ("Square Root",),
    "SQUARE": ("Square",),
    "SQUEEZE": ("Static Reshape", "Copy"),
    "STRIDED_SLICE": ("Slice", "Static Slice"),
    "SUB": ("Subtract",),
    "SUM": ("Sum",),
    "TANH": ("Tanh", "TanH"),
    "TRANSPOSE": ("Transpose", "Copy"),
    "TRANSPOSE_CONV": ("Deconvolution",),
}  # fmt: skip
"""By operator, how the names of the nodes begin that XNNPACK makes of it."""
ADDED = ("Convert", "Copy", "Static Reshape", "Transpose")
"""Nodes that an operator can have beside its own."""
ADDED_BEHIND = ("Clamp",)
"""And behind it: the activation that is fused to it."""
LEFT_OUT = frozenset({
    "CONCATENATION", "DEQUANTIZE", "EXPAND_DIMS", "MAXIMUM", "MINIMUM", "PAD", "QUANTIZE", "RELU", "RELU6",
    "RELU_N1_TO_1", "RESHAPE", "SLICE", "SQUEEZE", "STRIDED_SLICE", "TRANSPOSE",
})  # fmt: skip
"""Operators that XNNPACK can do without: what they do is done by a neighbour, or is nothing."""

_KINDS: dict[Kind, tuple[str, ...]] = {
    "convolution": ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV"),
    "linear": ("FULLY_CONNECTED", "BATCH_MATMUL"),
    "pooling": ("MAX_POOL_2D", "AVERAGE_POOL_2D", "MEAN"),
    "elementwise": (
        "ABS", "ADD", "CEIL", "DIV", "EQUAL", "EXP", "FLOOR", "FLOOR_DIV", "FLOOR_MOD", "GREATER", "GREATER_EQUAL",
        "LESS", "LESS_EQUAL", "LOG", "LOGICAL_AND", "LOGICAL_NOT", "LOGICAL_OR", "MAXIMUM", "MINIMUM", "MUL", "NEG",
        "NOT_EQUAL", "POW", "ROUND", "RSQRT", "SELECT", "SELECT_V2", "SQRT", "SQUARE", "SUB", "SUM",
    ),
    "activation": (*sorted(ACTIVATIONS), "SOFTMAX"),
    "resize": ("RESIZE_NEAREST_NEIGHBOR", "RESIZE_BILINEAR"),
    "concatenation": ("CONCATENATION", "PACK"),
    "nms": ("NON_MAX_SUPPRESSION_V4", "NON_MAX_SUPPRESSION_V5"),
    "reformat": (
        "BROADCAST_TO", "CAST", "DEQUANTIZE", "EXPAND_DIMS", "PAD", "PADV2", "QUANTIZE", "RESHAPE", "SLICE", "SPLIT",
        "SQUEEZE", "STRIDED_SLICE", "TILE", "TRANSPOSE", "UNPACK",
    ),
}  # fmt: skip
_KIND_OF: dict[str, Kind] = {code: kind for kind, codes in _KINDS.items() for code in codes}
_KIND_OF_NODE: dict[str, Kind] = {
    node: _KIND_OF[code]
    for code, nodes in NODES.items()
    for node in nodes
    if node not in {"Copy", "Clamp", "Fully Connected"}
} | {"Fully Connected": "linear", "Clamp": "activation", "Copy": "reformat", "Concatenate": "concatenation"}


def kind_of_kernel(kernel: str) -> Kind:
    """Return the kind of work that an operator or a node of XNNPACK's does; `other` for a gather and the like.

    XNNPACK runs a convolution with a window of 1 as `Fully Connected`: the layer itself says what it is.
    """
    if kernel in _KIND_OF:
        return _KIND_OF[kernel]
    starts = [node for node in _KIND_OF_NODE if kernel.startswith(node)]
    return _KIND_OF_NODE[max(starts, key=len)] if starts else "other"
