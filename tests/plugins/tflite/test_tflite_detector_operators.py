"""RoIAlign, suppression, ranking and the image against torchvision's own, with both kernel sets."""

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
from graph_cases import Cases, graph_of, run_torch
from operator_cases import (
    ADAPTIVE,
    IMAGE_CASES,
    NMS_CASES,
    ROI_CASES,
)
from tflite_graphs import KERNELS, Run, run_cases, write

from qexport.errors import UnsupportedOperator
from qexport.plugins.tflite.builder import TURNS
from qexport.quantization.graph import export_graph


def assert_equal(module: Operator, *, portable: bool = False, within: float = 0.0) -> None:
    """Compare every output of an operator with torch's, in both kernel sets."""
    static: Any = module
    wanted = run_torch(module, module.given)
    written = write(export_graph(static), portable_nms=portable)
    for kernels in KERNELS:
        for found, expected in zip(written.run(module.given.numpy(), kernels), wanted, strict=True):
            assert found.shape == expected.shape
            if within:
                assert float(np.abs(found - expected).max()) <= within, kernels
            else:
                np.testing.assert_array_equal(found, expected, err_msg=kernels)


ROI = {**ROI_CASES, **ROI_CORNERS}
ROI_TABLE = {name: roi_case(wanted) for name, wanted in ROI.items()}


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_cases(ROI_TABLE, tmp_path_factory.mktemp("roi-align"))


@pytest.mark.parametrize("name", ROI)
def test_roi_align_of_int8_maps_differs_from_torchvisions_by_one_step_at_most(name: str, int8: Run) -> None:
    wanted, step = int8.wanted[name], int8.steps[name]
    assert np.abs(wanted).max() > 60 * step
    for kernels in KERNELS:
        steps = np.abs(int8.found[kernels][name] - wanted) / step
        assert steps.max() < 1.01, kernels
        assert (steps > 0.5).mean() < 0.05, kernels


@pytest.mark.parametrize("name", ROI)
def test_roi_align_of_int8_maps_gathers_int8_and_sums_in_float(name: str, int8: Run) -> None:
    codes = {one.code for one in int8.model.operators if one.place == int8.paths[name]}
    gathers = [
        one
        for one in int8.model.operators
        if one.place == int8.paths[name] and one.code == "GATHER" and int8.model.is_int8(one.inputs[0])
    ]
    assert gathers
    assert {"DEQUANTIZE", "MUL", "SUM", "QUANTIZE"} <= codes


@pytest.fixture(scope="module")
def float32() -> dict[str, dict[str, Any]]:
    module = Cases(list(ROI_TABLE.values()))
    given, written = module.example_input(), write(graph_of(module))
    found = {kernels: written.run(given.numpy(), kernels) for kernels in KERNELS}
    found["torch"] = run_torch(module, given)
    return {name: dict(zip(ROI, values, strict=True)) for name, values in found.items()}


@pytest.mark.parametrize("name", ROI)
def test_roi_align_of_float_maps_equals_torchvisions(name: str, float32: dict[str, dict[str, Any]]) -> None:
    wanted = float32["torch"][name]
    for kernels in KERNELS:
        difference = np.abs(float32[kernels][name] - wanted).max()
        assert difference <= 1e-4 * max(1.0, np.abs(wanted).max()), kernels


def test_roi_align_of_adaptive_samples_is_refused() -> None:
    with pytest.raises(UnsupportedOperator, match=r"backbone.0 with sampling_ratio -1 .*sampling_ratio=2"):
        write(graph_of(Cases([roi_case(ADAPTIVE)])))


SUPPRESSION: dict[str, Suppression] = {
    **{f"{name}, {at}": (*NMS_CASES[name], at) for name in NMS_CASES for at in (0.3, 0.7)},
    **SUPPRESSION_CORNERS,
    "chain": chain(TURNS - 2),
}


@pytest.mark.parametrize("portable", [False, True], ids=["own", "portable"])
@pytest.mark.parametrize("name", SUPPRESSION)
def test_suppression_keeps_the_boxes_that_torchvision_keeps(name: str, portable: bool) -> None:
    assert_equal(Suppress(*SUPPRESSION[name]), portable=portable)


def test_suppression_in_a_longer_chain_than_portable_turns_is_exact_in_the_own_form_alone() -> None:
    module = Suppress(*chain(3 * TURNS))
    assert_equal(module)
    with pytest.raises(AssertionError, match="Mismatched elements"):
        assert_equal(module, portable=True)


@pytest.mark.parametrize("name", BEST)
def test_best_scores_are_torchs_stable_order(name: str) -> None:
    assert_equal(Best(*BEST[name]))


@pytest.mark.parametrize("name", IMAGE_CASES)
def test_image_of_noise_equals_torchvisions_transform(name: str) -> None:
    frame_px, resized, padded = IMAGE_CASES[name]
    random = torch.Generator().manual_seed(1)
    frame = torch.randint(0, 256, (*frame_px, 3), dtype=torch.uint8, generator=random)
    assert_equal(Image(frame, resized, padded), within=2e-6)
