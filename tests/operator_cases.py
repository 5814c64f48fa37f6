"""What each form of an operator is tried on: boxes at borders, of less than a cell, on every level; crowds; ratios."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qexport.detectors import operators

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STRIDES = (4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class RoiCase:
    """Feature maps of pyramid levels, and boxes of many sizes on the image."""

    levels: int
    channels: int
    boxes: Tensor
    image_px: tuple[int, int] = (160, 224)
    scales_of_levels: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    sampling_ratio: int = 2
    output_size: tuple[int, int] = (7, 7)
    canonical_scale: int = 56

    def features(self) -> list[Tensor]:
        """Return random maps, (1, C, H / stride, W / stride)."""
        random = torch.Generator().manual_seed(self.levels + self.channels)
        height, width = self.image_px
        return [
            torch.randn(1, self.channels, height // stride, width // stride, generator=random) * scale
            for stride, scale in zip(STRIDES[: self.levels], self.scales_of_levels, strict=False)
        ]

    @property
    def scales(self) -> list[float]:
        return [1 / stride for stride in STRIDES[: self.levels]]

    def torchvision(self, features: list[Tensor]) -> Tensor:
        result: Tensor = operators.multiscale_roi_align(
            features,
            self.boxes,
            self.scales,
            list(self.output_size),
            self.sampling_ratio,
            self.canonical_scale,
            4,
        )
        return result


def random_boxes(count: int, image_px: tuple[int, int] = (160, 224)) -> Tensor:
    """Return boxes from tiny to huge inside the image, (N, 4)."""
    random = torch.Generator().manual_seed(count)
    height, width = image_px
    size = torch.exp(torch.rand(count, 2, generator=random) * 5.5)
    centre = torch.rand(count, 2, generator=random) * torch.tensor([width, height])
    boxes = torch.cat([centre - size / 2, centre + size / 2], 1)
    return operators_clip(boxes, image_px)


def operators_clip(boxes: Tensor, image_px: tuple[int, int]) -> Tensor:
    height, width = image_px
    limit = torch.tensor([width, height, width, height], dtype=torch.float32)
    return torch.minimum(boxes.clamp(min=0), limit)


BORDER_BOXES = torch.tensor(
    [
        [0, 0, 224, 160],  # all of the image
        [0, 0, 0, 0],  # what pads the proposals
        [224, 160, 224, 160],
        [223.5, 0, 224, 160],  # less than a cell wide, at the right border
        [0, 159.2, 224, 160],  # less than a cell high, at the lower border
        [0, 157.5, 56, 159.9],
        [220.1, 155.2, 224, 160],
        [0, 0, 224, 1],
        [0, 0, 3, 160],
        [100.25, 80.5, 100.25, 120],
        [191.9, 127.9, 224, 160],
        [16, 16, 32, 32],
    ],
    dtype=torch.float32,
)
ROI_CASES = {
    "four levels": RoiCase(4, 8, random_boxes(60)),
    "three levels, odd channels": RoiCase(3, 13, random_boxes(40)),
    "two levels": RoiCase(2, 5, random_boxes(30)),
    "one level, one channel": RoiCase(1, 1, random_boxes(30)),
    "border boxes": RoiCase(4, 6, BORDER_BOXES),
    "border boxes, two levels": RoiCase(2, 6, BORDER_BOXES),
    "border boxes, one level": RoiCase(1, 6, BORDER_BOXES),
    "levels of different scale": RoiCase(4, 8, random_boxes(60), scales_of_levels=(0.2, 1.0, 3.0, 8.0)),
    "coarse level small": RoiCase(4, 8, random_boxes(60), scales_of_levels=(8.0, 3.0, 1.0, 0.2)),
    "a level that no box is large enough for, of huge scale": RoiCase(
        4, 8, random_boxes(60), scales_of_levels=(1.0, 1.0, 1.0, 60.0), canonical_scale=112
    ),
    "one sample a bin": RoiCase(3, 4, torch.cat([random_boxes(20), BORDER_BOXES]), sampling_ratio=1),
    "three samples a bin, oblong": RoiCase(
        3, 4, torch.cat([random_boxes(20), BORDER_BOXES]), sampling_ratio=3, output_size=(3, 5)
    ),
    "one box": RoiCase(4, 4, random_boxes(60)[:1]),
    "many boxes in several products": RoiCase(4, 64, random_boxes(300)),
}
ADAPTIVE = RoiCase(4, 4, torch.cat([random_boxes(20), BORDER_BOXES]), sampling_ratio=-1)


def random_nms(groups: int, number: int, *, valid: float, size: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes, (G, N, 4), scores, which are all different, and which of them are valid."""
    random = torch.Generator().manual_seed(groups * number)
    corner = torch.rand(groups, number, 2, generator=random) * 200
    extent = torch.rand(groups, number, 2, generator=random) * size + 1
    scores = (torch.randperm(groups * number, generator=random).reshape(groups, number) + 1) / (
        groups * number
    )
    return (
        torch.cat([corner, corner + extent], 2),
        scores,
        torch.rand(groups, number, generator=random) < valid,
    )


NMS_CASES = {
    "crowded": random_nms(4, 300, valid=1.0, size=120),
    "sparse": random_nms(3, 100, valid=0.7, size=20),
    "one group": random_nms(1, 50, valid=0.9, size=80),
    "many groups of few": random_nms(90, 5, valid=0.5, size=100),
    "beyond a thousand": random_nms(5, 400, valid=0.9, size=100),  # torchvision takes another way there
    "none valid": random_nms(3, 20, valid=0.0, size=50),
}


IMAGE_CASES: dict[str, tuple[tuple[int, int], tuple[int, int], tuple[int, int]]] = {
    "unresized": ((96, 128), (96, 128), (96, 128)),
    "padded": ((90, 120), (90, 120), (96, 128)),
    "halved": ((96, 128), (48, 64), (64, 64)),
    "quartered": ((96, 128), (24, 32), (32, 32)),
    "by three": ((96, 129), (32, 43), (32, 64)),
    "halved along one axis": ((96, 128), (48, 128), (64, 128)),
    "doubled": ((32, 48), (64, 96), (64, 96)),
    "odd ratios": ((77, 101), (48, 63), (64, 64)),
    "upscaled": ((33, 47), (64, 91), (64, 96)),
    "large": ((480, 640), (800, 1066), (800, 1088)),
    "wide": ((270, 1920), (187, 1333), (192, 1344)),
}
