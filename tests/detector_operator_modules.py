"""RoIAlign, suppression, ranking and the image as modules, and corner cases of them, for every lowering's tests."""

from __future__ import annotations

import torch
from graph_cases import Case, case
from operator_cases import BORDER_BOXES, MEAN, STD, RoiCase, random_boxes, random_nms
from torch import Tensor, nn

from qexport.detectors import operators

Suppression = tuple[Tensor, Tensor, Tensor, float]
"""Boxes, (G, N, 4), scores, validity and the threshold."""


class Pool(nn.Module):
    """RoIAlign of maps at constant boxes."""

    boxes: Tensor

    def __init__(self, wanted: RoiCase) -> None:
        super().__init__()
        self.wanted = wanted
        self.register_buffer("boxes", wanted.boxes)

    def forward(self, *features: Tensor) -> Tensor:
        asked = self.wanted
        pooled: Tensor = operators.multiscale_roi_align(
            list(features),
            self.boxes,
            asked.scales,
            list(asked.output_size),
            asked.sampling_ratio,
            asked.canonical_scale,
            4,
        )
        return pooled


class Operator(nn.Module):
    """An operator by itself, of one input."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.given = given

    def example_input(self) -> Tensor:
        return self.given


class Suppress(Operator):
    """Suppression of boxes; scores and validity are inputs too, at the end of each row."""

    def __init__(self, boxes: Tensor, scores: Tensor, valid: Tensor, threshold: float) -> None:
        super().__init__(torch.cat([boxes, scores[..., None], valid[..., None].float()], 2))
        self.threshold = threshold

    def forward(self, rows: Tensor) -> tuple[Tensor]:
        return (operators.batched_nms_mask(rows[..., :4], rows[..., 4], rows[..., 5] > 0, self.threshold),)


class Best(Operator):
    """The best scores."""

    def __init__(self, scores: Tensor, count: int) -> None:
        super().__init__(scores)
        self.count = count

    def forward(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        best, index = operators.best_scores(scores, self.count)
        return best, index


class Image(Operator):
    """The image of a frame."""

    def __init__(self, frame: Tensor, resized: tuple[int, int], padded: tuple[int, int]) -> None:
        super().__init__(frame)
        self.resized, self.padded = list(resized), list(padded)

    def forward(self, frame: Tensor) -> tuple[Tensor]:
        return (operators.normalised_image(frame, list(MEAN), list(STD), self.resized, self.padded),)


def roi_case(wanted: RoiCase) -> Case:
    height, width = wanted.image_px
    shapes = [(1, wanted.channels, int(height * scale), int(width * scale)) for scale in wanted.scales]
    scales = [scale / 32 for scale in wanted.scales_of_levels[: wanted.levels]]
    return case(Pool(wanted), *shapes, scales=scales)


def boxes(*rows: tuple[float, float, float, float]) -> Tensor:
    return torch.tensor([rows])


def chain(links: int) -> Suppression:
    """Return boxes each of which overlaps the next alone, best first."""
    rows = torch.tensor([[[4.0 * n, 0, 10 + 4 * n, 10] for n in range(links)]])
    return rows, torch.linspace(0.9, 0.1, links)[None], torch.ones(1, links, dtype=torch.bool), 0.4


def tied(groups: int, number: int, values: int) -> Suppression:
    rows, scores, valid = random_nms(groups, number, valid=0.9, size=80)
    return rows, torch.round(scores * values) / values, valid, 0.5


SAME = boxes((5, 5, 5, 9), (5, 5, 5, 9), (0, 0, 10, 10), (0, 0, 10, 10), (20, 0, 30, 10))
ONE_TO_FIVE = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5]])
VALID = torch.ones(1, 5, dtype=torch.bool)


ROI_CORNERS = {
    "boxes of the coarsest level alone": RoiCase(4, 5, BORDER_BOXES[:1], canonical_scale=14),
    "boxes of the finest level alone": RoiCase(4, 5, random_boxes(9), canonical_scale=5000),
    "one sample a bin, border boxes, one level": RoiCase(1, 3, BORDER_BOXES, sampling_ratio=1),
    "three samples a bin, border boxes": RoiCase(4, 3, BORDER_BOXES, sampling_ratio=3),
    "more than one turn, the last one short": RoiCase(2, 256, random_boxes(13)),
}


SUPPRESSION_CORNERS: dict[str, Suppression] = {
    "boxes without area": (SAME, ONE_TO_FIVE, VALID, 0.5),
    "equal boxes of equal scores": (SAME, torch.full((1, 5), 0.5), VALID, 0.5),
    "scores of zero": (SAME, torch.zeros(1, 5), VALID, 0.5),
    "best box not valid": (SAME, ONE_TO_FIVE.flip(1), torch.tensor([[True, True, False, True, True]]), 0.5),
    "last box alone valid": (SAME, ONE_TO_FIVE, torch.tensor([[False, False, False, False, True]]), 0.5),
    "one box": (SAME[:, 4:], ONE_TO_FIVE[:, 4:], VALID[:, 4:], 0.5),
    "overlap that equals the threshold": (
        boxes((0, 0, 10, 10), (0, 0, 10, 5), (0, 0, 5, 5), (0, 0, 10, 10)),
        torch.tensor([[0.9, 0.8, 0.7, 0.6]]),
        VALID[:, :4],
        0.5,
    ),
    "few different scores": tied(4, 100, 6),
    "scores of int8 maps": tied(3, 300, 127),
    "all scores equal": (
        *random_nms(2, 64, valid=1.0, size=120)[:1],
        torch.ones(2, 64),
        VALID.new_ones(2, 64),
        0.3,
    ),
}

BEST = {
    "all different": (torch.rand(50, generator=torch.Generator().manual_seed(0)), 20),
    "all of them": (torch.rand(50, generator=torch.Generator().manual_seed(0)), 50),
    "all equal": (torch.zeros(40), 13),
    "few different": (torch.arange(60).remainder(3) / 4, 30),
    "what suppression left": (torch.where(torch.arange(60).remainder(4) > 0, torch.tensor(-1.0), 0.5), 30),
    "one": (torch.tensor([0.25]), 1),
}
