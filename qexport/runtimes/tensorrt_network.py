"""A TensorRT network as plain data: what the builder was given, layer by layer, saved beside the engine.

An engine can be looked into on a GPU alone, and no TensorRT can save a network. Its definition, read from the
builder's own objects, can be evaluated anywhere; so the layers that the builder really had are compared with
the detector, and not the file or the calls that they were made from.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from qexport.errors import ArtifactError, UnsupportedOperator
from qexport.files import json_bytes, whole_file

Attribute = bool | int | float | str | tuple[int | float, ...] | None
_LAYERS = "layers.json"
_DATE = (1980, 1, 1, 0, 0, 0)  # same input, same bytes


class NetworkTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An input or output of the network."""

    name: str
    dtype: str
    """TensorRT's name, `UINT8`."""
    shape: tuple[int, ...]


class NetworkLayer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layer."""

    name: str
    kind: str
    """TensorRT's `LayerType`, `CONVOLUTION`."""
    inputs: tuple[str, ...]
    """Names of tensors; empty for an optional input that is not there."""
    outputs: tuple[str, ...]
    attributes: dict[str, Attribute]
    arrays: tuple[str, ...]
    """Names of the constants that belong to the layer itself, `NUMBER/weights`, `NUMBER/kernel`, `NUMBER/bias`."""


class NetworkLayers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The layers in the order in which they were added, which need not be that of their execution."""

    library: str
    """The TensorRT that held the network, `tensorrt_rtx 1.7.1`."""
    inputs: tuple[NetworkTensor, ...]
    outputs: tuple[NetworkTensor, ...]
    layers: tuple[NetworkLayer, ...]


@dataclass(frozen=True, slots=True)
class Network:
    """Layers and their constants."""

    described: NetworkLayers
    arrays: Mapping[str, NDArray[np.generic]]


# Typed fields by layer kind, as TensorRT's Python classes name them. Enumerations are kept by name.
_FIELDS: dict[str, tuple[str, ...]] = {
    "CONVOLUTION": (
        "num_output_maps", "kernel_size_nd", "stride_nd", "pre_padding", "post_padding", "padding_mode",
        "dilation_nd", "num_groups",
    ),
    "DECONVOLUTION": (
        "num_output_maps", "kernel_size_nd", "stride_nd", "pre_padding", "post_padding", "padding_mode",
        "dilation_nd", "num_groups",
    ),
    "ACTIVATION": ("type", "alpha", "beta"),
    "POOLING": (
        "type", "window_size_nd", "stride_nd", "pre_padding", "post_padding", "padding_mode",
        "average_count_excludes_padding",
    ),
    "SCALE": ("mode", "channel_axis"),
    "SOFTMAX": ("axes",),
    "CONCATENATION": ("axis",),
    "ELEMENTWISE": ("op",),
    "UNARY": ("op",),
    "SHUFFLE": ("first_transpose", "reshape_dims", "second_transpose", "zero_is_placeholder"),
    "REDUCE": ("op", "axes", "keep_dims"),
    "TOPK": ("op", "k", "axes"),
    "GATHER": ("axis", "mode", "num_elementwise_dims"),
    "SCATTER": ("axis", "mode"),
    "MATRIX_MULTIPLY": ("op0", "op1"),
    "CONSTANT": ("shape",),
    "CAST": ("to_type",),
    "IDENTITY": (),
    "SHAPE": (),
    "SELECT": (),
    "SQUEEZE": (),
    "UNSQUEEZE": (),
    "SLICE": ("start", "shape", "stride", "mode", "axes"),
    "PADDING": ("pre_padding_nd", "post_padding_nd"),
    "RESIZE": (
        "shape", "scales", "resize_mode", "interpolation_mode", "coordinate_transformation",
        "selector_for_single_pixel", "nearest_rounding",
    ),
    "QUANTIZE": ("axis",),
    "DEQUANTIZE": ("axis",),
    "GRID_SAMPLE": ("interpolation_mode", "align_corners", "sample_mode"),
    "TRIP_LIMIT": ("kind",),
    "RECURRENCE": (),
    "LOOP_OUTPUT": ("kind", "axis"),
}  # fmt: skip
_CLASSES = {
    "ELEMENTWISE": "IElementWiseLayer",
    "SOFTMAX": "ISoftMaxLayer",
    "TOPK": "ITopKLayer",
}
_LOOP_KINDS = ("TRIP_LIMIT", "RECURRENCE", "LOOP_OUTPUT")
_ARRAYS = {
    "CONVOLUTION": ("kernel", "bias"),
    "DECONVOLUTION": ("kernel", "bias"),
    "SCALE": ("shift", "scale", "power"),
    "CONSTANT": ("weights",),
}


def read_network(trt: Any, network: Any, *, library: str) -> Network:
    """Read every layer of a network.

    Args:
        trt: the module of `load_library`.
        network: an `INetworkDefinition`.
        library: name of the TensorRT, for the record.

    Raises:
        UnsupportedOperator: a layer of a kind that cannot be read.
    """
    arrays: dict[str, NDArray[np.generic]] = {}
    layers = [
        _read_layer(trt, network.get_layer(index), index, arrays) for index in range(network.num_layers)
    ]
    described = NetworkLayers(
        library=library,
        inputs=tuple(_tensor(network.get_input(index)) for index in range(network.num_inputs)),
        outputs=tuple(_tensor(network.get_output(index)) for index in range(network.num_outputs)),
        layers=tuple(layers),
    )
    return Network(described, arrays)


def _tensor(tensor: Any) -> NetworkTensor:
    return NetworkTensor(tensor.name, tensor.dtype.name, tuple(tensor.shape))


def _read_layer(trt: Any, layer: Any, index: int, arrays: dict[str, NDArray[np.generic]]) -> NetworkLayer:
    kind, name = layer.type.name, str(layer.name)
    if kind not in _FIELDS:
        raise UnsupportedOperator(
            f"the network has the layer {name} of kind {kind}, which cannot be checked without a GPU. "
            "Choose the plugin-free forms (-O tensorrt.roi_align=grid -O tensorrt.nms=loop), or build where a GPU is."
        )
    inputs = tuple(_name(layer.get_input(index)) for index in range(layer.num_inputs))
    outputs = tuple(_name(layer.get_output(index)) for index in range(layer.num_outputs))
    base = layer.__class__
    # get_layer gives the base class; TensorRT's classes differ in what they look at, not in what they hold.
    layer.__class__ = getattr(trt, _CLASSES.get(kind, f"I{_camel(kind)}Layer"))
    try:
        attributes = {
            field: _attribute(layer, field) for field in _FIELDS[kind] if hasattr(type(layer), field)
        }
        if kind in _LOOP_KINDS:
            attributes["loop"] = str(layer.loop.name)
        kept = []
        for field in _ARRAYS.get(kind, ()):
            array = np.array(getattr(layer, field))
            if array.size:
                kept.append(f"{index}/{field}")
                arrays[kept[-1]] = array
    finally:
        layer.__class__ = base
    return NetworkLayer(name, kind, inputs, outputs, attributes, tuple(kept))


def _name(tensor: Any) -> str:
    return "" if tensor is None else str(tensor.name)


def _camel(kind: str) -> str:
    return "".join(word.capitalize() for word in kind.split("_"))


def _attribute(layer: Any, field: str) -> Attribute:
    try:
        value = getattr(layer, field)
    except ValueError:
        return None  # dimensions that were never set
    if value is None or (isinstance(value, (bool, int, float, str)) and not hasattr(value, "name")):
        return value
    if hasattr(value, "name"):
        return str(value.name)
    try:
        return tuple(value)
    except ValueError:  # dimensions of negative length: never set, an input gives them
        return None


def save_network(network: Network, path: Path) -> Path:
    """Write layers and constants into one file; return `path`."""
    with whole_file(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo(_LAYERS, _DATE), json_bytes(network.described))
        for name, array in network.arrays.items():
            data = io.BytesIO()
            np.lib.format.write_array(data, np.asarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", _DATE), data.getvalue())
    return path


def load_network(path: Path) -> Network:
    """Read what `save_network` wrote.

    Raises:
        ArtifactError: cut off, or not such a file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            described = msgspec.json.decode(archive.read(_LAYERS), type=NetworkLayers)
            arrays = {
                name.removesuffix(".npy"): np.lib.format.read_array(
                    io.BytesIO(archive.read(name)), allow_pickle=False
                )
                for name in archive.namelist()
                if name != _LAYERS
            }
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, msgspec.DecodeError) as error:
        raise ArtifactError(f"{path}: no network that qexport saved ({error}). Export again.") from error
    return Network(described, arrays)
