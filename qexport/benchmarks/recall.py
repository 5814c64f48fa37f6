"""Boxes matched as sets: how much of one side's boxes the other has too."""

from __future__ import annotations

from collections import defaultdict
from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import box_iou

from qexport.detections import Detections
from qexport.results import StageRecall

Against = Literal["fp32", "reference"]
PROPOSAL_IOU = 0.7
DETECTION_IOU = 0.5


class RecallCounter:
    """Counts matches over images."""

    def __init__(self) -> None:
        self._boxes: dict[tuple[str, Against], int] = defaultdict(int)
        self._matched: dict[tuple[str, Against], int] = defaultdict(int)
        self._score: dict[Against, float] = defaultdict(float)

    def add_proposals(self, against: Against, *, wanted: Tensor, found: Tensor) -> None:
        """Count the wanted proposals, (R, 4), that some found one overlaps by `PROPOSAL_IOU`."""
        real = wanted[(wanted[:, 2] > wanted[:, 0]) & (wanted[:, 3] > wanted[:, 1])]
        self._boxes["proposals", against] += len(real)
        if len(real):
            best = box_iou(real, found).amax(1)
            self._matched["proposals", against] += int((best >= PROPOSAL_IOU).sum())

    def add_detections(
        self, against: Against, *, wanted: tuple[Tensor, Tensor, Tensor, Tensor], found: Detections
    ) -> None:
        """Match detections one to one, best score first, within a class, by `DETECTION_IOU`."""
        boxes, scores, labels, count = wanted
        number = int(count)
        self._boxes["detections", against] += number
        free = torch.ones(len(found), dtype=torch.bool)
        if not number or not len(found):
            return
        overlap = box_iou(boxes[:number], torch.from_numpy(found.boxes))
        same = labels[:number, None] == torch.from_numpy(found.labels)[None]
        overlap = torch.where(same, overlap, torch.zeros_like(overlap))
        for index in range(number):
            candidates = torch.where(free, overlap[index], torch.zeros_like(overlap[index]))
            best = int(candidates.argmax())
            if candidates[best] >= DETECTION_IOU:
                free[best] = False
                self._matched["detections", against] += 1
                difference = abs(float(scores[index]) - float(found.scores[best]))
                self._score[against] = max(self._score[against], difference)

    def results(self) -> tuple[StageRecall, ...]:
        """Return what was counted, proposals first."""
        ious = {"proposals": PROPOSAL_IOU, "detections": DETECTION_IOU}
        return tuple(
            StageRecall(
                stage=stage,
                against=against,
                boxes=self._boxes[stage, against],
                matched=self._matched[stage, against],
                iou=ious[stage],
                max_score_difference=self._score[against] if stage == "detections" else None,
            )
            for stage in ("proposals", "detections")
            for against in ("fp32", "reference")
        )
