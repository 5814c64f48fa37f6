"""Write a network that `tensorrt_network` read into TensorRT again: an engine needs nothing but its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexport.errors import UnsupportedOperator
from qexport.runtimes.tensorrt_network import Network, NetworkLayer

_LOOP_KINDS = ("TRIP_LIMIT", "RECURRENCE", "LOOP_OUTPUT")
_ENUMERATIONS = {
    ("ACTIVATION", "type"): "ActivationType",
    ("POOLING", "type"): "PoolingType",
    ("ELEMENTWISE", "op"): "ElementWiseOperation",
    ("UNARY", "op"): "UnaryOperation",
    ("REDUCE", "op"): "ReduceOperation",
    ("TOPK", "op"): "TopKOperation",
    ("GATHER", "mode"): "GatherMode",
    ("SCATTER", "mode"): "ScatterMode",
    ("SCALE", "mode"): "ScaleMode",
    ("MATRIX_MULTIPLY", "op0"): "MatrixOperation",
    ("MATRIX_MULTIPLY", "op1"): "MatrixOperation",
    ("SLICE", "mode"): "SampleMode",
    ("GRID_SAMPLE", "sample_mode"): "SampleMode",
    ("GRID_SAMPLE", "interpolation_mode"): "InterpolationMode",
    ("RESIZE", "resize_mode"): "InterpolationMode",
    ("RESIZE", "interpolation_mode"): "InterpolationMode",
    ("RESIZE", "coordinate_transformation"): "ResizeCoordinateTransformation",
    ("RESIZE", "selector_for_single_pixel"): "ResizeSelector",
    ("RESIZE", "nearest_rounding"): "ResizeRoundMode",
    ("TRIP_LIMIT", "kind"): "TripLimit",
    ("LOOP_OUTPUT", "kind"): "LoopOutput",
    ("CAST", "to_type"): "DataType",
    **{(kind, "padding_mode"): "PaddingMode" for kind in ("CONVOLUTION", "DECONVOLUTION", "POOLING")},
}
_SET_BY_ADDING = frozenset(
    {
        "num_output_maps",
        "kernel_size_nd",
        "window_size_nd",
        "to_type",
        "loop",
        "kind",
        "num_elementwise_dims",
        "k",
    }
)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A layer that is to be added."""

    trt: Any
    network: Any
    layer: NetworkLayer
    inputs: Sequence[Any]
    """None for one that is not there yet."""
    own: Mapping[str, NDArray[np.generic]]
    """Its constants, by field."""

    def get(self, field: str) -> Any:
        """Return an attribute as TensorRT takes it."""
        value = self.layer.attributes[field]
        enumeration = _ENUMERATIONS.get((self.layer.kind, field))
        return getattr(getattr(self.trt, enumeration), str(value)) if enumeration else value

    def weights(self, field: str) -> Any:
        """Return a constant; empty weights where an input gives them, or there are none."""
        return self.own.get(field, self.trt.Weights())


def _gather(asked: _Asked) -> Any:
    made = asked.network.add_gather_v2(*asked.inputs[:2], asked.get("mode"))
    made.num_elementwise_dims = asked.get("num_elementwise_dims")
    return made


def _slice(asked: _Asked) -> Any:
    rank = len(asked.inputs[0].shape)
    given = (asked.get(name) or (1,) * rank for name in ("start", "shape", "stride"))
    return asked.network.add_slice(asked.inputs[0], *given)


def _quantize(asked: _Asked) -> Any:
    network, trt = asked.network, asked.trt
    quantizes = asked.layer.kind == "QUANTIZE"
    add = network.add_quantize if quantizes else network.add_dequantize
    try:
        return add(*asked.inputs[:2], trt.int8 if quantizes else trt.float32)
    except TypeError:  # before TensorRT 10 the types follow from the kind
        return add(*asked.inputs[:2])


def _filter(asked: _Asked) -> Any:
    network = asked.network
    add = network.add_convolution_nd if asked.layer.kind == "CONVOLUTION" else network.add_deconvolution_nd
    return add(
        asked.inputs[0],
        asked.get("num_output_maps"),
        asked.get("kernel_size_nd"),
        asked.weights("kernel"),
        asked.weights("bias"),
    )


_ADD: dict[str, Callable[[_Asked], Any]] = {
    "CONVOLUTION": _filter,
    "DECONVOLUTION": _filter,
    "GATHER": _gather,
    "SLICE": _slice,
    "QUANTIZE": _quantize,
    "DEQUANTIZE": _quantize,
    "ACTIVATION": lambda a: a.network.add_activation(a.inputs[0], a.get("type")),
    "POOLING": lambda a: a.network.add_pooling_nd(a.inputs[0], a.get("type"), a.get("window_size_nd")),
    "SCALE": lambda a: a.network.add_scale_nd(
        a.inputs[0], a.get("mode"), *map(a.weights, ("shift", "scale", "power")), a.get("channel_axis")
    ),
    "SOFTMAX": lambda a: a.network.add_softmax(a.inputs[0]),
    "CONCATENATION": lambda a: a.network.add_concatenation(list(a.inputs)),
    "ELEMENTWISE": lambda a: a.network.add_elementwise(*a.inputs, a.get("op")),
    "UNARY": lambda a: a.network.add_unary(a.inputs[0], a.get("op")),
    "SHUFFLE": lambda a: a.network.add_shuffle(a.inputs[0]),
    "REDUCE": lambda a: a.network.add_reduce(a.inputs[0], a.get("op"), a.get("axes"), a.get("keep_dims")),
    # A K of -1 is one that an input gives.
    "TOPK": lambda a: a.network.add_topk(a.inputs[0], a.get("op"), max(1, a.get("k")), a.get("axes")),
    "SCATTER": lambda a: a.network.add_scatter(*a.inputs, a.get("mode")),
    "MATRIX_MULTIPLY": lambda a: a.network.add_matrix_multiply(
        a.inputs[0], a.get("op0"), a.inputs[1], a.get("op1")
    ),
    "CONSTANT": lambda a: a.network.add_constant(a.get("shape"), a.weights("weights")),
    "CAST": lambda a: a.network.add_cast(a.inputs[0], a.get("to_type")),
    "IDENTITY": lambda a: a.network.add_identity(a.inputs[0]),
    "SHAPE": lambda a: a.network.add_shape(a.inputs[0]),
    "SELECT": lambda a: a.network.add_select(*a.inputs),
    "SQUEEZE": lambda a: a.network.add_squeeze(*a.inputs),
    "UNSQUEEZE": lambda a: a.network.add_unsqueeze(*a.inputs),
    "PADDING": lambda a: a.network.add_padding_nd(
        a.inputs[0], a.get("pre_padding_nd"), a.get("post_padding_nd")
    ),
    "RESIZE": lambda a: a.network.add_resize(a.inputs[0]),
    "GRID_SAMPLE": lambda a: a.network.add_grid_sample(*a.inputs),
}


def write_network(trt: Any, network: Any, described: Network) -> None:
    """Add every layer of a saved network to an empty one.

    Args:
        trt: the module of `load_library`.
        network: an empty `INetworkDefinition`; the arrays of `described` must live as long as it.
        described: what `read_network` read.

    Raises:
        UnsupportedOperator: this TensorRT has no such layer.
    """
    tensors: dict[str, Any] = {"": None}
    for tensor in described.described.inputs:
        tensors[tensor.name] = network.add_input(
            tensor.name, getattr(trt.DataType, tensor.dtype), tensor.shape
        )
    loops: dict[str, Any] = {}
    made: list[tuple[NetworkLayer, Any]] = []
    for layer in described.described.layers:
        own = {name.partition("/")[2]: described.arrays[name] for name in layer.arrays}
        asked = _Asked(trt, network, layer, [tensors.get(name) for name in layer.inputs], own)
        if layer.kind in _LOOP_KINDS:
            added = _add_to_loop(asked, _loop(network, loops, str(layer.attributes["loop"])))
        else:
            added = _add(asked)
        _finish(asked, added)
        _connect(layer, added, tensors)
        for index, name in enumerate(layer.outputs):
            tensors[name] = added.get_output(index)
            tensors[name].name = name
        made.append((layer, added))
    for layer, added in made:
        _connect(layer, added, tensors)
    for output in described.described.outputs:
        network.mark_output(tensors[output.name])


def _add(asked: _Asked) -> Any:
    version, layer = asked.trt.__version__, asked.layer
    try:
        added = _ADD[layer.kind](asked)
    except (KeyError, AttributeError) as error:
        raise UnsupportedOperator(
            f"layer {layer.name} of kind {layer.kind}: TensorRT {version} has none ({error}). Export for it where it "
            "runs, or take target tensorrt."
        ) from error
    if added is None:
        raise UnsupportedOperator(f"layer {layer.name} of kind {layer.kind}: TensorRT {version} refuses it.")
    return added


def _loop(network: Any, loops: dict[str, Any], name: str) -> Any:
    if name not in loops:
        loops[name] = network.add_loop()
        loops[name].name = name
    return loops[name]


def _add_to_loop(asked: _Asked, loop: Any) -> Any:
    (first, *_), kind = asked.inputs, asked.layer.kind
    if kind == "RECURRENCE":
        return loop.add_recurrence(first)
    if kind == "TRIP_LIMIT":
        return loop.add_trip_limit(first, asked.get("kind"))
    return loop.add_loop_output(first, asked.get("kind"), asked.get("axis"))


def _finish(asked: _Asked, added: Any) -> None:
    """Set the name and every attribute that adding does not set."""
    layer = asked.layer
    added.name = layer.name
    if hasattr(added, "metadata"):
        added.metadata = f"[{layer.name}]"
    # What decides how others are understood comes first.
    for field in sorted(layer.attributes, key=lambda field: field != "zero_is_placeholder"):
        if field in _SET_BY_ADDING or layer.attributes[field] is None or not hasattr(type(added), field):
            continue
        if field == "scales" and layer.attributes.get("shape"):
            continue  # a resize has one of the two
        setattr(added, field, asked.get(field))


def _connect(layer: NetworkLayer, added: Any, tensors: Mapping[str, Any]) -> None:
    """Give a layer the inputs that adding it did not take, as far as they are there."""
    for index, name in enumerate(layer.inputs):
        if name not in tensors:
            continue
        held = added.get_input(index) if index < added.num_inputs else None
        if name and (held is None or held.name != name):
            added.set_input(index, tensors[name])
