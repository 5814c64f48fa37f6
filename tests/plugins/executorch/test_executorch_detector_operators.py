"""RoIAlign, suppression, ranking and the image against torchvision's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from detector_operator_modules import (
    BEST,
    ROI_CORNERS,
    SUPPRESSION_CORNERS,
    Best,
    Image,
    Operator,
    Suppress,
    Suppression,
    chain,
    roi_case,
)
from executorch_graphs import Run, run_cases, write
from graph_cases import Cases, graph_of, run_torch
from operator_cases import (
    ADAPTIVE,
    IMAGE_CASES,
    NMS_CASES,
    ROI_CASES,
    random_nms,
)

from qexport.errors import UnsupportedOperator
from qexport.plugins.executorch import ranking
from qexport.plugins.executorch.ranking import FURTHER_TURNS, TURNS
from qexport.quantization.graph import export_graph


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


IMAGE_WITHIN = 1e-3
"""XNNPACK rounds the positions of its bilinear resize in a way of its own."""
LARGE = ("many boxes in several products", "coarse level small", "three levels, odd channels", "two levels")
"""Left out: a program of many segments takes its time, and what they show others show."""
ROI = {
    **{name: wanted for name, wanted in ROI_CASES.items() if name not in LARGE},
    **ROI_CORNERS,
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


SUPPRESSION: dict[str, Suppression] = {
    **{name: (*NMS_CASES[name], 0.3) for name in ("crowded", "one group", "none valid")},
    **SUPPRESSION_CORNERS,
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


@pytest.mark.parametrize("name", BEST)
def test_best_scores_are_torchs_stable_order(name: str) -> None:
    assert_equal(Best(*BEST[name]))


@pytest.mark.parametrize("name", IMAGE_CASES)
def test_image_of_noise_equals_torchvisions_transform(name: str) -> None:
    frame_px, resized, padded = IMAGE_CASES[name]
    random = torch.Generator().manual_seed(1)
    frame = torch.randint(0, 256, (*frame_px, 3), dtype=torch.uint8, generator=random)
    assert_equal(Image(frame, resized, padded), within=IMAGE_WITHIN)
