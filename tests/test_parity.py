"""Parity: a sound artifact passes, a sabotaged one is found and named, and memory does not grow."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from qexport.artifact import TensorSite, describe_file, load_artifact, save_artifact
from qexport.benchmarks.parity import compare
from qexport.benchmarks.recall import RecallCounter
from qexport.detections import Detections
from qexport.detectors.static import StaticDetector
from qexport.errors import ParityError
from qexport.layers import Layer
from qexport.quantization.inspection import inspect_layers
from qexport.quantization.reference import QuantizedDetector
from qexport.results import ParityReport
from qexport.runtimes.onnx import OnnxRunner
from qexport.sites import codes_of, stored_of

Frame = NDArray[np.uint8]
VICTIM = "backbone.body.layer2.0.conv1"


@pytest.fixture(scope="module")
def layers(demo_static: StaticDetector) -> tuple[Layer, ...]:
    return inspect_layers(demo_static)


@pytest.fixture(scope="module")
def report(
    demo_quantized: QuantizedDetector,
    demo_artifact: Path,
    layers: tuple[Layer, ...],
    demo_frames: list[Frame],
) -> ParityReport:
    with OnnxRunner(demo_artifact) as runner:
        return compare(demo_quantized, runner, layers, demo_frames, split="test")


def test_compare_sound_artifact_every_layer_within_a_step(
    report: ParityReport, layers: tuple[Layer, ...]
) -> None:
    assert all(gate.passed for gate in report.gates)
    assert [(row.path, row.call) for row in report.layers] == [(layer.path, layer.call) for layer in layers]
    for row, layer in zip(report.layers, layers, strict=True):
        assert row.status == ("ok" if layer.quantized or layer.stage == "preprocess" else "float")
        if layer.quantized:
            assert row.values == 3 * np.prod(layer.shape)
            assert row.max_step is not None and row.max_step <= 1
            assert row.sqnr_fp32_db is not None and row.sqnr_fp32_db > 0
            assert row.sqnr_reference_db is None or row.sqnr_reference_db > row.sqnr_fp32_db


def test_compare_counts_recall_of_proposals_and_detections(report: ParityReport) -> None:
    recalls = {(recall.stage, recall.against): recall for recall in report.recalls}
    assert set(recalls) == {(s, a) for s in ("proposals", "detections") for a in ("fp32", "reference")}
    for recall in recalls.values():
        assert 0.7 * recall.boxes <= recall.matched <= recall.boxes


def test_compare_sabotaged_weight_is_named(
    demo_quantized: QuantizedDetector,
    demo_artifact: Path,
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
    with OnnxRunner(folder) as runner:
        report = compare(demo_quantized, runner, layers, demo_frames[:1], split="test")
    assert [row.path for row in report.layers if row.status == "over_tolerance"] == [VICTIM]
    gate = report.gates[0]
    assert (gate.name, gate.passed, gate.culprit) == ("layer parity", False, VICTIM)


def test_compare_layer_without_a_place_is_unmatched_and_fails(
    demo_quantized: QuantizedDetector,
    demo_artifact: Path,
    layers: tuple[Layer, ...],
    demo_frames: list[Frame],
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(demo_artifact, tmp_path / "gap")
    artifact, _ = load_artifact(folder)
    last = artifact.sites[-1]
    save_artifact(msgspec.structs.replace(artifact, sites=artifact.sites[:-1]), folder)
    with OnnxRunner(folder) as runner:
        report = compare(demo_quantized, runner, layers, demo_frames[:1], split="test")
        tolerant = compare(demo_quantized, runner, layers, demo_frames[:1], split="test", max_unmatched=0.05)
    assert [row.path for row in report.layers if row.status == "unmatched"] == [last.key.partition("@")[0]]
    assert not next(gate for gate in report.gates if gate.name == "unmatched layers").passed
    assert all(gate.passed for gate in tolerant.gates)


def test_compare_nothing_raises_error(
    demo_quantized: QuantizedDetector,
    demo_artifact: Path,
    layers: tuple[Layer, ...],
    demo_frames: list[Frame],
) -> None:
    with OnnxRunner(demo_artifact) as runner:
        with pytest.raises(ParityError, match="no image to compare on"):
            compare(demo_quantized, runner, layers, [], split="test")
        strangers = [
            msgspec.structs.replace(layer, path=f"other.{layer.path}", stage="trunk") for layer in layers
        ]
        with pytest.raises(ParityError, match="not one layer"):
            compare(demo_quantized, runner, strangers, demo_frames[:1], split="test")


def test_codes_of_channels_last_site_returns_the_detectors_layout() -> None:
    wanted = np.arange(-12, 12, dtype=np.int8).reshape(2, 3, 2, 2)
    stored = (wanted.transpose(0, 2, 3, 1).reshape(4, 2, 3).astype(np.int16) + 128).astype(np.uint8)
    site = TensorSite(
        key="a@0/output:b",
        tensor="t",
        zero_point=128,
        shape=(2, 3, 2, 2),
        stored_shape=(2, 2, 2, 3),
        stored_order=(0, 3, 1, 2),
    )
    np.testing.assert_array_equal(codes_of(site, stored), wanted)
    np.testing.assert_array_equal(stored_of(site, wanted, stored.shape, stored.dtype), stored)


def test_recall_matches_one_to_one_within_a_class() -> None:
    counter = RecallCounter()
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    wanted = (box.repeat(2, 1), torch.tensor([0.9, 0.8]), torch.tensor([1, 1]), torch.tensor(2))
    found = Detections(box.numpy(), np.array([0.7], np.float32), np.array([1]))
    counter.add_detections("fp32", wanted=wanted, found=found)
    other_class = Detections(box.numpy(), np.array([0.7], np.float32), np.array([2]))
    counter.add_detections("reference", wanted=wanted, found=other_class)
    results = {(one.stage, one.against): one for one in counter.results()}
    assert (results["detections", "fp32"].boxes, results["detections", "fp32"].matched) == (2, 1)
    assert results["detections", "fp32"].max_score_difference == pytest.approx(0.2)
    assert results["detections", "reference"].matched == 0


_PEAK = """
import resource, sys
from pathlib import Path
import torch
from qexport.benchmarks.parity import compare
from qexport.detectors.demo.scenes import draw_scene
from qexport.detectors.load import load_detector
from qexport.detectors.static import make_static
from qexport.calibration.calibrator import calibrate
from qexport.quantization.inspection import inspect_layers
from qexport.quantization.reference import quantize
from qexport.exporters.onnx import export
from qexport.runtimes.onnx import OnnxRunner
from qexport.target_options import TargetOptions
torch.set_num_threads(1)
folder, images = Path(sys.argv[1]), int(sys.argv[2])
loaded = load_detector("demo", None)
static = make_static(loaded.module, frame_px=(240, 320))
frame = draw_scene(1, 0).pixels
encodings = calibrate(static, [frame])
quantized = quantize(static, encodings)
export(quantized, encodings, folder, labels=loaded.labels, options=TargetOptions())
with OnnxRunner(folder) as runner:
    compare(quantized, runner, inspect_layers(static), (frame for _ in range(images)), split="one")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_compare_memory_does_not_grow_with_images(tmp_path: Path) -> None:
    peaks = {}
    for images in (8, 256):
        command = [sys.executable, "-c", _PEAK, str(tmp_path / str(images)), str(images)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[images] = int(done.stdout.split()[-1])
    assert peaks[256] <= 1.1 * peaks[8]
