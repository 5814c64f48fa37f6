"""A detector with what the demo has not: adaptive pools, a gate, a split: exported, built, compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tensorrt_models import needs_builder
from torch import Tensor, nn
from torchvision_detectors import FRAME_PX, build_single_level, texture

from qexport.benchmarks.parity import compare
from qexport.calibration.calibrator import calibrate
from qexport.detectors.static import make_static
from qexport.emulation.tensorrt import EvaluatedRunner
from qexport.exporters.tensorrt import export
from qexport.quantization.inspection import inspect_layers
from qexport.quantization.reference import quantize
from qexport.target_options import TensorrtOptions

pytestmark = needs_builder
LABELS = ("__background__", "a", "b", "c")


class GatedBackbone(nn.Module):
    """Squeeze and excitation, two halves that change places, a pool of irregular windows, a mean."""

    out_channels = 24

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=4, padding=1)
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.excite = nn.Conv2d(16, 16, 1)
        self.down = nn.Conv2d(16, 24, 3, stride=8, padding=1)
        self.pool = nn.AdaptiveAvgPool2d((4, 6))
        self.last = nn.Conv2d(24, 24, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image).relu()
        x = x * self.excite(self.squeeze(x)).sigmoid()
        first, second = x.chunk(2, 1)
        x = self.pool(self.down(torch.cat([second, first], 1)).relu())
        return self.last(x) + x.mean((2, 3), keepdim=True)


def test_detector_with_adaptive_pools_and_a_split_is_exported_and_keeps_parity(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        detector = build_single_level()
        detector.backbone = GatedBackbone().eval()
    static = make_static(detector, frame_px=FRAME_PX)
    frames = [texture(seed).numpy() for seed in range(2)]
    encodings = calibrate(static, frames[:1])
    quantized = quantize(static, encodings)
    artifact = export(quantized, encodings, tmp_path, labels=LABELS, options=TensorrtOptions())
    assert all(layer.integer for layer in artifact.layers if layer.op in ("conv2d", "linear"))
    assert [row.key for row in artifact.unquantized] == ["backbone.last@0/output:conv2d"]
    layers = inspect_layers(static)
    with EvaluatedRunner(tmp_path) as runner:
        report = compare(quantized, runner, layers, frames[1:], split="textures")
    assert [gate for gate in report.gates if not gate.passed] == []
    compared = {row.path for row in report.layers if row.values}
    assert {"backbone.squeeze", "backbone.pool", "backbone.excite"} <= compared
    found = {}
    for role in ("fp32", "fp16"):
        with EvaluatedRunner(tmp_path, role=role) as runner:
            found[role] = runner.infer(frames[1])
    assert len(found["fp32"]) == len(found["fp16"]) > 0
    np.testing.assert_allclose(found["fp16"].scores[:8], found["fp32"].scores[:8], atol=5e-3)
