"""The operators of qexport in PyTorch's and torchvision's own, straight on: no branch, no loop, no custom operator.

Each computes bit for bit what its operator in `qexport.detectors.operators` computes, given first what is known of it
while it is written (`facts_of`), and then the same arguments. Sizes that depend on the data stay inside; loops run over
levels and groups, whose numbers are fixed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name
import torchvision
from torch import Tensor
from torch.fx import Node

from qexport.detectors.operators import level_range
from qexport.quantization.graph import is_dequantize, is_quantize, op_name

_MOST_SHIFTED = 4000
"""Numbers of coordinates up to which `torchvision.ops.batched_nms` shifts boxes apart; beyond, it takes each group by
itself as it is. Shifted boxes round otherwise."""
_LEVEL_EPSILON = 1e-6
"""Of torchvision's LevelMapper."""


def facts_of(node: Node) -> tuple[int, ...]:
    """Return the numbers that the form of an operator needs, and that a trace would take for data."""
    shapes = [tuple(int(size) for size in shape_of(each)) for each in node.all_input_nodes]
    name = op_name(node)
    if name == "normalised_image":
        return shapes[0][:2]
    if name == "multiscale_roi_align":
        scales: Any = node.args[2]
        return (shapes[-1][0], shapes[0][1], *level_range(scales))
    return shapes[0][:1]


def normalised_image(
    facts: tuple[int, ...],
    frame: Tensor,
    mean: list[float],
    std: list[float],
    resized: list[int],
    padded: list[int],
) -> Tensor:
    """Return (1, 3, padded_h, padded_w) float32 for a (H, W, 3) uint8 RGB frame."""
    image = frame.permute(2, 0, 1).to(torch.float32) / 255
    image = ((image - torch.tensor(mean).reshape(3, 1, 1)) / torch.tensor(std).reshape(3, 1, 1)).unsqueeze(0)
    if list(facts) != resized:
        image = F.interpolate(image, size=resized, mode="bilinear", align_corners=False)
    return F.pad(image, (0, padded[1] - resized[1], 0, padded[0] - resized[0])).contiguous()


def multiscale_roi_align(
    facts: tuple[int, ...],
    features: list[Tensor],
    boxes: Tensor,
    scales: list[float],
    output_size: list[int],
    sampling_ratio: int,
    canonical_scale: int,
    canonical_level: int,
) -> Tensor:
    """Return (R, C, output_size) float32: each box from its own level, once."""
    number, channels, first, last = facts
    rows = torch.cat([torch.zeros(number, 1), boxes], 1)
    if len(features) == 1:
        return _roi_align(features[0], rows, scales[0], output_size, sampling_ratio)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    # The FPN paper's equation 1, as torchvision's LevelMapper writes it.
    size = torch.sqrt(area) / canonical_scale
    level = torch.floor(canonical_level + torch.log2(size) + torch.tensor(_LEVEL_EPSILON))
    index = torch.clamp(level, min=first, max=last).to(torch.int64) - first
    pooled = torch.zeros(number, channels, *output_size)
    for place, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        own = torch.nonzero(index == place).squeeze(1)
        part = _roi_align(feature, rows.index_select(0, own), scale, output_size, sampling_ratio)
        pooled = pooled.index_copy(0, own, part)
    return pooled


def _roi_align(feature: Tensor, rows: Tensor, scale: float, size: list[int], ratio: int) -> Tensor:
    pooled: Tensor = torch.ops.torchvision.roi_align(feature, rows, scale, size[0], size[1], ratio, False)
    return pooled


def batched_nms_mask(
    facts: tuple[int, ...], boxes: Tensor, scores: Tensor, valid: Tensor, iou_threshold: float
) -> Tensor:
    """Return (G, N) bool, true for the boxes that survive in their group.

    Groups are suppressed one after another. Boxes that torchvision would shift apart are shifted by as much: their
    coordinates are not negative, so shifted groups never overlap, and one after another is the same as all at once.
    """
    largest = torch.where(valid.unsqueeze(-1), boxes, -torch.inf).max()
    step = torch.where(valid.sum() * 4 > _MOST_SHIFTED, torch.zeros_like(largest), largest + 1)
    kept = []
    for group in range(facts[0]):
        own = torch.nonzero(valid[group]).squeeze(1)
        shifted = boxes[group].index_select(0, own) + step * group
        survive = torchvision.ops.nms(shifted, scores[group].index_select(0, own), iou_threshold)
        kept.append(torch.zeros_like(valid[group]).index_fill(0, own.index_select(0, survive), 1))
    return torch.stack(kept)


def best_scores(facts: tuple[int, ...], scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the best scores and where they stand; of equal ones the earlier first."""
    del facts
    ranked, index = torch.sort(scores, stable=True, descending=True)
    return ranked[:count], index[:count]


FORMS = {
    "batched_nms_mask": batched_nms_mask,
    "best_scores": best_scores,
    "multiscale_roi_align": multiscale_roi_align,
    "normalised_image": normalised_image,
}
"""By name of the operator in `qexport::`."""


def shape_of(node: Node) -> tuple[int, ...]:
    """Return a node's shape; one that quantizes or dequantizes has that of what it reads."""
    while is_quantize(node) or is_dequantize(node):
        node = node.all_input_nodes[0]
    return tuple(int(size) for size in node.meta["val"].shape)
