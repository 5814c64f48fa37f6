"""Trunks that take apart, turn or select values between the operator that computes them and the one that reads them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Frame
from torch import Tensor, nn
from torch.nn import functional
from torchvision_detectors import FRAME_PX, build_single_level

from qexport.benchmarks.parity import compare
from qexport.calibration.calibrator import calibrate
from qexport.detectors.static import make_static
from qexport.devices import runner_for
from qexport.quantization.inspection import inspect_layers
from qexport.quantization.reference import quantize
from qexport.target import find_target
from qexport.target_options import read_options

Halves = Callable[[Tensor], tuple[Tensor, Tensor]]


def turned(x: Tensor) -> tuple[Tensor, Tensor]:
    first, second = x.transpose(2, 3).unsqueeze(0).squeeze(0).split(8, 1)
    return first.transpose(2, 3), second.transpose(2, 3)


def unequal(x: Tensor) -> tuple[Tensor, Tensor]:
    first, second, third = torch.split(x, [8, 3, 5], 1)
    return first, torch.cat([second, third], 1)


def selected(x: Tensor) -> tuple[Tensor, Tensor]:
    halves = x.reshape(1, 2, 8, *x.shape[2:])
    return halves.max(1)[0], halves.min(1)[0]


HALVES: dict[str, Halves] = {
    "split": lambda x: torch.split(x, 8, 1),  # type: ignore[return-value]
    "chunk": lambda x: torch.chunk(x, 2, -3),  # type: ignore[return-value]
    "split of unequal parts": unequal,
    "unbind": lambda x: x.reshape(1, 2, 8, *x.shape[2:]).unbind(1),  # type: ignore[return-value]
    "transpose": turned,
    "one of several results": selected,
}


class Halved(nn.Module):
    """A convolution reads one half of the channels, hardswish the other."""

    def __init__(self, halves: Halves) -> None:
        super().__init__()
        self._halves = halves
        self.own = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self._halves(x)
        return torch.cat([functional.hardswish(second), self.own(first)], 1)


class NormAlone(nn.Module):
    """A BatchNorm that has no convolution before it, read by hardswish."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return functional.hardswish(self.norm(functional.max_pool2d(x, 1)))


@pytest.mark.parametrize("halves", HALVES.values(), ids=HALVES.keys())
def test_detector_with_operators_between_its_layers_is_quantized(
    halves: Halves, small_frames: list[Frame]
) -> None:
    static = make_static(build_single_level(Halved(halves)), frame_px=FRAME_PX)
    encodings = calibrate(static, small_frames[:1])
    rows = encodings.by_key()
    assert rows["backbone.3@0/output:hardswish"].source == "min-max"
    quantized = quantize(static, encodings)
    layers = {layer.path: layer.quantized for layer in inspect_layers(static)}
    assert layers["backbone.3.own"]
    assert layers["backbone.4"]
    frame = torch.from_numpy(small_frames[1])
    with torch.no_grad():
        boxes = quantized.graph(frame)[0]
    assert bool(torch.isfinite(boxes).all())


def test_parts_of_a_split_keep_the_scale_of_the_whole(small_frames: list[Frame]) -> None:
    static = make_static(build_single_level(Halved(HALVES["split"])), frame_px=FRAME_PX)
    rows = calibrate(static, small_frames[:1]).by_key()
    parts = [row for key, row in rows.items() if "output:slice" in key]
    assert len(parts) == 2
    assert {row.params.scale for row in parts} == {rows["backbone.0@0/output:conv2d"].params.scale}


def test_batch_norm_without_a_convolution_before_it_stays_in_float_by_its_name(
    small_frames: list[Frame],
) -> None:
    static = make_static(build_single_level(NormAlone()), frame_px=FRAME_PX)
    encodings = calibrate(static, small_frames[:1])
    reason = next(row.reason for row in encodings.float_rows if row.path == "backbone.3.norm")
    assert "batch_norm" in reason
    quantize(static, encodings)


@pytest.mark.parametrize("target", ["onnx", "tflite", "executorch", "qnnpack"])
def test_split_trunk_runs_as_its_reference(target: str, small_frames: list[Frame], tmp_path: Path) -> None:
    static = make_static(build_single_level(Halved(HALVES["split"])), frame_px=FRAME_PX)
    encodings = calibrate(static, small_frames[:2])
    quantized = quantize(static, encodings)
    exporter = importlib.import_module(f"qexport.exporters.{target}")
    chosen = read_options(find_target(target).options, target, ())
    exporter.export(quantized, encodings, tmp_path, labels=tuple("0abc"), options=chosen)
    with runner_for(target)(tmp_path) as runner:
        report = compare(quantized, runner, inspect_layers(static), small_frames[2:3], split="test")
    compared = {row.path: row.max_step for row in report.layers if row.max_step is not None}
    assert compared["backbone.3.own"] <= 1
    assert not [gate for gate in report.gates if not gate.passed]
