"""The culprit is named: harm that was done on purpose is found at its place, with its kind."""

from __future__ import annotations

import copy
import html
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from cli_fixtures import call, copied, place
from conftest import Frame
from torch import Tensor, nn

from qexport.benchmarks.diagnosis import blame_runtime, diagnose
from qexport.calibration.calibrator import calibrate
from qexport.detectors.load import LoadedDetector
from qexport.detectors.static import StaticDetector, make_static
from qexport.diagnosis_results import Diagnosis
from qexport.errors import RunFolderError
from qexport.files import read_json
from qexport.quantization.inspection import inspect_layers
from qexport.quantization.partial import PartlyQuantized
from qexport.quantization.reference import quantize
from qexport.results import ParityReport
from qexport.settings import ObserverName, WeightScales

__all__ = ["copied", "place"]

HURT = "backbone.body.layer2.0.conv1"


def diagnosed(
    static: StaticDetector,
    frames: list[Frame],
    *,
    calibrate_on: list[Frame] | None = None,
    observer: ObserverName = "min-max",
    percentile: float = 99.99,
    weight_scales: WeightScales = "per-channel",
) -> Diagnosis:
    encodings = calibrate(
        static,
        frames if calibrate_on is None else calibrate_on,
        observer=observer,
        percentile=percentile,
        weight_scales=weight_scales,
        notes={"images": 64 if calibrate_on is None else len(calibrate_on)},
    )
    quantized = quantize(static, encodings)
    layers = inspect_layers(static)
    return diagnose("reference", 0.05, quantized, PartlyQuantized(quantized), encodings, layers, frames[:2])


def scaled(demo: LoadedDetector, like: StaticDetector, change: Callable[[nn.Module], None]) -> StaticDetector:
    module = copy.deepcopy(demo.module)
    with torch.no_grad():
        change(module)
    spec = like.spec
    return make_static(module, frame_px=(spec.frame_height_px, spec.frame_width_px))


def widen_a_channel(module: nn.Module) -> None:
    """Make one channel 500 times as wide and let its reader divide: nothing changes in float."""
    block = module.get_submodule("backbone.body.layer2.0")
    norm, reader = block.get_submodule("bn1"), block.get_submodule("conv2")
    assert isinstance(norm.weight, Tensor)
    assert isinstance(norm.bias, Tensor)
    assert isinstance(reader.weight, Tensor)
    norm.weight[0] *= 500
    norm.bias[0] *= 500
    reader.weight[:, 0] /= 500


def test_channel_that_takes_the_range_of_all_is_found(
    demo: LoadedDetector, demo_static: StaticDetector, calibration_frames: list[Frame]
) -> None:
    found = diagnosed(scaled(demo, demo_static, widen_a_channel), calibration_frames)
    worst = found.suspects[0]
    assert found.stage == "trunk"
    assert worst.row == f"{HURT}@0/output:conv2d"
    assert worst.cause == "unequal channels"
    assert worst.path.startswith("backbone.body.layer2.0")
    assert "--equalize" in worst.mend
    assert worst.path in found.sentence


def test_weight_whose_unequal_channels_share_a_scale_is_found(
    demo: LoadedDetector, demo_static: StaticDetector, calibration_frames: list[Frame]
) -> None:
    def silence_a_channel(module: nn.Module) -> None:
        """Let a channel fall silent, and one that reads nothing else have huge weights: its output is but its bias."""
        block = module.get_submodule("backbone.body.layer2.0")
        norm, reader = block.get_submodule("bn1"), block.get_submodule("conv2")
        assert isinstance(norm.weight, Tensor)
        assert isinstance(norm.bias, Tensor)
        assert isinstance(reader.weight, Tensor)
        norm.weight[0], norm.bias[0] = 0.0, -1.0
        reader.weight[0] = 0.0
        reader.weight[0, 0] = 300.0 * reader.weight.abs().amax()

    harmed = scaled(demo, demo_static, silence_a_channel)
    found = diagnosed(harmed, calibration_frames, weight_scales="per-tensor")
    worst = found.suspects[0]
    assert worst.row == "backbone.body.layer2.0.conv2@0/weight"
    assert worst.cause == "unequal channels"
    assert "share a scale" in worst.evidence
    assert "--weight-scales per-channel" in worst.mend


def test_few_calibration_images_are_blamed_where_values_saturate(
    demo_static: StaticDetector, calibration_frames: list[Frame]
) -> None:
    black = [frame * 0 + 60 for frame in calibration_frames[:1]]
    found = diagnosed(demo_static, calibration_frames, calibrate_on=black)
    assert found.suspects[0].cause == "too few calibration images"
    assert "--images" in found.sentence


def test_percentile_that_cuts_too_much_is_saturation(
    demo_static: StaticDetector, calibration_frames: list[Frame]
) -> None:
    found = diagnosed(demo_static, calibration_frames, observer="percentile", percentile=90.0)
    assert found.suspects[0].cause == "saturation"
    assert "--percentile" in found.suspects[0].mend


def test_runtime_is_blamed_at_its_worst_layer(place: Path) -> None:
    parity = read_json(place / "mine/onnx/parity.json", ParityReport, RunFolderError)
    chosen = next(row for row in parity.layers if row.path == HURT)
    broken = msgspec.structs.replace(chosen, max_step=9, differing=chosen.values // 2)
    rows = tuple(broken if row is chosen else row for row in parity.layers)
    found = blame_runtime("onnx", 0.03, msgspec.structs.replace(parity, layers=rows))
    assert found.suspects[0].path == HURT
    assert found.suspects[0].cause == "runtime"
    assert "9 steps" in found.sentence
    assert found.sentence.startswith("onnx lost 3.0 points")


def test_run_whose_accuracy_gate_fails_names_the_culprit(copied: Path) -> None:
    for words in (
        ("calibrate", "mine", "--observer", "percentile", "--percentile", "70"),
        ("export", "mine", "--target", "onnx"),
    ):
        assert call(*words).code == 0
    answer = call("evaluate", "mine", "--target", "onnx", "--max-drop", "0.01")
    assert answer.code == 1
    found = read_json(Path("mine/diagnosis.json"), Diagnosis, RunFolderError)
    assert found.suspects[0].path in answer.err
    assert "saturation" in answer.err
    assert call("report", "mine").code in (0, 1)
    assert found.sentence in html.unescape(Path("mine/report.html").read_text())
