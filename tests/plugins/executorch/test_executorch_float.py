"""Operators in float32 against torch, and what is refused instead of computed wrongly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name
from executorch_graphs import write
from float_cases import FLOAT_CASES, MAP
from graph_cases import Array, Case, Cases, case, graph_of, run_torch
from torch import nn

from qexport.errors import UnsupportedOperator
from qexport.plugins.executorch.operators import MOVING, REAL
from qexport.quantization.graph import op_name

DETECTOR_OPERATORS = {"batched_nms_mask", "best_scores", "multiscale_roi_align", "normalised_image"}
"""Tested in test_executorch_detector_operators.py."""


NEVER_EXPORTED = {"contiguous", "dropout", "flatten", "reshape"}
"""Decomposed by torch.export as it is today."""


CASES: dict[str, Case] = FLOAT_CASES | {
    "conv2d of padding same": case(nn.Conv2d(6, 4, 3, padding="same"), MAP),
    "conv2d of two groups": case(nn.Conv2d(6, 4, 3, groups=2), MAP),
    "gelu": case(nn.GELU(), MAP),
    "leaky_relu": case(nn.LeakyReLU(0.2), MAP),
    "tanh": case(nn.Tanh(), MAP),
}


@pytest.fixture(scope="module")
def results() -> dict[str, tuple[Array, Array]]:
    """What torch and ExecuTorch compute, by name."""
    module = Cases(list(CASES.values()))
    given = module.example_input()
    found = write(graph_of(module)).run(given.numpy())
    return dict(zip(CASES, zip(run_torch(module, given), found, strict=True), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_float_operator_equals_torch(name: str, results: dict[str, tuple[Array, Array]]) -> None:
    wanted, found = results[name]
    assert wanted.std() > 0 or wanted.size == 1
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


def test_float_cases_cover_every_operator_that_the_exporter_knows() -> None:
    graph = graph_of(Cases(list(CASES.values())))
    found = {op_name(node) or getattr(node.target, "__name__", "") for node in graph.graph.nodes}
    assert (MOVING.keys() | REAL.keys()) - found == DETECTOR_OPERATORS | NEVER_EXPORTED


REFUSED: dict[str, tuple[Case, str]] = {
    "unknown operator": (case(torch.cos, MAP), "aten.cos.default in module backbone.0"),
    "padding of one side more": (
        case(nn.Sequential(nn.Conv2d(6, 4, 4, padding="same")), MAP),
        "convolution backbone.0.0 pads one side more",
    ),
    "sum with a factor": (case(lambda x, y: torch.add(x, y, alpha=2), MAP, MAP), "alpha=2"),
    "difference with a factor": (case(lambda x, y: torch.sub(x, y, alpha=3), MAP, MAP), "alpha=3"),
    "division rounded down": (
        case(lambda x: torch.div(x, 2, rounding_mode="floor"), MAP),
        "rounding_mode=floor",
    ),
    "max pool of a part of a window": (
        case(nn.MaxPool2d(2, ceil_mode=True), MAP),
        "max pool backbone.0 is dilated or rounds",
    ),
    "max pool, dilated": (case(nn.MaxPool2d(2, dilation=2), MAP), "max pool backbone.0 is dilated or rounds"),
    "average of a part of a window": (
        case(nn.AvgPool2d(2, ceil_mode=True), MAP),
        r"avg_pool2d.* gives float32 \(1, 6, 3, 4\)",
    ),
    "average with padding": (case(nn.AvgPool2d(3, padding=1), MAP), "average pool backbone.0 pads"),
    "average with a divisor": (case(nn.AvgPool2d(2, divisor_override=3), MAP), "backbone.0 divides by 3"),
    "adaptive average of several sizes": (case(nn.AdaptiveAvgPool2d(3), MAP), "SplitAdaptiveAvgPool2d"),
    "padding by reflection": (case(nn.ReflectionPad2d(1), MAP), "backbone.0"),
    "padding that cuts": (case(lambda x: F.pad(x, (-1, 0)), MAP), r"pad of \[-1, 0\] in backbone.0"),
    "limits that are tensors": (
        case(lambda x, y: x.clamp(min=y), MAP, MAP),
        "backbone.0: a limit is a tensor",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_operator_without_a_form_is_refused_by_operator_and_module(name: str) -> None:
    made, message = REFUSED[name]
    with pytest.raises(UnsupportedOperator, match=message):
        write(graph_of(Cases([made])))
