"""The demo detector prepared for QAT by the real libraries, trained for two steps, and saved.

`prepare_fx` and `prepare_pt2e` are also what --qat-prepare names.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import torch
import torch.ao.quantization as tq
from torch import Tensor, nn
from torch.ao.nn.intrinsic.qat import freeze_bn_stats
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization.quantize_fx import prepare_qat_fx
from torchao.quantization.pt2e import FakeQuantize as Pt2eFakeQuantize
from torchao.quantization.pt2e import MovingAverageMinMaxObserver as Pt2eMovingAverage
from torchao.quantization.pt2e import MovingAveragePerChannelMinMaxObserver as Pt2eChannels
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationSpec
from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer
from torchao.testing.pt2e._xnnpack_quantizer_utils import QuantizationConfig
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.resnet import BasicBlock

import qexport.quantization  # noqa: F401 - before torchao
from qexport.detectors.load import load_detector

STEPS = 2
PADDED_PX = (256, 320)

SYMMETRIC = tq.FakeQuantize.with_args(
    observer=tq.MovingAverageMinMaxObserver, dtype=torch.quint8, qscheme=torch.per_tensor_symmetric
)
"""Zero point 128: int8 with zero point 0."""
CHANNELS = tq.FakeQuantize.with_args(
    observer=tq.MovingAveragePerChannelMinMaxObserver,
    quant_min=-127,
    quant_max=127,
    dtype=torch.qint8,
    qscheme=torch.per_channel_symmetric,
    ch_axis=0,
)
EXACT = tq.QConfig(activation=SYMMETRIC, weight=CHANNELS)
"""What int8 with zero point 0 holds to the bit."""


class AddingBlock(BasicBlock):
    """torchvision's block with its addition as a module, as eager QAT asks for."""

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.skip_add.add_relu(out, identity)


def demo_detector() -> GeneralizedRCNN:
    return copy.deepcopy(load_detector("demo", None).module).train().requires_grad_(True)


def prepare_eager(qconfig: tq.QConfig = EXACT, *, fuse: bool = True) -> GeneralizedRCNN:
    """Every layer, fused with its BatchNorm and ReLU, the additions of the trunk, and the image."""
    detector = demo_detector()
    body = detector.backbone.body
    groups = [["conv1", "bn1", "relu"]]
    for name, block in body.named_modules():
        if isinstance(block, BasicBlock):
            block.__class__ = AddingBlock
            block.skip_add = FloatFunctional()
            groups += [[f"{name}.conv1", f"{name}.bn1"], [f"{name}.conv2", f"{name}.bn2"]]
            if block.downsample is not None:
                groups.append([f"{name}.downsample.0", f"{name}.downsample.1"])
    with quiet():
        if fuse:
            tq.fuse_modules_qat(body, groups, inplace=True)
            tq.fuse_modules_qat(detector.rpn.head.conv[0], [["0", "1"]], inplace=True)
        detector.backbone.body = tq.QuantWrapper(body)
        heads = detector.roi_heads
        for part in (detector.backbone, detector.rpn.head, heads.box_head, heads.box_predictor):
            part.qconfig = qconfig
        tq.prepare_qat(detector, inplace=True)
    return detector


def prepare_fx(qconfig: tq.QConfig = EXACT) -> GeneralizedRCNN:
    """The backbone with its feature pyramid, by `prepare_qat_fx`."""
    detector = demo_detector()
    mapping = tq.QConfigMapping().set_global(qconfig)
    with quiet():
        detector.backbone = prepare_qat_fx(detector.backbone, mapping, (torch.zeros(1, 3, *PADDED_PX),))
    detector.backbone.out_channels = 64
    return detector


def prepare_fx_default() -> GeneralizedRCNN:
    """With torch's own configuration for qnnpack: affine quint8."""
    return prepare_fx(tq.get_default_qat_qconfig("qnnpack"))


def prepare_pt2e(*, affine: bool = False) -> GeneralizedRCNN:
    """The backbone, by `prepare_qat_pt2e` with XNNPACK's quantizer."""
    detector = demo_detector()
    activation = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_tensor_affine if affine else torch.per_tensor_symmetric,
        observer_or_fake_quant_ctr=Pt2eFakeQuantize.with_args(observer=Pt2eMovingAverage),
    )
    weight = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-127,
        quant_max=127,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        observer_or_fake_quant_ctr=Pt2eFakeQuantize.with_args(observer=Pt2eChannels),
    )
    config = QuantizationConfig(activation, activation, weight, None, is_qat=True)
    with quiet():
        exported = torch.export.export(detector.backbone, (torch.zeros(2, 3, *PADDED_PX),)).module()
        detector.backbone = prepare_qat_pt2e(exported, XNNPACKQuantizer().set_global(config))
    detector.backbone.out_channels = 64
    return detector


def prepare_pt2e_affine() -> GeneralizedRCNN:
    return prepare_pt2e(affine=True)


def train_parts(detector: GeneralizedRCNN) -> GeneralizedRCNN:
    """Two steps of the backbone, one look of the heads, then everything frozen as at the end of a training."""
    random = torch.Generator().manual_seed(5)
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-5)
    with quiet():
        for _ in range(STEPS):
            features = detector.backbone(torch.randn(2, 3, *PADDED_PX, generator=random))
            logits, deltas = detector.rpn.head(list(features.values()))
            pooled = detector.roi_heads.box_head(torch.randn(4, 64, 7, 7, generator=random))
            outputs = (*features.values(), *logits, *deltas, *detector.roi_heads.box_predictor(pooled))
            sum(output.square().mean() for output in outputs).backward()
            optimizer.step()
            optimizer.zero_grad()
        detector.apply(tq.disable_observer)
        detector.apply(freeze_bn_stats)
    return detector


def save(model: nn.Module, path: Path) -> Path:
    torch.save(model.state_dict(), path)
    return path


def quiet() -> warnings.catch_warnings:
    """torch.ao announces its end at every call."""
    return warnings.catch_warnings(action="ignore")
