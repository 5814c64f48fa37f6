"""The detector's own operators, traced from PyTorch's and torchvision's, against what they stand for: bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from operator_cases import ADAPTIVE, IMAGE_CASES, MEAN, NMS_CASES, ROI_CASES, STD, RoiCase, random_nms
from torch import Tensor, nn

from qexport.detectors import operators as whole
from qexport.errors import UnsupportedOperator
from qexport.plugins.qnnpack import operators
from qexport.plugins.qnnpack.file import trace
from qexport.runtimes.qnnpack_library import quiet

Suppression = tuple[Tensor, Tensor, Tensor]


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


def traced(function: Callable[..., Any], *example: Tensor) -> Any:
    """Trace a function with an example that is not what it will be run on."""
    with quiet():
        return trace(Call(function), example, "test")


def same(first: Any, second: Any) -> bool:
    pairs = zip(first, second, strict=True) if isinstance(first, tuple) else [(first, second)]
    return all(torch.equal(*pair) and pair[0].dtype == pair[1].dtype for pair in pairs)


def kinds(module: Any) -> set[str]:
    return {str(node.kind()).partition("::")[0] for node in module.inlined_graph.nodes()}


@pytest.mark.parametrize("name", [*ROI_CASES, "adaptive"])
def test_roi_align_of_other_boxes_than_traced_equals_torchvisions(name: str) -> None:
    wanted: RoiCase = ADAPTIVE if name == "adaptive" else ROI_CASES[name]
    features, boxes = wanted.features(), wanted.boxes
    facts = (len(boxes), wanted.channels, *whole.level_range(wanted.scales))
    rest = (wanted.scales, list(wanted.output_size), wanted.sampling_ratio, wanted.canonical_scale, 4)

    def pool(rois: Tensor, *maps: Tensor) -> Tensor:
        return operators.multiscale_roi_align(facts, list(maps), rois, *rest)

    module = traced(pool, torch.zeros_like(boxes), *(torch.zeros_like(each) for each in features))
    assert same(module(boxes, *features), wanted.torchvision(features))
    assert kinds(module) <= {"aten", "prim", "torchvision"}


def tied(groups: int, number: int, values: int) -> Suppression:
    rows, scores, valid = random_nms(groups, number, valid=0.9, size=80)
    return rows, torch.round(scores * values) / values, valid


SAME_BOX = torch.tensor([[[5.0, 5, 5, 9], [5, 5, 5, 9], [0, 0, 10, 10], [0, 0, 10, 10], [20, 0, 30, 10]]])
SUPPRESSION: dict[str, Suppression] = {
    **NMS_CASES,
    "few different scores": tied(4, 100, 6),
    "few different scores beyond a thousand": tied(5, 400, 20),
    "scores of int8 maps": tied(3, 300, 127),
    "just a thousand": random_nms(2, 500, valid=1.0, size=60),
    "one more than a thousand": random_nms(7, 143, valid=1.0, size=60),
    "equal boxes of equal scores": (SAME_BOX, torch.full((1, 5), 0.5), torch.ones(1, 5, dtype=torch.bool)),
    "best box not valid": (
        SAME_BOX,
        torch.tensor([[0.1, 0.2, 0.9, 0.4, 0.5]]),
        torch.tensor([[True, True, False, True, True]]),
    ),
}


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("name", SUPPRESSION)
def test_suppression_of_other_boxes_than_traced_keeps_what_torchvision_keeps(
    name: str, threshold: float
) -> None:
    boxes, scores, valid = SUPPRESSION[name]
    groups = (len(boxes),)

    def suppress(*given: Tensor) -> Tensor:
        return operators.batched_nms_mask(groups, *given, threshold)

    module = traced(suppress, torch.zeros_like(boxes), torch.zeros_like(scores), torch.zeros_like(valid))
    wanted = whole.batched_nms_mask(boxes, scores, valid, threshold)
    assert same(module(boxes, scores, valid), wanted)
    assert kinds(module) <= {"aten", "prim", "torchvision"}


@pytest.mark.parametrize("count", [1, 30, 60])
@pytest.mark.parametrize("values", [3, 60])
def test_best_scores_are_in_the_stable_order(count: int, values: int) -> None:
    scores = torch.randperm(60, generator=torch.Generator().manual_seed(0)).remainder(values) / values
    module = traced(lambda given: operators.best_scores((60,), given, count), torch.zeros(60))
    assert same(module(scores), tuple(whole.best_scores(scores, count)))


@pytest.mark.parametrize("name", IMAGE_CASES)
def test_image_of_noise_equals_the_operators(name: str) -> None:
    frame_px, resized, padded = IMAGE_CASES[name]
    frame = torch.randint(
        0, 256, (*frame_px, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    options = (list(MEAN), list(STD), list(resized), list(padded))
    module = traced(
        lambda given: operators.normalised_image(frame_px, given, *options), torch.zeros_like(frame)
    )
    assert same(module(frame), whole.normalised_image(frame, *options))


def test_trace_of_what_depends_on_values_is_refused_by_name() -> None:
    def decide(given: Tensor) -> Tensor:
        return given if given.sum() > 0 else -given

    with (
        pytest.raises(UnsupportedOperator, match=r"backbone\.odd: what it computes depends on values"),
        quiet(),
    ):
        trace(Call(decide), (torch.ones(3),), "backbone.odd")
