"""The converters of a detector's own operators against torchvision, in networks that TensorRT has built."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from converted import Call
from operator_cases import (
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
from torch import Tensor

from qexport.detectors import operators
from qexport.errors import UnsupportedOperator
from qexport.plugins.torch2trt import best_scores, nms, normalised_image, roi_align

CELLS = torch.tensor([30.0, 20, 40, 10])
ANYWHERE = torch.cat(
    [
        BORDER_BOXES,
        BORDER_BOXES + CELLS,
        BORDER_BOXES - 100,
        BORDER_BOXES - 8,  # a cell before the first
        random_boxes(30) * 2 - 100,
        torch.tensor([[50.0, 60, 40, 70], [50, 60, 50, 60]]),  # from right to left, and a point
    ]
)


@pytest.mark.parametrize("case", ROI_CASES.values(), ids=ROI_CASES.keys())
def test_roi_align_of_a_pyramid_equals_torchvision(case: RoiCase) -> None:
    call = Call(
        operators.multiscale_roi_align,
        case.features(),
        case.boxes.clone(),
        case.scales,
        list(case.output_size),
        case.sampling_ratio,
        case.canonical_scale,
        4,
    )
    np.testing.assert_allclose(*call.converted(roi_align.convert), call.method_return, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("images", [1, 3])
def test_roi_align_of_boxes_anywhere_equals_torchvision(images: int, aligned: bool) -> None:
    random = torch.Generator().manual_seed(images)
    image = torch.arange(len(ANYWHERE)).reshape(-1, 1) % images
    table = torch.cat([image.to(torch.float32), ANYWHERE], 1)
    batch = torch.randn(images, 5, 20, 28, generator=random)
    call = Call(torchvision.ops.roi_align, batch, table, (7, 5), 0.125, 2, aligned)
    np.testing.assert_allclose(*call.converted(roi_align.convert), call.method_return, atol=1e-4, rtol=1e-4)


def test_roi_align_of_one_list_of_boxes_an_image_equals_torchvision() -> None:
    batch = torch.randn(3, 4, 20, 28, generator=torch.Generator().manual_seed(0))
    boxes = [random_boxes(7), BORDER_BOXES.clone(), random_boxes(1)]
    call = Call(torchvision.ops.roi_align, batch, boxes, 3, spatial_scale=0.125, sampling_ratio=3)
    np.testing.assert_allclose(*call.converted(roi_align.convert), call.method_return, atol=1e-4, rtol=1e-4)


def test_roi_align_of_adaptive_samples_is_refused() -> None:
    call = Call(torchvision.ops.roi_align, torch.zeros(1, 1, 9, 9), [random_boxes(2)], 3)
    with pytest.raises(
        UnsupportedOperator, match="sampling_ratio -1 takes as many samples as a box is large"
    ):
        roi_align.convert(call)


def test_roi_align_of_half_precision_is_refused() -> None:
    boxes = [random_boxes(2)]
    call = Call(torchvision.ops.roi_align, torch.zeros(1, 1, 9, 9), boxes, 3, sampling_ratio=2)
    call.method_args = (torch.zeros(1, 1, 9, 9, dtype=torch.float16), boxes, 3)
    with pytest.raises(UnsupportedOperator, match=r"RoIAlign of torch\.float16"):
        roi_align.convert(call)


@pytest.mark.parametrize("given", NMS_CASES.values(), ids=NMS_CASES.keys())
@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_nms_keeps_the_boxes_that_torchvision_keeps(
    given: tuple[Tensor, Tensor, Tensor], threshold: float
) -> None:
    call = Call(operators.batched_nms_mask, *(tensor.clone() for tensor in given), threshold)
    np.testing.assert_array_equal(*call.converted(nms.convert), call.method_return)


def test_nms_of_equal_boxes_and_scores_keeps_the_first() -> None:
    boxes = torch.tensor([10.0, 10.0, 30.0, 30.0]).repeat(2, 6, 1)
    call = Call(operators.batched_nms_mask, boxes, torch.zeros(2, 6), torch.ones(2, 6, dtype=torch.bool), 0.5)
    (kept,) = call.converted(nms.convert)
    assert kept.tolist() == [[True, *[False] * 5]] * 2


def test_nms_of_torchvision_is_refused_and_names_the_form_of_fixed_shape() -> None:
    boxes, scores, _ = random_nms(1, 9, valid=1.0, size=50)
    call = Call(torchvision.ops.nms, boxes[0].clone(), scores[0].clone(), 0.5)
    with pytest.raises(UnsupportedOperator, match="batched_nms_mask"):
        nms.convert(call)


@pytest.mark.parametrize(("number", "count"), [(5000, 1000), (100, 100), (7, 1)])
def test_best_scores_equal_those_of_the_detector(number: int, count: int) -> None:
    scores = torch.randperm(number, generator=torch.Generator().manual_seed(number)) / number
    call = Call(operators.best_scores, scores, count)
    best, index = call.converted(best_scores.convert)
    np.testing.assert_array_equal(best, call.method_return[0])
    np.testing.assert_array_equal(index, call.method_return[1])


def test_best_scores_of_more_than_tensorrt_gives_are_refused() -> None:
    call = Call(operators.best_scores, torch.zeros(5000), 3841)
    with pytest.raises(UnsupportedOperator, match="at most 3840 entries; 3841 are asked for"):
        best_scores.convert(call)


@pytest.mark.parametrize("name", IMAGE_CASES)
def test_normalised_image_of_noise_equals_torchvisions_transform(name: str) -> None:
    size, resized, padded = IMAGE_CASES[name]
    frame = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    call = Call(operators.normalised_image, frame, list(MEAN), list(STD), list(resized), list(padded))
    np.testing.assert_allclose(*call.converted(normalised_image.convert), call.method_return, atol=2e-6)
