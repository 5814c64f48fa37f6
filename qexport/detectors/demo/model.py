"""The demo detector: a narrow ResNet with FPN under torchvision's Faster R-CNN, for 240 x 320 frames.

Everything a full-size detector has, at a size that runs anywhere: strided stem, batch norms, residual adds
with and without a projection, three FPN levels and the pooled one, RPN, RoIAlign over the levels, two-layer
head.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.models.resnet import BasicBlock
from torchvision.ops import MultiScaleRoIAlign

CLASSES = ["__background__", "washer", "nut", "bolt"]

_STEM_CHANNELS = 24
_STAGE_CHANNELS = (32, 64, 96, 128)
_FPN_CHANNELS = 64
_HEAD_CHANNELS = 128
_ROI_SIZE = 7


class NarrowResNet(nn.Module):
    """A ResNet trunk of five basic blocks, with torchvision's names: conv1, bn1, ..., layer4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, _STEM_CHANNELS, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM_CHANNELS)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        first, second, third, fourth = _STAGE_CHANNELS
        self.layer1 = _stage(_STEM_CHANNELS, first, stride=1)
        self.layer2 = _stage(first, second, stride=2)
        self.layer3 = _stage(second, third, stride=2, blocks=2)
        self.layer4 = _stage(third, fourth, stride=2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to features (N, 128, H / 32, W / 32)."""
        features: Tensor = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            features = stage(features)
        return features


def build() -> FasterRCNN:
    """Return the untrained demo detector; `weights_fp16.pt` loads into it as float32.

    It takes frames of 240 x 320 (height x width) unresized and pads them to 256 x 320. Labels: the indices of
    `CLASSES`.
    """
    backbone = BackboneWithFPN(
        NarrowResNet(),
        return_layers={"layer2": "0", "layer3": "1", "layer4": "2"},
        in_channels_list=list(_STAGE_CHANNELS[1:]),
        out_channels=_FPN_CHANNELS,
    )
    # Parts are 16 to 100 pixels long: torchvision's canonical 224 would send all of them to the finest level.
    roi_pool = MultiScaleRoIAlign(
        featmap_names=["0", "1", "2"], output_size=_ROI_SIZE, sampling_ratio=2, canonical_scale=56
    )
    return FasterRCNN(
        backbone,
        min_size=240,
        max_size=320,
        rpn_anchor_generator=AnchorGenerator(((20,), (40,), (64,), (96,)), ((0.5, 1.0, 2.0),) * 4),
        rpn_pre_nms_top_n_train=400,
        rpn_post_nms_top_n_train=200,
        rpn_pre_nms_top_n_test=300,
        rpn_post_nms_top_n_test=100,
        rpn_batch_size_per_image=128,
        rpn_fg_iou_thresh=0.6,
        box_roi_pool=roi_pool,
        box_head=TwoMLPHead(_FPN_CHANNELS * _ROI_SIZE**2, _HEAD_CHANNELS),
        box_predictor=FastRCNNPredictor(_HEAD_CHANNELS, len(CLASSES)),
        box_batch_size_per_image=64,
        box_detections_per_img=50,
    )


def _stage(channels_in: int, channels_out: int, *, stride: int, blocks: int = 1) -> nn.Sequential:
    """Return residual blocks, the first with a projection as its skip path, the others with the identity."""
    projection = nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel_size=1, stride=stride, bias=False),
        nn.BatchNorm2d(channels_out),
    )
    first = BasicBlock(channels_in, channels_out, stride, projection)
    return nn.Sequential(first, *(BasicBlock(channels_out, channels_out) for _ in range(blocks - 1)))
