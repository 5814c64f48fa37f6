"""What reading back finds: a file that was changed after it was written is refused, by layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed (the extra tflite)")

import flatbuffers
from ai_edge_litert import schema_py_generated as schema

from qexport.encodings import Encodings
from qexport.errors import ExportError
from qexport.exporters.tflite import FILE_NAMES, export
from qexport.plugins.tflite.readback import read_back
from qexport.quantization.reference import QuantizedDetector
from qexport.target_options import TfliteOptions

CONV, SUM = "backbone.body.layer2.0.conv1", "backbone.body.layer1.0"
TYPES = schema.TensorType


@pytest.fixture(scope="module")
def written(
    demo_quantized: QuantizedDetector, demo_encodings: Encodings, tmp_path_factory: pytest.TempPathFactory
) -> bytes:
    folder = tmp_path_factory.mktemp("readback")
    export(demo_quantized, demo_encodings, folder, labels=("a", "b"), options=TfliteOptions())
    return (folder / FILE_NAMES["int8"]).read_bytes()


class Edited:
    """A model, to be changed."""

    def __init__(self, data: bytes) -> None:
        self.model: Any = schema.ModelT.InitFromPackedBuf(data, 0)
        self.graph = self.model.subgraphs[0]
        for one in self.graph.operators:
            one.inputs, one.outputs = list(one.inputs), list(one.outputs)  # arrays of the file are read-only

    def find(self, path: str, code: str) -> Any:
        """Return the operator of a kind that stands at a module path."""
        number = getattr(schema.BuiltinOperator, code)
        (found,) = (
            one
            for one in self.graph.operators
            if self.model.operatorCodes[one.opcodeIndex].builtinCode == number and self.place(one) == path
        )
        return found

    def place(self, one: Any) -> str:
        return bytes(self.graph.tensors[int(one.outputs[0])].name).decode().partition("/")[0]

    def tensor(self, index: int) -> Any:
        return self.graph.tensors[int(index)]

    def add(self, name: str, like: int, kind: int, scale: float | None) -> int:
        """Add a tensor of the shape of another."""
        made: Any = schema.TensorT()
        made.name, made.shape, made.type, made.buffer = name, self.tensor(like).shape, kind, 0
        if scale is not None:
            made.quantization = schema.QuantizationParametersT()
            made.quantization.scale, made.quantization.zeroPoint = [scale], [0]
        self.graph.tensors.append(made)
        return len(self.graph.tensors) - 1

    def insert(self, before: Any, code: str, source: int, result: int) -> None:
        """Add an operator of one input before another."""
        made: Any = schema.OperatorCodeT()
        made.builtinCode = made.deprecatedBuiltinCode = getattr(schema.BuiltinOperator, code)
        self.model.operatorCodes.append(made)
        one: Any = schema.OperatorT()
        one.opcodeIndex = len(self.model.operatorCodes) - 1
        one.inputs, one.outputs = [source], [result]
        self.graph.operators.insert(self.graph.operators.index(before), one)

    def bytes(self) -> bytes:
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(self.model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())


def change_activation_scale(edited: Edited) -> None:
    result = edited.tensor(edited.find(CONV, "CONV_2D").outputs[0])
    result.quantization.scale = [np.nextafter(np.float32(result.quantization.scale[0]), np.float32(1))]


def change_zero_point(edited: Edited) -> None:
    edited.tensor(edited.find(SUM, "ADD").outputs[0]).quantization.zeroPoint = [1]


def drop_scale(edited: Edited) -> None:
    edited.tensor(edited.find(SUM, "ADD").outputs[0]).quantization = None


def swap_weight_scales(edited: Edited) -> None:
    quantization = edited.tensor(edited.find(CONV, "CONV_2D").inputs[1]).quantization
    first, second, *others = quantization.scale
    quantization.scale = [second, first, *others]


def one_weight_scale(edited: Edited) -> None:
    quantization = edited.tensor(edited.find(CONV, "CONV_2D").inputs[1]).quantization
    quantization.scale, quantization.zeroPoint = [quantization.scale[0]], [0]


def change_bias_scale(edited: Edited) -> None:
    quantization = edited.tensor(edited.find(CONV, "CONV_2D").inputs[2]).quantization
    quantization.scale = [scale * 2 for scale in quantization.scale]


def convert_back_and_forth(edited: Edited) -> None:
    one = edited.find(CONV, "CONV_2D")
    source = int(one.inputs[0])
    scale = float(edited.tensor(source).quantization.scale[0])
    real = edited.add(f"{CONV}/DEQUANTIZE", source, TYPES.FLOAT32, None)
    again = edited.add(f"{CONV}/QUANTIZE", source, TYPES.INT8, scale)
    edited.insert(one, "DEQUANTIZE", source, real)
    edited.insert(one, "QUANTIZE", real, again)
    one.inputs[0] = again


def compute_in_float(edited: Edited) -> None:
    one = edited.find(CONV, "CONV_2D")
    source = int(one.inputs[0])
    real = edited.add(f"{CONV}/DEQUANTIZE", source, TYPES.FLOAT32, None)
    edited.insert(one, "DEQUANTIZE", source, real)
    one.inputs[0] = real


def quantize_after_float(edited: Edited) -> None:
    one = edited.find(CONV, "CONV_2D")
    result = int(one.outputs[0])
    real = edited.add(f"{CONV}/CONV_2D_REAL", result, TYPES.FLOAT32, None)
    one.outputs[0] = real
    follower = edited.graph.operators[edited.graph.operators.index(one) + 1]
    edited.insert(follower, "QUANTIZE", real, result)


def transpose(edited: Edited) -> None:
    one = edited.find(CONV, "CONV_2D")
    source = int(one.inputs[0])
    scale = float(edited.tensor(source).quantization.scale[0])
    moved = edited.add(f"{CONV}/TRANSPOSE", source, TYPES.INT8, scale)
    edited.insert(one, "TRANSPOSE", source, moved)
    one.inputs[0] = moved


def rename_result(edited: Edited) -> None:
    edited.tensor(edited.find(CONV, "CONV_2D").outputs[0]).name = "elsewhere"


SABOTAGE: dict[str, tuple[Callable[[Edited], None], str]] = {
    "scale of an activation, by one bit": (change_activation_scale, f"{CONV}@0/output:conv2d: scale"),
    "zero point": (change_zero_point, f"{SUM}@0/output:add.*zero point"),
    "no scale": (drop_scale, f"{SUM}@0/output:add: scale"),
    "two scales of a weight": (swap_weight_scales, f"{CONV}: weight of .* scales"),
    "one scale for a whole weight": (one_weight_scale, f"{CONV}: weight of 1 scales"),
    "scale of a bias": (change_bias_scale, f"{CONV}: bias"),
    "dequantized and quantized again": (convert_back_and_forth, f"{CONV}: dequantized and quantized again"),
    "input in float": (compute_in_float, f"{CONV}@0/output:conv2d: CONV_2D computes in float"),
    "quantized after it": (quantize_after_float, f"{CONV}@0/output:conv2d: QUANTIZE computes in float"),
    "transpose": (transpose, f"{CONV}: a transpose inside the trunk"),
    "result of another name": (rename_result, f"{CONV}@0/output:conv2d"),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_reading_back_names_the_layer_of_a_changed_file(
    name: str,
    written: bytes,
    demo_quantized: QuantizedDetector,
    demo_encodings: Encodings,
    tmp_path: Path,
) -> None:
    change, message = SABOTAGE[name]
    edited = Edited(written)
    change(edited)
    path = tmp_path / "changed.tflite"
    path.write_bytes(edited.bytes())
    with pytest.raises(ExportError, match=message) as caught:
        read_back(path, demo_quantized.quantize_nodes, demo_encodings)
    assert "--keep-float PATH" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 5  # this layer, not all behind it


def test_reading_back_takes_a_file_that_was_packed_anew(
    written: bytes, demo_quantized: QuantizedDetector, demo_encodings: Encodings, tmp_path: Path
) -> None:
    path = tmp_path / "same.tflite"
    path.write_bytes(Edited(written).bytes())
    assert len(read_back(path, demo_quantized.quantize_nodes, demo_encodings)) > 30


def test_reading_back_refuses_a_layer_in_integers_that_was_kept_in_float(
    written: bytes, kept_float: tuple[Encodings, QuantizedDetector], tmp_path: Path
) -> None:
    encodings, quantized = kept_float
    path = tmp_path / "all-int8.tflite"
    path.write_bytes(written)
    with pytest.raises(ExportError, match=r"backbone.body.conv1: was kept in float, CONV_2D reads int8"):
        read_back(path, quantized.quantize_nodes, encodings)


@pytest.mark.parametrize("kept", [0, 3, 8, 100, 500_000, -100, -4])
def test_reading_back_refuses_a_file_that_is_cut_off(
    kept: int,
    written: bytes,
    demo_quantized: QuantizedDetector,
    demo_encodings: Encodings,
    tmp_path: Path,
) -> None:
    path = tmp_path / "cut.tflite"
    path.write_bytes(written[:kept])
    with pytest.raises(ExportError, match=r"cut.tflite: (no TFLite model|cut off).*Export again"):
        read_back(path, demo_quantized.quantize_nodes, demo_encodings)
