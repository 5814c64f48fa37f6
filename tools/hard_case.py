"""A detector with what int8 is said to be hard on: a MobileNetV2 trunk under the demo's FPN, RPN and box head.

    qexport run --model tools/hard_case.py:build --weights hard.pt --data scenes --target onnx --out runs/hard

Depthwise layers do not mix channels: BatchNorm is free to make each as wide or as narrow as it likes. The activations
are ReLU, which does not bound them as MobileNetV2's own ReLU6 would, and lets the blocks be equalised.
`tools/train_hard_case.py` trains it; docs/accuracy.md has what int8 cost it, and what gave it back.
"""

from __future__ import annotations

from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.mobilenetv2 import MobileNetV2

from qexport.detectors.demo.model import build as build_demo

# Expansion, channels, blocks, stride of the first: MobileNetV2's table, narrower and shorter.
_BLOCKS = [[1, 8, 1, 1], [6, 16, 1, 2], [6, 24, 2, 2], [6, 40, 2, 2], [6, 64, 1, 2]]
_LEVELS = {"4": "0", "6": "1", "7": "2"}
"""Modules of the trunk whose outputs the FPN takes: strides 8, 16 and 32."""


def build() -> FasterRCNN:
    """Return the untrained detector, for frames of 240 x 320 and the classes of the demo."""
    detector = build_demo()
    # The stem has the first width of torchvision's own, halved; its last convolution is for a classifier.
    trunk = MobileNetV2(width_mult=0.5, inverted_residual_setting=_doubled(_BLOCKS)).features[:-1]
    _unbound(trunk)
    detector.backbone = BackboneWithFPN(
        trunk,
        return_layers=_LEVELS,
        in_channels_list=[channels for _, channels, _, _ in _BLOCKS[2:]],
        out_channels=detector.backbone.out_channels,
    )
    return detector


def _unbound(trunk: nn.Module) -> None:
    """Put ReLU in the place of every ReLU6."""
    for module in trunk.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(module, name, nn.ReLU(inplace=True))


def _doubled(blocks: list[list[int]]) -> list[list[int]]:
    """Return the table before MobileNetV2 halves its channels."""
    return [[expansion, 2 * channels, count, stride] for expansion, channels, count, stride in blocks]
