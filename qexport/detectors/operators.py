"""The operators of a two-stage detector that every runtime has in a form of its own.

They stay whole in the exported graph, so that each target lowers them as it is fastest there. Run in
PyTorch they are torchvision's own code, hence bit-identical to the eager detector.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name
import torchvision
from torch import Tensor
from torchvision.ops.poolers import LevelMapper, _multiscale_roi_align


@torch.library.custom_op("qexport::normalised_image", mutates_args=())
def normalised_image(
    frame: Tensor, mean: list[float], std: list[float], resized: list[int], padded: list[int]
) -> Tensor:
    """Make the detector's image of a camera frame, as torchvision's GeneralizedRCNNTransform does.

    Args:
        frame: (H, W, 3) uint8 RGB.
        mean: per channel, of values in 0..1.
        std: per channel.
        resized: height and width after the bilinear resize.
        padded: height and width after zeros are appended at the bottom and the right.

    Returns:
        (1, 3, padded_h, padded_w) float32.
    """
    image = frame.permute(2, 0, 1).to(torch.float32) / 255
    image = ((image - torch.tensor(mean).reshape(3, 1, 1)) / torch.tensor(std).reshape(3, 1, 1))[None]
    if list(image.shape[-2:]) != resized:
        image = F.interpolate(image, size=resized, mode="bilinear", align_corners=False)
    return F.pad(image, (0, padded[1] - resized[1], 0, padded[0] - resized[0])).contiguous()


@normalised_image.register_fake
def _(frame: Tensor, mean: list[float], std: list[float], resized: list[int], padded: list[int]) -> Tensor:
    return frame.new_empty((1, 3, *padded), dtype=torch.float32)


@torch.library.custom_op("qexport::multiscale_roi_align", mutates_args=())
def multiscale_roi_align(
    features: list[Tensor],
    boxes: Tensor,
    scales: list[float],
    output_size: list[int],
    sampling_ratio: int,
    canonical_scale: int,
    canonical_level: int,
) -> Tensor:
    """Pool each box from the pyramid level that its size asks for (FPN paper, equation 1).

    Args:
        features: one (1, C, H_l, W_l) float32 map a level, finest first.
        boxes: (R, 4) float32, xyxy, pixels of the padded image.
        scales: size of a level over the size of the image, one a level.
        output_size: height and width of the pooled map.
        sampling_ratio: samples per bin and axis.
        canonical_scale: box size in pixels that belongs to `canonical_level`.
        canonical_level: exponent of that level's stride.

    Returns:
        (R, C, output_size) float32.
    """
    mapper = LevelMapper(*level_range(scales), canonical_scale, canonical_level)
    # torchvision's private function is what its MultiScaleRoIAlign calls: equal by construction.
    pooled: Tensor = _multiscale_roi_align(
        features, [boxes], tuple(output_size), sampling_ratio, scales, mapper
    )
    return pooled.contiguous()


@multiscale_roi_align.register_fake
def _(
    features: list[Tensor],
    boxes: Tensor,
    scales: list[float],
    output_size: list[int],
    sampling_ratio: int,
    canonical_scale: int,
    canonical_level: int,
) -> Tensor:
    return features[0].new_empty((boxes.shape[0], features[0].shape[1], *output_size))


@torch.library.custom_op("qexport::batched_nms_mask", mutates_args=())
def batched_nms_mask(boxes: Tensor, scores: Tensor, valid: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression of each group by itself, with a result of static shape.

    Args:
        boxes: (G, N, 4) float32, xyxy; a group is a pyramid level or a class.
        scores: (G, N) float32, not negative where valid.
        valid: (G, N) bool; an invalid box neither survives nor suppresses.
        iou_threshold: a box that overlaps a better one by more than this is suppressed.

    Returns:
        (G, N) bool, true for the boxes that survive.
    """
    group, index = valid.nonzero(as_tuple=True)
    kept = torchvision.ops.batched_nms(boxes[group, index], scores[group, index], group, iou_threshold)
    mask = torch.zeros_like(valid)
    mask[group[kept], index[kept]] = True
    return mask


@batched_nms_mask.register_fake
def _(boxes: Tensor, scores: Tensor, valid: Tensor, iou_threshold: float) -> Tensor:
    return torch.empty_like(valid)


@torch.library.custom_op("qexport::best_scores", mutates_args=())
def best_scores(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the best scores and where they stand, best first; of equal ones the earlier first.

    torchvision ranks what NMS left by a stable sort; `torch.topk` promises no order of equal scores, and
    scores that a sigmoid or an int8 tensor saturated are equal by the dozen.

    Args:
        scores: (N,) float32.
        count: how many, at most N.

    Returns:
        Scores, (count,) float32, and indices, (count,) int64.
    """
    ranked, index = scores.sort(stable=True, descending=True)
    return ranked[:count].clone(), index[:count].clone()


@best_scores.register_fake
def _(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    return scores.new_empty(count), scores.new_empty(count, dtype=torch.int64)


def level_range(scales: list[float]) -> tuple[int, int]:
    """Return the exponents of the strides of the first and the last level, as torchvision derives them."""
    exponents = [int(-torch.log2(torch.tensor(scale, dtype=torch.float32)).item()) for scale in scales]
    return exponents[0], exponents[-1]
