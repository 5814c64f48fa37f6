"""Read a `.tflite` back: every layer in integers with our scales, nothing else made integers, nothing wasted."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from torch.fx import Node

from qexport.artifact import LayerDecision
from qexport.encodings import Encodings
from qexport.errors import ExportError
from qexport.layers import stage_of
from qexport.quantization.graph import IMAGE_KEY, argument_node, base_of, op_name
from qexport.quantization.quantizer import SHAPE_ONLY, UNARY, WEIGHTED

_WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
_CONVERSIONS = ("QUANTIZE", "DEQUANTIZE")
_TRUNK = ("trunk", "fpn", "rpn_head")
_OPCODES = {number: name for name, number in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
_FLOAT32, _INT8 = schema.TensorType.FLOAT32, schema.TensorType.INT8
_INSIDE = {
    "multiscale_roi_align": "int8 rows are gathered, then weighed and summed in float32",
}


@dataclass(frozen=True, slots=True)
class ReadOperator:
    """An operator of the file."""

    code: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    place: str
    """`PATH@CALL` of the module that it was written for."""


class ReadModel:
    """A file's tensors and operators.

    Raises:
        ExportError: no TFLite model, or not all of one.
    """

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        if data[4:8] != b"TFL3":
            raise ExportError(f"{path}: no TFLite model. Export again.")
        try:
            model: Any = schema.ModelT.InitFromPackedBuf(data, 0)
        except (struct.error, IndexError, TypeError, ValueError) as error:
            raise ExportError(f"{path}: cut off or changed, {error}. Export again.") from error
        graph = model.subgraphs[0]
        self.tensors = list(graph.tensors)
        self.names = [bytes(tensor.name).decode() for tensor in self.tensors]
        self.index = {name: index for index, name in enumerate(self.names)}
        self.operators = [
            ReadOperator(
                _OPCODES[model.operatorCodes[one.opcodeIndex].builtinCode],
                tuple(int(index) for index in one.inputs),
                tuple(int(index) for index in one.outputs),
                self.names[int(one.outputs[0])].partition("/")[0],
            )
            for one in graph.operators
        ]
        self.makers = {output: one for one in self.operators for output in one.outputs}

    def scales(self, index: int) -> tuple[float, ...]:
        """Return the scales of a tensor; none of one in float."""
        own = self.tensors[index].quantization
        return () if own is None or own.scale is None else tuple(float(scale) for scale in own.scale)

    def zero_points(self, index: int) -> set[int]:
        """Return the zero points of a tensor."""
        own = self.tensors[index].quantization
        return set() if own is None or own.zeroPoint is None else {int(zero) for zero in own.zeroPoint}

    def is_int8(self, index: int) -> bool:
        """Tell whether a tensor holds int8."""
        return bool(self.tensors[index].type == _INT8)


def read_back(
    path: Path, quantize_nodes: Mapping[str, Node], encodings: Encodings
) -> tuple[LayerDecision, ...]:
    """Compare a file with the encodings, layer by layer.

    Raises:
        ExportError: names every layer that is not int8, has other scales, or is int8 where it is to be float; and
            conversions and transposes that stand inside the trunk without a layer in float that needs them.
    """
    model = ReadModel(path)
    rows = {row.key: row.params for row in encodings.rows}
    wrong = _wrong_scales(model, quantize_nodes, rows)
    kept_float = {(row.path, row.call) for row in encodings.float_rows}
    decisions = []
    for key, node in quantize_nodes.items():
        op = op_name(base_of(argument_node(node)))
        if key == IMAGE_KEY or op in SHAPE_ONLY or _site(key) in kept_float:
            continue
        decision = _decide(model, key, op)
        decisions.append(decision)
        if not decision.integer and not decision.reason:
            wrong.append(f"{key}: {', '.join(decision.kernels)} computes in float")
    wrong += _seized(model, encodings)
    wrong += _wasted(model, encodings)
    if wrong:
        lines = [f"{path.name}: not what the encodings say:", *(f"  {line}" for line in wrong)]
        raise ExportError(
            "\n".join([*lines, "Report the model's structure; --keep-float PATH leaves a layer out."])
        )
    return tuple(decisions)


def _decide(model: ReadModel, key: str, op: str) -> LayerDecision:
    path, call = _site(key)
    if op in _INSIDE:
        place = key.replace("@0/", "/").partition("/")[0]
        codes = tuple(sorted({one.code for one in model.operators if one.place == place}))
        return LayerDecision(path=path, call=call, op=op, kernels=codes, integer=False, reason=_INSIDE[op])
    index = model.index.get(key.replace("@0/", "/"))
    maker = model.makers.get(index) if index is not None else None
    code = maker.code if maker is not None else ""
    reads = maker is not None and all(
        model.is_int8(source) for source in maker.inputs[: 2 if op in WEIGHTED else 1] if source >= 0
    )
    integer = reads and code not in _CONVERSIONS
    reason = f"computed in float32 between int8 tensors: {op}" if not integer and op in UNARY else ""
    return LayerDecision(path=path, call=call, op=op, kernels=(code,), integer=integer, reason=reason)


def _wrong_scales(model: ReadModel, quantize_nodes: Mapping[str, Node], rows: Mapping[str, Any]) -> list[str]:
    wrong = []
    for key in quantize_nodes:
        index = model.index.get(key.replace("@0/", "/"))
        if index is None:
            continue  # a tensor that is the same as another's, under its name
        expected = np.float32(rows[key].scale[0])
        if model.scales(index) != (float(expected),) or model.zero_points(index) != {0}:
            wrong.append(
                f"{key}: scale {model.scales(index)}, the encodings say {float(expected)} and zero point 0"
            )
    weights = {key.removesuffix("/weight"): row for key, row in rows.items() if key.endswith("/weight")}
    for one in model.operators:
        if one.code not in _WEIGHTED or not model.is_int8(one.inputs[1]):
            continue
        row = weights.get(f"{one.place.partition('@')[0]}@0")
        expected_scales = tuple(float(np.float32(scale)) for scale in row.scale) if row is not None else ()
        found = model.scales(one.inputs[1])
        if found != expected_scales:
            wrong.append(f"{one.place}: weight of {len(found)} scales that are not the encodings'")
        elif not _is_bias_of(model, one):
            wrong.append(
                f"{one.place}: bias that is not int32 in steps of its input's scale times its weight's"
            )
    return wrong


def _is_bias_of(model: ReadModel, one: ReadOperator) -> bool:
    """Tell whether an operator's bias has the scales that its kernel takes it to have."""
    source, weight, bias = one.inputs
    if len(model.scales(source)) != 1:
        return True  # an input that is not int8 is another finding
    steps = model.scales(source)[0] * np.asarray(model.scales(weight), np.float64)
    found = model.scales(bias)
    return (
        bool(model.tensors[bias].type == schema.TensorType.INT32)
        and len(found) == len(steps)
        and np.allclose(found, steps, rtol=1e-6, atol=0)
    )


def _seized(model: ReadModel, encodings: Encodings) -> list[str]:
    """Return layers that the encodings keep in float and that compute in integers."""
    kept = {(row.path, row.call) for row in encodings.float_rows if row.op in WEIGHTED}
    return [
        f"{one.place}: was kept in float, {one.code} reads int8"
        for one in model.operators
        if one.code in _WEIGHTED and _site(one.place) in kept and model.is_int8(one.inputs[0])
    ]


def _wasted(model: ReadModel, encodings: Encodings) -> list[str]:
    """Return conversions between two integer layers, and transposes, inside the trunk and the heads on it."""
    floats = {row.path for row in encodings.float_rows} | {
        row.key.partition("@")[0] for row in encodings.rows if row.key.rpartition(":")[2] in UNARY
    }
    found = []
    for one in model.operators:
        path = one.place.partition("@")[0]
        if stage_of(path) not in _TRUNK:
            continue
        if one.code == "TRANSPOSE":
            found.append(f"{one.place}: a transpose inside the {stage_of(path)}")
        source = model.makers.get(one.inputs[0])
        if (
            one.code == "QUANTIZE"
            and source is not None
            and source.code == "DEQUANTIZE"
            and path not in floats
        ):
            found.append(f"{one.place}: dequantized and quantized again")
    return found


def _site(key: str) -> tuple[str, int]:
    path, _, call = key.partition("/")[0].partition("@")
    return path, int(call or 0)
