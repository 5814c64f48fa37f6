"""What is minimised: torchvision's own losses of RPN and box head, and the distance to the float detector."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import concat_box_prediction_layers

from qexport.detectors.static import StaticDetector
from qexport.training.distillation import Teacher, box_distance, feature_distance, proposal_distance
from qexport.training.images import Batch, Target
from qexport.training.network import TrainingNetwork, TrunkOutput
from qexport.training.settings import TrainingSettings

Parts = dict[str, Tensor]
"""Losses by name, their weights applied: their sum is minimised."""


class Losses:
    """torchvision's training forward around a network with fake quantizers.

    Anchors, matching, sampling, RoIAlign and the losses are torchvision's own, with the detector's own settings.

    Args:
        detector: the eager detector.
        static: its static form, BatchNorm folded.
        settings: which losses, and their weights.
        device: where the network is.
    """

    def __init__(
        self,
        detector: GeneralizedRCNN,
        static: StaticDetector,
        settings: TrainingSettings,
        device: torch.device,
    ) -> None:
        self._rpn = copy.deepcopy(detector.rpn).to(device)
        self._roi_heads = copy.deepcopy(detector.roi_heads).to(device)
        self._resized = (static.spec.resized_height_px, static.spec.resized_width_px)
        image = torch.zeros(1, 3, static.spec.padded_height_px, static.spec.padded_width_px)
        with torch.no_grad():
            features = static.backbone(image)
        self._names = ["0"] if isinstance(features, Tensor) else list(features)
        self._settings = settings
        self._teacher = Teacher(static, device) if settings.distils else None

    def __call__(self, network: TrainingNetwork, batch: Batch) -> Parts:
        """Return the losses of a batch."""
        parts: Parts = {}
        found = network(batch.images)
        taught = self._teacher.trunk(batch.images) if self._teacher else None
        boxes, targets = None, None
        if not self._settings.distill_only:
            proposals, parts = self._rpn_losses(batch.images, found, batch.targets)
            boxes, targets = self._sample(proposals, batch.targets)
        elif taught:
            boxes = self._teacher_proposals(batch.images, taught)
        assert boxes is not None  # one of the two is always asked for
        pooled = self._pool(found[0], boxes)
        logits, deltas = network.head(pooled)
        if targets:
            parts["class"], parts["box"] = fastrcnn_loss(logits, deltas, *targets)
        if taught and self._teacher:
            parts |= self._distances(found, taught, (logits, deltas), self._pool(taught[0], boxes))
        return parts

    def _rpn_losses(
        self, images: Tensor, found: TrunkOutput, targets: list[Target]
    ) -> tuple[list[Tensor], Parts]:
        """Return the proposals of each image, (R, 4) xyxy, and the losses of the RPN."""
        rpn = self._rpn.train()
        proposals, anchors, objectness, deltas = self._propose(images, found)
        labels, matched = rpn.assign_targets_to_anchors(anchors, targets)
        wanted = rpn.box_coder.encode(matched, anchors)
        of_object, of_box = rpn.compute_loss(objectness, deltas, labels, wanted)
        return proposals, {"objectness": of_object, "rpn box": of_box}

    def _propose(
        self, images: Tensor, found: TrunkOutput
    ) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        rpn, (features, objectness, deltas) = self._rpn, found
        sizes = [self._resized] * len(images)
        anchors = rpn.anchor_generator(ImageList(images, sizes), features)
        per_level = [level[0].numel() for level in objectness]
        flat_objectness, flat_deltas = concat_box_prediction_layers(list(objectness), list(deltas))
        decoded = rpn.box_coder.decode(flat_deltas.detach(), anchors).view(len(images), -1, 4)
        proposals, _ = rpn.filter_proposals(decoded, flat_objectness, sizes, per_level)
        return proposals, anchors, flat_objectness, flat_deltas

    @torch.no_grad()
    def _teacher_proposals(self, images: Tensor, taught: TrunkOutput) -> list[Tensor]:
        """Return the float detector's best proposals, as many as the box head trains on."""
        self._rpn.eval()
        proposals, *_ = self._propose(images, taught)
        return [boxes[: self._roi_heads.fg_bg_sampler.batch_size_per_image] for boxes in proposals]

    def _sample(
        self, proposals: list[Tensor], targets: list[Target]
    ) -> tuple[list[Tensor], tuple[list[Tensor], list[Tensor]]]:
        boxes, _, labels, regression = self._roi_heads.select_training_samples(proposals, targets)
        return boxes, (labels, regression)

    def _pool(self, features: Sequence[Tensor], boxes: list[Tensor]) -> Tensor:
        named = dict(zip(self._names, features, strict=True))
        pooled: Tensor = self._roi_heads.box_roi_pool(named, boxes, [self._resized] * len(boxes))
        return pooled

    def _distances(
        self, found: TrunkOutput, taught: TrunkOutput, boxes: tuple[Tensor, Tensor], pooled: Tensor
    ) -> Parts:
        assert self._teacher is not None
        of_features, of_outputs = self._settings.distill_features, self._settings.distill_outputs
        parts: Parts = {}
        if of_features:
            parts["features from float"] = of_features * feature_distance(student=found[0], teacher=taught[0])
        if of_outputs:
            wanted = self._teacher.head(pooled)
            parts["proposals from float"] = of_outputs * proposal_distance(student=found, teacher=taught)
            parts["boxes from float"] = of_outputs * box_distance(student=boxes, teacher=wanted)
        return parts


def total(parts: Parts) -> Tensor:
    """Return the sum that is minimised."""
    return torch.stack(list(parts.values())).sum()
