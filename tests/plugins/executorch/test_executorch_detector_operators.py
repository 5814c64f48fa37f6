"""RoIAlign, suppression, ranking and the image against torchvision's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from executorch_graphs import Case, Cases, Run, case, graph_of, run_cases, run_torch, write
from operator_cases import (
    ADAPTIVE,
    BORDER_BOXES,
    IMAGE_CASES,
    MEAN,
    NMS_CASES,
    ROI_CASES,
    STD,
    RoiCase,
    random_boxes,
    random_nms,
)
from torch import Tensor, nn

from qexport.detectors import operators
from qexport.errors import UnsupportedOperator
from qexport.plugins.executorch import ranking
from qexport.plugins.executorch.ranking import FURTHER_TURNS, TURNS
from qexport.quantization.graph import export_graph

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


def assert_equal(module: Operator, *, within: float = 0.0) -> None:
    """Compare every output of an operator with torch's."""
    static: Any = module
    wanted = run_torch(module, module.given)
    for found, expected in zip(write(export_graph(static)).run(module.given.numpy()), wanted, strict=True):
        assert found.shape == expected.shape
        if within:
            assert float(np.abs(found - expected).max()) <= within
        else:
            np.testing.assert_array_equal(found, expected)


def roi_case(wanted: RoiCase) -> Case:
    height, width = wanted.image_px
    shapes = [(1, wanted.channels, int(height * scale), int(width * scale)) for scale in wanted.scales]
    scales = [scale / 32 for scale in wanted.scales_of_levels[: wanted.levels]]
    return case(Pool(wanted), *shapes, scales=scales)


IMAGE_WITHIN = 1e-3
"""XNNPACK rounds the positions of its bilinear resize in a way of its own."""
LARGE = ("many boxes in several products", "coarse level small", "three levels, odd channels", "two levels")
"""Left out: a program of many segments takes its time, and what they show others show."""
ROI = {
    **{name: wanted for name, wanted in ROI_CASES.items() if name not in LARGE},
    "boxes of the coarsest level alone": RoiCase(4, 5, BORDER_BOXES[:1], canonical_scale=14),
    "boxes of the finest level alone": RoiCase(4, 5, random_boxes(9), canonical_scale=5000),
    "one sample a bin, border boxes, one level": RoiCase(1, 3, BORDER_BOXES, sampling_ratio=1),
    "three samples a bin, border boxes": RoiCase(4, 3, BORDER_BOXES, sampling_ratio=3),
    "more than one turn, the last one short": RoiCase(2, 256, random_boxes(13)),
}
ROI_TABLE = {name: roi_case(wanted) for name, wanted in ROI.items()}


@pytest.fixture(scope="module")
def int8() -> Run:
    return run_cases(ROI_TABLE)


@pytest.mark.parametrize("name", ROI)
def test_roi_align_of_int8_maps_differs_from_torchvisions_by_one_step_at_most(name: str, int8: Run) -> None:
    wanted, step = int8.wanted[name], int8.steps[name]
    assert np.abs(wanted).max() > 60 * step
    steps = np.abs(int8.found[name] - wanted) / step
    assert steps.max() < 1.01
    assert (steps > 0.5).mean() < 0.05


@pytest.mark.parametrize("name", ROI)
def test_roi_align_of_int8_maps_gathers_rows_and_averages_in_xnnpack(name: str, int8: Run) -> None:
    path = int8.paths[name]
    assert ("aten::index_select.out") in {
        operator for site, operator in int8.program.kernels() if site == path
    }
    kinds = {kind for site, kind, _ in int8.program.nodes() if site == path}
    assert {"convert", "multiply", "mean"} <= kinds


@pytest.fixture(scope="module")
def float32() -> dict[str, tuple[Any, Any]]:
    module = Cases(list(ROI_TABLE.values()))
    given = module.example_input()
    found = write(graph_of(module)).run(given.numpy())
    return dict(zip(ROI, zip(run_torch(module, given), found, strict=True), strict=True))


@pytest.mark.parametrize("name", ROI)
def test_roi_align_of_float_maps_equals_torchvisions(name: str, float32: dict[str, tuple[Any, Any]]) -> None:
    wanted, found = float32[name]
    assert np.abs(found - wanted).max() <= 1e-4 * max(1.0, np.abs(wanted).max())


def test_roi_align_of_adaptive_samples_is_refused() -> None:
    with pytest.raises(UnsupportedOperator, match=r"backbone.0 with sampling_ratio -1 .*sampling_ratio=2"):
        write(graph_of(Cases([roi_case(ADAPTIVE)])))


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
SUPPRESSION: dict[str, Suppression] = {
    **{name: (*NMS_CASES[name], 0.3) for name in ("crowded", "one group", "none valid")},
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
    "chain": chain(TURNS - 2),
}


@pytest.mark.parametrize("name", SUPPRESSION)
def test_suppression_keeps_the_boxes_that_torchvision_keeps(name: str) -> None:
    assert_equal(Suppress(*SUPPRESSION[name]))


@pytest.mark.parametrize("loops", range(1, len(FURTHER_TURNS) + 2))
def test_suppression_in_a_longer_chain_than_turns_are_written_out_is_exact(loops: int) -> None:
    assert_equal(Suppress(*chain(TURNS + sum(FURTHER_TURNS[: loops - 1]) + 4)))


def test_suppression_of_more_than_one_matrix_at_a_time_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "MATRIX_VALUES", 2 * 64**2)
    monkeypatch.setattr(ranking, "PIECE_VALUES", 64 * 10)
    rows, scores, valid = random_nms(5, 64, valid=0.9, size=120)
    assert_equal(Suppress(rows, scores, valid, 0.4))


BEST = {
    "all different": (torch.rand(50, generator=torch.Generator().manual_seed(0)), 20),
    "all of them": (torch.rand(50, generator=torch.Generator().manual_seed(0)), 50),
    "all equal": (torch.zeros(40), 13),
    "few different": (torch.arange(60).remainder(3) / 4, 30),
    "what suppression left": (torch.where(torch.arange(60).remainder(4) > 0, torch.tensor(-1.0), 0.5), 30),
    "one": (torch.tensor([0.25]), 1),
}


@pytest.mark.parametrize("name", BEST)
def test_best_scores_are_torchs_stable_order(name: str) -> None:
    assert_equal(Best(*BEST[name]))


@pytest.mark.parametrize("name", IMAGE_CASES)
def test_image_of_noise_equals_torchvisions_transform(name: str) -> None:
    frame_px, resized, padded = IMAGE_CASES[name]
    random = torch.Generator().manual_seed(1)
    frame = torch.randint(0, 256, (*frame_px, 3), dtype=torch.uint8, generator=random)
    assert_equal(Image(frame, resized, padded), within=IMAGE_WITHIN)
