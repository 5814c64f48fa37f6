"""torchvision's detectors with random weights that behave like trained ones, on small frames.

Freshly initialised, a detector gives the same score everywhere and detects all or nothing. Normalised layer by
layer on one picture, its scores spread as after training.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.misc import FrozenBatchNorm2d

from qexport.detectors.static import StaticDetector

FRAME_PX = (160, 224)
CLASSES = 4
Row = tuple[float, float, float, float, float, int]


def texture(seed: int, frame_px: tuple[int, int] = FRAME_PX) -> Tensor:
    """Return a (H, W, 3) uint8 frame of smooth random colours."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 20, 28, generator=random)
    smooth = nn.functional.interpolate(coarse, size=frame_px, mode="bilinear", align_corners=False)
    return (smooth[0].permute(1, 2, 0) * 255).to(torch.uint8).contiguous()


def build_torchvision(name: str, *, proposals: int = 100) -> GeneralizedRCNN:
    """Return torchvision's detector of that name, lively, for frames of `FRAME_PX`."""
    torch.set_num_threads(1)  # tests share the machine
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        detector = getattr(torchvision.models.detection, name)(
            weights=None,
            weights_backbone=None,
            num_classes=CLASSES,
            min_size=min(FRAME_PX),
            max_size=max(FRAME_PX),
            rpn_post_nms_top_n_test=proposals,
        )
    return enliven(detector.eval())


def build_single_level(*middle: nn.Module) -> GeneralizedRCNN:
    """Return a detector without a feature pyramid, whose 210 anchors are fewer than the RPN would take.

    Args:
        middle: what the trunk does between its two convolutions: 16 channels in, 16 out.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=4, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            *middle,
            nn.Conv2d(16, 24, 3, stride=8, padding=1),
            nn.ReLU(inplace=True),
        )
        backbone.out_channels = 24  # type: ignore[assignment] # where torchvision looks for it
        detector = FasterRCNN(
            backbone,
            num_classes=CLASSES,
            min_size=min(FRAME_PX),
            max_size=max(FRAME_PX),
            rpn_anchor_generator=AnchorGenerator(((32, 64),), ((0.5, 1.0, 2.0),)),
            box_roi_pool=MultiScaleRoIAlign(["0"], output_size=5, sampling_ratio=2),
            rpn_post_nms_top_n_test=50,
        )
    return enliven(detector.eval())


def enliven(detector: GeneralizedRCNN) -> GeneralizedRCNN:
    """Normalise batch norms and heads on one picture, so that activations and scores have a usual spread."""
    heads = detector.roi_heads.box_predictor
    spreads = {
        detector.rpn.head.cls_logits: 1.5,
        detector.rpn.head.bbox_pred: 0.3,
        heads.cls_score: 2.0,
        heads.bbox_pred: 0.5,
    }
    hooks = [
        module.register_forward_pre_hook(_normalise)
        for module in detector.modules()
        if isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d))
    ]
    hooks += [module.register_forward_hook(_spread_once(spread)) for module, spread in spreads.items()]
    with torch.no_grad():
        detector([texture(0).permute(2, 0, 1) / 255])
    for hook in hooks:
        hook.remove()
    return detector


def detect(detector: GeneralizedRCNN, frame: Tensor) -> list[Row]:
    """Return the eager detector's boxes, scores and labels as sorted rows."""
    with torch.no_grad():
        found = detector([frame.permute(2, 0, 1).to(torch.float32) / 255])[0]
    return rows(found["boxes"], found["scores"], found["labels"])


def detect_static(static: StaticDetector, given: Tensor) -> list[Row]:
    """Return the static form's boxes, scores and labels as sorted rows."""
    with torch.no_grad():
        boxes, scores, labels, count = static(given)
    number = int(count)
    assert not boxes[number:].any()
    assert not scores[number:].any()
    assert not labels[number:].any()
    return rows(boxes[:number], scores[:number], labels[:number])


def rows(boxes: Tensor, scores: Tensor, labels: Tensor) -> list[Row]:
    """Return detections as rows that compare bit for bit, in an order that equal scores do not change."""
    return sorted(
        (*box, score, label)
        for box, score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True)
    )


def _normalise(module: nn.Module, given: tuple[Tensor, ...]) -> None:
    module.running_mean.copy_(given[0].mean((0, 2, 3)))  # type: ignore[operator, union-attr]
    module.running_var.copy_(given[0].var((0, 2, 3)) + 1e-3)  # type: ignore[operator, union-attr]


def _spread_once(spread: float) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
    """Return a hook that scales a layer at its first call (the finest level's) so that its output spreads."""
    scaled = False

    def scale(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        nonlocal scaled
        if scaled:
            return None
        scaled = True
        factor = spread / float(output.std())
        module.weight.mul_(factor)  # type: ignore[operator, union-attr]
        module.bias.zero_()  # type: ignore[operator, union-attr]
        return output * factor

    return scale
