"""Targets against each other: what differs is counted, named and gated; what is not one model is refused."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from conftest import Frame
from numpy.typing import NDArray
from onnx import numpy_helper

pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed (the extra tflite)")

from qexport.artifact import UnquantizedRow, describe_file, load_artifact, save_artifact
from qexport.benchmarks.cross import ADDS_GATE, REFERENCE, STEP_GATE, VALUES_GATE, compare_all
from qexport.cross_results import CrossPair, CrossReport
from qexport.detectors.load import LoadedDetector
from qexport.detectors.static import StaticDetector
from qexport.encodings import Encodings
from qexport.errors import ArtifactError, ParityError, QexportError
from qexport.exporters.tflite import export
from qexport.layers import Layer
from qexport.quantization.inspection import inspect_layers
from qexport.quantization.reference import QuantizedDetector
from qexport.runtimes.onnx import OnnxRunner
from qexport.runtimes.tflite import TfliteRunner
from qexport.target_options import TfliteOptions

VICTIM = "backbone.body.layer2.0.conv1"
AFTER = "backbone.body.layer2.0.conv2"
"""The one layer that reads it."""


@pytest.fixture(scope="module")
def layers(demo_static: StaticDetector) -> tuple[Layer, ...]:
    return inspect_layers(demo_static)


@pytest.fixture(scope="module")
def tflite_folder(
    demo: LoadedDetector,
    demo_quantized: QuantizedDetector,
    demo_encodings: Encodings,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("tflite-cross")
    export(demo_quantized, demo_encodings, folder, labels=demo.labels, options=TfliteOptions())
    return folder


@pytest.fixture(scope="module")
def report(
    demo_quantized: QuantizedDetector,
    demo_artifact: Path,
    tflite_folder: Path,
    layers: tuple[Layer, ...],
    demo_frames: list[Frame],
) -> CrossReport:
    with OnnxRunner(demo_artifact) as one, TfliteRunner(tflite_folder) as other:
        return compare_all(demo_quantized, [one, other], layers, demo_frames, split="test")


def pair_of(report: CrossReport, first: str, second: str) -> CrossPair:
    return next(pair for pair in report.pairs if (pair.first, pair.second) == (first, second))


def test_compare_all_counts_every_value_of_every_pair(report: CrossReport, demo_encodings: Encodings) -> None:
    assert [target.name for target in report.targets] == [REFERENCE, "onnx", "tflite"]
    assert [(pair.first, pair.second) for pair in report.pairs] == [
        (REFERENCE, "onnx"),
        (REFERENCE, "tflite"),
        ("onnx", "tflite"),
    ]
    assert report.images == 3
    rows = [row for row in demo_encodings.rows if row.port != "weight"]
    for pair in report.pairs:
        assert [(layer.path, layer.call, layer.port) for layer in pair.layers] == [
            (row.path, row.call, row.port) for row in rows
        ]
        assert [layer.order for layer in pair.layers] == sorted(layer.order for layer in pair.layers)
        assert sum(one.values for one in pair.kinds.values()) == sum(layer.values for layer in pair.layers)
        assert {layer.kind for layer in pair.layers if layer.port == "output:conv2d"} == {"convolution"}
        assert set(pair.kinds) >= {"convolution", "linear", "elementwise", "roi_align"}
        promised = [pair.kinds["convolution"], pair.kinds["linear"], pair.kinds["elementwise"]]
        assert pair.promised.values == sum(one.values for one in promised)
        parting = [layer.path for layer in pair.layers if layer.differing]
        assert pair.parts_at == (parting[0] if parting else "")


def test_compare_all_of_sound_artifacts_keeps_every_gate(report: CrossReport) -> None:
    assert [(gate.subject, gate.name, gate.passed) for gate in report.gates] == [
        ("onnx and tflite", VALUES_GATE, True),
        ("onnx and tflite", ADDS_GATE, True),
        ("onnx and tflite", STEP_GATE, True),
    ]
    for pair in report.pairs:
        assert pair.promised.max_step <= 1
        assert pair.promised.per_million < 100


def test_compare_all_with_one_sabotaged_weight_finds_that_layer_alone(
    report: CrossReport,
    demo_quantized: QuantizedDetector,
    demo_artifact: Path,
    tflite_folder: Path,
    layers: tuple[Layer, ...],
    demo_frames: list[Frame],
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(demo_artifact, tmp_path / "sabotaged")
    artifact, _ = load_artifact(folder)
    path = folder / artifact.file("int8").name
    model = onnx.load(path)
    conv = next(node for node in model.graph.node if node.name == f"{VICTIM}/Conv")
    dequantizer = next(node for node in model.graph.node if conv.input[1] in node.output)
    weight = next(item for item in model.graph.initializer if item.name == dequantizer.input[0])
    codes = numpy_helper.to_array(weight).copy()
    codes[3] = -codes[3]
    weight.CopyFrom(numpy_helper.from_array(codes, weight.name))
    onnx.save(model, path)
    files = tuple(describe_file(folder, file.name, file.role) for file in artifact.files)
    save_artifact(msgspec.structs.replace(artifact, files=files), folder)
    with OnnxRunner(folder) as one, TfliteRunner(tflite_folder) as other:
        found = compare_all(demo_quantized, [one, other], layers, demo_frames, split="test")
    values, adds, step = found.gates
    assert (values.passed, values.culprit) == (False, VICTIM)
    assert adds == report.gates[1]
    assert (step.passed, step.culprit) == (False, VICTIM)
    for first, second in ((REFERENCE, "onnx"), ("onnx", "tflite")):
        before = {(one.path, one.call, one.port): one for one in pair_of(report, first, second).layers}
        after = {(one.path, one.call, one.port): one for one in pair_of(found, first, second).layers}
        changed = [key[0] for key, layer in after.items() if layer != before[key]]
        assert changed == [VICTIM]  # given the reference's integers, nothing behind it is touched
    assert pair_of(found, REFERENCE, "tflite") == pair_of(report, REFERENCE, "tflite")


def test_compare_all_of_targets_with_other_arithmetic_asks_for_a_step_alone(
    demo_quantized: QuantizedDetector,
    demo_artifact: Path,
    tflite_folder: Path,
    layers: tuple[Layer, ...],
    demo_frames: list[Frame],
) -> None:
    class Shifted(TfliteRunner):
        """A target of its own that is one step off in one layer."""

        def run_forced(
            self,
            array: NDArray[np.generic],
            codes: Mapping[str, NDArray[np.int8]],
            proposals: NDArray[np.float32],
        ) -> dict[str, NDArray[np.int8]]:
            found = super().run_forced(array, codes, proposals)
            key = f"{VICTIM}@0/output:conv2d"
            return found | {key: np.where(found[key] < 127, found[key] + 1, 126).astype(np.int8)}

    with OnnxRunner(demo_artifact) as one, Shifted(tflite_folder) as other:
        other.artifact = msgspec.structs.replace(other.artifact, target="tensorrt")
        found = compare_all(demo_quantized, [one, other], layers, demo_frames[:1], split="test")
    (step,) = found.gates
    assert (step.name, step.passed, step.measured) == (STEP_GATE, True, "1 step")
    layer = next(one for one in pair_of(found, "onnx", "tensorrt").layers if one.path == VICTIM)
    assert layer.differing == layer.values


def test_compare_all_leaves_out_what_a_target_fuses_and_what_reads_it(
    demo_quantized: QuantizedDetector,
    demo_artifact: Path,
    tflite_folder: Path,
    layers: tuple[Layer, ...],
    demo_frames: list[Frame],
) -> None:
    with OnnxRunner(demo_artifact) as one, TfliteRunner(tflite_folder) as other:
        own = other.artifact
        declared = (UnquantizedRow(f"{VICTIM}@0/output:conv2d", "fused"),)
        other.artifact = msgspec.structs.replace(own, unquantized=declared)
        found = compare_all(demo_quantized, [one, other], layers, demo_frames[:1], split="test")
        both = msgspec.structs.replace(one.artifact, unquantized=declared)
        one.artifact = both
        fused = compare_all(demo_quantized, [one, other], layers, demo_frames[:1], split="test")
    every = {layer.path for layer in pair_of(found, REFERENCE, "onnx").layers}
    assert {VICTIM, AFTER} <= every
    for first, second in ((REFERENCE, "tflite"), ("onnx", "tflite")):
        assert {layer.path for layer in pair_of(found, first, second).layers} == every - {VICTIM, AFTER}
    # Where both leave it out, both give what reads it the same.
    assert {layer.path for layer in pair_of(fused, "onnx", "tflite").layers} == every - {VICTIM}


def test_compare_all_of_what_is_not_one_model_is_refused(
    demo_quantized: QuantizedDetector,
    demo_artifact: Path,
    tflite_folder: Path,
    layers: tuple[Layer, ...],
    demo_frames: list[Frame],
) -> None:
    with OnnxRunner(demo_artifact) as one, TfliteRunner(tflite_folder) as other:
        with pytest.raises(QexportError, match="takes two or more, each once; given onnx"):
            compare_all(demo_quantized, [one], layers, demo_frames, split="test")
        with pytest.raises(QexportError, match="each once; given onnx, onnx"):
            compare_all(demo_quantized, [one, one], layers, demo_frames, split="test")
        with pytest.raises(ParityError, match="no image to compare on"):
            compare_all(demo_quantized, [one, other], layers, [], split="test")
        own = other.artifact
        other.artifact = msgspec.structs.replace(own, encodings_sha256="1" * 64)
        with pytest.raises(
            ArtifactError, match=r"not the same model: made of different encodings .*111111111111"
        ):
            compare_all(demo_quantized, [one, other], layers, demo_frames, split="test")
        frame = msgspec.structs.replace(own.input, frame_width_px=160)
        other.artifact = msgspec.structs.replace(own, input=frame)
        with pytest.raises(ArtifactError, match=r"frames of 240x320.*the other of 240x160"):
            compare_all(demo_quantized, [one, other], layers, demo_frames, split="test")
        other.artifact = msgspec.structs.replace(own, proposals=7)
        with pytest.raises(ArtifactError, match="with 7 proposals"):
            compare_all(demo_quantized, [one, other], layers, demo_frames, split="test")
