"""The same ranges given to Google's own quantizer make the same layers: a cross-check of the exporter."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ai_edge_quantizer", reason="ai-edge-quantizer is not installed (the extra dev)")

from ai_edge_litert import schema_py_generated as schema
from ai_edge_quantizer import quantizer, recipe

from qexport.detectors.load import LoadedDetector
from qexport.encodings import Encodings
from qexport.exporters.tflite import FILE_NAMES, export
from qexport.plugins.tflite.readback import ReadModel, ReadOperator
from qexport.quantization.reference import QuantizedDetector
from qexport.target_options import TfliteOptions

CODES = ("CONV_2D", "FULLY_CONNECTED")


class File(ReadModel):
    """A file with the bytes of its constants."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._bytes = path.read_bytes()
        self._buffers = schema.ModelT.InitFromPackedBuf(self._bytes, 0).buffers

    def weighted(self) -> dict[str, ReadOperator]:
        """Return the convolutions and linears by module path."""
        return {one.place: one for one in self.operators if one.code in CODES and one.place != "preprocess"}

    def integers(self, index: int, dtype: type[np.generic]) -> np.ndarray[Any, Any]:
        """Return a constant."""
        buffer = self._buffers[self.tensors[index].buffer]
        stored = (
            self._bytes[buffer.offset : buffer.offset + buffer.size] if buffer.offset > 1 else buffer.data
        )
        return np.frombuffer(bytes(stored), dtype).astype(np.int64)


@pytest.fixture(scope="module")
def roads(
    demo: LoadedDetector,
    demo_quantized: QuantizedDetector,
    demo_encodings: Encodings,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[File, File]:
    """Return our int8 file, and what ai-edge-quantizer makes of our float32 file with our ranges."""
    folder = tmp_path_factory.mktemp("roads")
    export(demo_quantized, demo_encodings, folder, labels=demo.labels, options=TfliteOptions())
    ours, floats = File(folder / FILE_NAMES["int8"]), File(folder / FILE_NAMES["fp32"])
    ranges = {}
    for place, wanted in ours.weighted().items():
        asked = floats.weighted()[place]
        for index, theirs in ((wanted.inputs[0], asked.inputs[0]), (wanted.outputs[0], asked.outputs[0])):
            most = np.full((1, 1, 1, 1), np.float32(127) * np.float32(ours.scales(index)[0]), np.float32)
            ranges[floats.names[theirs]] = {"min": -most, "max": most}
    recipes = [recipe.static_wi8_ai8()[0] | {"operation": code} for code in CODES]
    for one in recipes:
        one["op_config"]["activation_tensor_config"]["symmetric"] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # LiteRT says that keeping tensors takes memory
        made = quantizer.Quantizer(str(folder / FILE_NAMES["fp32"]), recipes).quantize(ranges)
    path = folder / "second_road.tflite"
    path.write_bytes(made.quantized_model)
    return ours, File(path)


def test_second_road_quantizes_the_same_layers(roads: tuple[File, File]) -> None:
    ours, theirs = roads
    assert len(ours.weighted()) >= 20
    assert ours.weighted().keys() == theirs.weighted().keys()
    for place, one in theirs.weighted().items():
        assert theirs.is_int8(one.inputs[0]), place
        assert theirs.is_int8(one.outputs[0]), place


def test_second_road_has_the_same_activation_scales(roads: tuple[File, File]) -> None:
    ours, theirs = roads
    for place, one in ours.weighted().items():
        other = theirs.weighted()[place]
        for mine, their in ((one.inputs[0], other.inputs[0]), (one.outputs[0], other.outputs[0])):
            np.testing.assert_allclose(theirs.scales(their), ours.scales(mine), rtol=1.2e-7, err_msg=place)
            assert theirs.zero_points(their) == {0}, place


def test_second_road_has_the_same_weights_and_biases(roads: tuple[File, File]) -> None:
    ours, theirs = roads
    differing, every = 0, 0
    for place, one in ours.weighted().items():
        other = theirs.weighted()[place]
        np.testing.assert_allclose(
            theirs.scales(other.inputs[1]), ours.scales(one.inputs[1]), rtol=3e-7, err_msg=place
        )
        # Both round weight / scale; where a scale's last bit differs, a weight half way between two codes may.
        codes = np.abs(ours.integers(one.inputs[1], np.int8) - theirs.integers(other.inputs[1], np.int8))
        assert codes.max() <= 1, place
        differing, every = differing + int((codes > 0).sum()), every + codes.size
        biases = np.abs(ours.integers(one.inputs[2], np.int32) - theirs.integers(other.inputs[2], np.int32))
        assert biases.max() <= 1, place
    assert differing < every * 1e-3
