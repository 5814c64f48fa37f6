"""The float detector as a teacher: how far features and outputs of the quantized one are from its own.

Every distance is 0 where the two agree, and has no unit, so that one weight fits any detector.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name
from torch import Tensor

from qexport.detectors.static import StaticDetector
from qexport.training.network import Head, Trunk, TrunkOutput

_SMALLEST = 1e-12


class Teacher:
    """The float detector, its weights as training began.

    Args:
        static: its static form, BatchNorm folded; copied.
        device: where it goes.
    """

    def __init__(self, static: StaticDetector, device: torch.device) -> None:
        own = copy.deepcopy(static).to(device).eval().requires_grad_(False)
        self._trunk, self._head = Trunk(own), Head(own)

    @torch.no_grad()
    def trunk(self, images: Tensor) -> TrunkOutput:
        """Return features, objectness and deltas."""
        found: TrunkOutput = self._trunk(images)
        return found

    @torch.no_grad()
    def head(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Return class logits and box deltas."""
        found: tuple[Tensor, Tensor] = self._head(pooled)
        return found


def feature_distance(*, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return the squared error over the teacher's power, mean over the levels."""
    levels = [
        F.mse_loss(own, wanted) / wanted.square().mean().clamp(min=_SMALLEST)
        for own, wanted in zip(student, teacher, strict=True)
    ]
    return torch.stack(levels).mean()


def proposal_distance(*, student: TrunkOutput, teacher: TrunkOutput) -> Tensor:
    """Return the distance of objectness (Kullback-Leibler) and deltas (smooth L1), per object of the teacher.

    Anchors count by the teacher's objectness: what it does not propose may be anywhere.
    """
    logits, wanted = _flat(student[1], 1), _flat(teacher[1], 1)
    probability = wanted.sigmoid()
    objects = probability.sum().clamp(min=1.0)
    divergence = F.binary_cross_entropy_with_logits(
        logits, probability, reduction="sum"
    ) - F.binary_cross_entropy_with_logits(wanted, probability, reduction="sum")
    error = F.smooth_l1_loss(_flat(student[2], 4), _flat(teacher[2], 4), reduction="none", beta=1 / 9)
    return (divergence + (error.sum(1, keepdim=True) * probability).sum()) / objects


def box_distance(*, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """Return the distance of class probabilities (Kullback-Leibler) and deltas (smooth L1), mean over boxes.

    A class's deltas count by the teacher's probability of it; those of the background are never used.

    Args:
        student: logits (R, K) and deltas (R, 4 K).
        teacher: the same.
    """
    (logits, deltas), (wanted, wanted_deltas) = student, teacher
    number, classes = wanted.shape
    probability = wanted.softmax(-1)
    divergence = F.kl_div(
        logits.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True
    )
    error = F.smooth_l1_loss(deltas, wanted_deltas, reduction="none", beta=1 / 9)
    of_class = error.reshape(number, classes, 4).sum(-1)[:, 1:]
    weighed = (of_class * probability[:, 1:]).sum() / probability[:, 1:].sum().clamp(min=1.0)
    return divergence + weighed


def _flat(levels: Sequence[Tensor], values: int) -> Tensor:
    """Return (anchors, values) of (N, A * values, H, W) maps."""
    flat = [
        level.reshape(level.shape[0], -1, values, *level.shape[2:]).permute(0, 1, 3, 4, 2).reshape(-1, values)
        for level in levels
    ]
    return torch.cat(flat)
