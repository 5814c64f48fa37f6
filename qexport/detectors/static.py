"""The static form of a two-stage detector: one camera frame of fixed size in, a fixed number of boxes out.

torchvision's GeneralizedRCNN decides shapes as it goes (resize, top-k, NMS, level dispatch). The static
form fixes them all and stays bit-identical: backbone, RPN head, box head and predictor are the
detector's own modules under their own paths; only what surrounds them is written anew.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool

from qexport.artifact import InputSpec
from qexport.detectors import operators
from qexport.errors import CheckpointError
from qexport.settings import PreprocessPlace

DETECTION_MIN_SIZE_PX = 1e-2
"""torchvision's postprocess_detections drops boxes smaller than this."""


class StaticOutput(NamedTuple):
    """What the static form returns."""

    boxes: Tensor
    """(D, 4) float32, xyxy, pixels of the frame; rows from `count` on are zero."""
    scores: Tensor
    """(D,) float32, descending; zero from `count` on."""
    labels: Tensor
    """(D,) int64; zero from `count` on."""
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody asks for
    """() int64: how many rows are detections."""


class Preprocess(nn.Module):
    """Frame to normalised, resized, padded image: torchvision's GeneralizedRCNNTransform at a fixed size."""

    def __init__(self, spec: InputSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, frame: Tensor) -> Tensor:
        """Return (1, 3, padded_h, padded_w) float32 for a (H, W, 3) uint8 RGB frame, or that image itself."""
        spec = self.spec
        if spec.preprocess == "outside":
            return frame
        image: Tensor = operators.normalised_image(
            frame,
            list(spec.mean),
            list(spec.std),
            [spec.resized_height_px, spec.resized_width_px],
            [spec.padded_height_px, spec.padded_width_px],
        )
        return image


class Proposals(nn.Module):
    """RPN outputs to a fixed number of proposals: torchvision's filter_proposals with static shapes."""

    def __init__(
        self, detector: GeneralizedRCNN, spec: InputSpec, features: list[Tensor], count: int
    ) -> None:
        super().__init__()
        rpn = detector.rpn
        per_location = rpn.anchor_generator.num_anchors_per_location()
        self.box_coder = rpn.box_coder
        self.image_px = (spec.resized_height_px, spec.resized_width_px)
        self.min_size, self.score_threshold, self.iou_threshold = (
            rpn.min_size,
            rpn.score_thresh,
            rpn.nms_thresh,
        )
        self.per_level = [
            per_cell * feature.shape[-2] * feature.shape[-1]
            for per_cell, feature in zip(per_location, features, strict=True)
        ]
        self.keep_per_level = [min(number, rpn.pre_nms_top_n()) for number in self.per_level]
        self.count = min(count, sum(self.keep_per_level))
        image_list = _image_list(spec)
        anchors = rpn.anchor_generator(image_list, features)[0].split(self.per_level)
        for level, boxes in enumerate(anchors):
            self.register_buffer(f"anchors_{level}", boxes.clone(), persistent=False)

    def forward(self, objectness: list[Tensor], deltas: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return proposals, (R, 4) float32 xyxy in pixels of the resized image, and which are real, (R,) bool."""
        best_logits, best_deltas, best_anchors = [], [], []
        most = max(self.keep_per_level)
        for level, keep in enumerate(self.keep_per_level):
            best, index = _per_anchor(objectness[level], 1).flatten().topk(keep)
            pad = most - keep  # groups are of one size; a padded anchor has no area and is not valid
            best_logits.append(F.pad(best, (0, pad)))
            best_deltas.append(F.pad(_per_anchor(deltas[level], 4).index_select(0, index), (0, 0, 0, pad)))
            anchors: Tensor = getattr(self, f"anchors_{level}")
            best_anchors.append(F.pad(anchors.index_select(0, index), (0, 0, 0, pad)))
        decoded = self.box_coder.decode_single(torch.cat(best_deltas), torch.cat(best_anchors))
        box = clip_boxes(decoded, self.image_px).reshape(len(best_logits), most, 4)
        score = torch.stack(best_logits).sigmoid()
        valid = _large_enough(box, self.min_size) & (score >= self.score_threshold)
        kept = operators.batched_nms_mask(box, score, valid, self.iou_threshold)
        ranked, index = operators.best_scores(torch.where(kept, score, -1.0).flatten(), self.count)
        real = ranked >= 0
        return box.reshape(-1, 4).index_select(0, index) * real[:, None], real


class RoiPool(nn.Module):
    """torchvision's MultiScaleRoIAlign as one operator."""

    def __init__(self, detector: GeneralizedRCNN, names: list[str]) -> None:
        super().__init__()
        pool = detector.roi_heads.box_roi_pool
        self.levels = [names.index(name) for name in names if name in pool.featmap_names]
        self.scales = [float(scale) for scale in pool.scales]
        self.output_size = list(pool.output_size)
        self.sampling_ratio = pool.sampling_ratio
        self.canonical_scale, self.canonical_level = pool.canonical_scale, pool.canonical_level

    def forward(self, features: list[Tensor], proposals: Tensor) -> Tensor:
        """Return (R, C, pooled_h, pooled_w) float32."""
        pooled: Tensor = operators.multiscale_roi_align(
            [features[level] for level in self.levels],
            proposals,
            self.scales,
            self.output_size,
            self.sampling_ratio,
            self.canonical_scale,
            self.canonical_level,
        )
        return pooled


class SelectDetections(nn.Module):
    """Class logits and box deltas to detections: torchvision's postprocess_detections with static shapes."""

    frame_ratio: Tensor
    is_object: Tensor
    """(C,) bool, false for the background."""

    def __init__(self, detector: GeneralizedRCNN, spec: InputSpec, count: int) -> None:
        super().__init__()
        heads = detector.roi_heads
        self.box_coder = heads.box_coder
        self.image_px = (spec.resized_height_px, spec.resized_width_px)
        self.score_threshold, self.iou_threshold, self.count = heads.score_thresh, heads.nms_thresh, count
        # torchvision's resize_boxes: ratios of float32 tensors.
        height, width = (
            torch.tensor(frame, dtype=torch.float32) / torch.tensor(resized, dtype=torch.float32)
            for frame, resized in zip((spec.frame_height_px, spec.frame_width_px), self.image_px, strict=True)
        )
        ratio = torch.stack([width, height, width, height])
        self.register_buffer("frame_ratio", ratio, persistent=False)
        classes = torch.arange(heads.box_predictor.cls_score.out_features)
        self.register_buffer("is_object", classes > 0, persistent=False)

    def forward(self, logits: Tensor, deltas: Tensor, proposals: Tensor, real: Tensor) -> StaticOutput:
        """Select the detections of one frame; shapes as in StaticOutput."""
        number, classes = logits.shape
        decoded = self.box_coder.decode_single(deltas, proposals).reshape(number, classes, 4)
        boxes = clip_boxes(decoded, self.image_px)
        scores = logits.softmax(-1)
        valid = (scores > self.score_threshold) & real[:, None] & _large_enough(boxes, DETECTION_MIN_SIZE_PX)
        # The background stays, though nothing of it is valid: torchvision shifts boxes by their label before
        # NMS, and only the same shift rounds the same. Equal scores rank by proposal first, as torchvision's.
        kept = operators.batched_nms_mask(
            boxes.permute(1, 0, 2),
            scores.permute(1, 0),
            (valid & self.is_object).permute(1, 0),
            self.iou_threshold,
        )
        ranked, index = operators.best_scores(
            torch.where(kept.permute(1, 0), scores, -1.0).flatten(), self.count
        )
        found = ranked >= 0
        labels = index % classes
        return StaticOutput(
            boxes.reshape(-1, 4).index_select(0, index) * self.frame_ratio * found[:, None],
            ranked * found,
            labels * found,
            found.sum(),
        )


class StaticDetector(nn.Module):
    """A two-stage detector with every shape fixed: batch 1, one frame size, R proposals, D detections."""

    def __init__(self, detector: GeneralizedRCNN, spec: InputSpec, proposals: int, detections: int) -> None:
        super().__init__()
        self.spec = spec
        self.preprocess = Preprocess(spec)
        self.backbone = detector.backbone
        features = self._features(torch.zeros(1, 3, spec.padded_height_px, spec.padded_width_px))
        self.rpn, self.roi_heads = nn.Module(), nn.Module()
        self.rpn.head = detector.rpn.head
        self.rpn.proposals = Proposals(detector, spec, list(features.values()), proposals)
        self.roi_heads.box_roi_pool = RoiPool(detector, list(features))
        self.roi_heads.box_head = detector.roi_heads.box_head
        self.roi_heads.box_predictor = detector.roi_heads.box_predictor
        rows = min(detections, self.proposals * (detector.roi_heads.box_predictor.cls_score.out_features - 1))
        self.roi_heads.detections = SelectDetections(detector, spec, rows)

    @property
    def proposals(self) -> int:
        """Proposals that the box head sees."""
        return int(self.rpn.proposals.count)  # type: ignore[union-attr, arg-type]

    @property
    def detections(self) -> int:
        """Rows of the output."""
        return int(self.roi_heads.detections.count)  # type: ignore[union-attr, arg-type]

    def example_input(self) -> Tensor:
        """Return a zero input of the right shape and type."""
        if self.spec.preprocess == "outside":
            return torch.zeros(1, 3, self.spec.padded_height_px, self.spec.padded_width_px)
        return torch.zeros(self.spec.frame_height_px, self.spec.frame_width_px, 3, dtype=torch.uint8)

    def _features(self, image: Tensor) -> dict[str, Tensor]:
        features = self.backbone(image)
        return {"0": features} if isinstance(features, Tensor) else features

    def forward(self, frame: Tensor) -> StaticOutput:
        """Detect; `frame` is (H, W, 3) uint8 RGB, or the normalised image where preprocessing is outside."""
        features = list(self._features(self.preprocess(frame)).values())
        proposals, real = self.rpn.proposals(*self.rpn.head(features))  # type: ignore[operator]
        pooled = self.roi_heads.box_roi_pool(features, proposals)  # type: ignore[operator]
        logits, deltas = self.roi_heads.box_predictor(self.roi_heads.box_head(pooled))  # type: ignore[operator]
        return self.roi_heads.detections(logits, deltas, proposals, real)  # type: ignore[operator, no-any-return]


class StridedLastLevel(ExtraFPNBlock):  # type: ignore[misc]  # torchvision has no types
    """torchvision's LastLevelMaxPool without the 1x1 max-pool, which several runtimes cannot run: equal values."""

    def forward(self, x: list[Tensor], y: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Append the last map at half its resolution, under the name `pool`."""
        return [*x, x[-1][:, :, ::2, ::2]], [*names, "pool"]


def make_static(
    detector: GeneralizedRCNN,
    *,
    frame_px: tuple[int, int],
    proposals: int | None = None,
    detections: int | None = None,
    preprocess: PreprocessPlace = "inside",
) -> StaticDetector:
    """Return the static form; the detector itself is left as it is.

    Args:
        detector: a torchvision-structured two-stage detector.
        frame_px: height and width of the camera frame.
        proposals: proposals that the box head sees; None: the detector's own number.
        detections: rows of the output; None: the detector's own number.
        preprocess: where the resize and the normalisation happen.

    Raises:
        CheckpointError: the detector cannot run on a frame of that size.
    """
    own = copy.deepcopy(detector).eval().requires_grad_(False)
    for module in own.modules():
        if isinstance(getattr(module, "inplace", None), bool):
            module.inplace = False
    fpn = getattr(own.backbone, "fpn", None)
    if fpn is not None and isinstance(fpn.extra_blocks, LastLevelMaxPool):
        fpn.extra_blocks = StridedLastLevel()
    with torch.no_grad():
        try:
            own([torch.zeros(3, *frame_px)])  # decides the pooler's scales, and shows that the detector runs
        except Exception as error:
            raise CheckpointError(
                f"the detector fails on a {frame_px[0]}x{frame_px[1]} frame: {error}. "
                "Run its eager form on such an image first, or give another --frame."
            ) from error
        spec = _input_spec(own, frame_px, preprocess)
        return StaticDetector(
            own,
            spec,
            proposals if proposals is not None else own.rpn.post_nms_top_n(),
            detections if detections is not None else own.roi_heads.detections_per_img,
        ).eval()


def clip_boxes(boxes: Tensor, image_px: tuple[int, int]) -> Tensor:
    """Clip (..., 4) xyxy boxes to an image of (height, width) pixels."""
    height, width = image_px
    x = boxes[..., 0::2].clamp(min=0, max=width)
    y = boxes[..., 1::2].clamp(min=0, max=height)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], -1)


def _large_enough(boxes: Tensor, min_size_px: float) -> Tensor:
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    return (width >= min_size_px) & (height >= min_size_px)


def _per_anchor(head_output: Tensor, values: int) -> Tensor:
    """Return (anchors, values) for a (1, A * values, H, W) map, in torchvision's order of anchors."""
    return head_output.permute(0, 2, 3, 1).reshape(-1, values)


def _input_spec(
    detector: GeneralizedRCNN, frame_px: tuple[int, int], preprocess: PreprocessPlace
) -> InputSpec:
    transform = detector.transform
    images, _ = transform([torch.zeros(3, *frame_px)])
    resized, padded = images.image_sizes[0], images.tensors.shape[-2:]
    mean, std = (
        tuple(float(value) for value in values) for values in (transform.image_mean, transform.image_std)
    )
    return InputSpec(
        frame_height_px=frame_px[0],
        frame_width_px=frame_px[1],
        preprocess=preprocess,
        resized_height_px=int(resized[0]),
        resized_width_px=int(resized[1]),
        padded_height_px=int(padded[0]),
        padded_width_px=int(padded[1]),
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
    )


def _image_list(spec: InputSpec) -> object:
    image = torch.zeros(1, 3, spec.padded_height_px, spec.padded_width_px)
    return ImageList(image, [(spec.resized_height_px, spec.resized_width_px)])
