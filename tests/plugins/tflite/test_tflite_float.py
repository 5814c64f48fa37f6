"""Operators in float32 against torch, with both kernel sets; and what is refused instead of computed wrongly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name
from ai_edge_litert import schema_py_generated as schema
from float_cases import FLOAT_CASES, MAP, ROWS
from graph_cases import Array, Case, Cases, case, graph_of, run_torch
from tflite_graphs import KERNELS, write
from torch import Tensor, nn

from qexport.errors import UnsupportedOperator
from qexport.plugins.tflite.operators import MOVING, REAL
from qexport.quantization.graph import op_name

DETECTOR_OPERATORS = {"batched_nms_mask", "best_scores", "multiscale_roi_align", "normalised_image"}
"""Tested in test_tflite_detector_operators.py."""


NEVER_EXPORTED = {"contiguous", "dropout", "flatten", "reshape"}
"""Decomposed by torch.export as it is today."""


CASES: dict[str, Case] = FLOAT_CASES | {
    "conv2d of padding same": case(nn.Conv2d(6, 4, 4, padding="same"), MAP),
}


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Array]]:
    """What torch and each kernel set compute, by name."""
    module = Cases(list(CASES.values()))
    given, written = module.example_input(), write(graph_of(module))
    found = {kernels: written.run(given.numpy(), kernels) for kernels in KERNELS}
    found["torch"] = run_torch(module, given)
    return {name: dict(zip(CASES, values, strict=True)) for name, values in found.items()}


@pytest.mark.parametrize("name", CASES)
def test_float_operator_equals_torch(name: str, results: dict[str, dict[str, Array]]) -> None:
    wanted = results["torch"][name]
    assert wanted.std() > 0 or wanted.size == 1
    for kernels in KERNELS:
        assert results[kernels][name].shape == wanted.shape
        np.testing.assert_allclose(results[kernels][name], wanted, rtol=2e-5, atol=2e-5, err_msg=kernels)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("conv2d", "linear"))])
def test_float_operator_with_weights_in_half_equals_torch_within_their_rounding(name: str) -> None:
    module = Cases([CASES[name]])
    given = module.example_input()
    written = write(graph_of(module), half=True)
    types = {int(tensor.type) for tensor in written.model().subgraphs[0].tensors}
    assert schema.TensorType.FLOAT16 in types
    wanted, (found,) = run_torch(module, given)[0], written.run(given.numpy())
    assert 0 < np.abs(found - wanted).max() < 2**-11 * 16 * np.abs(wanted).max()


def test_float_cases_cover_every_operator_that_the_exporter_knows() -> None:
    graph = graph_of(Cases(list(CASES.values())))
    found = {op_name(node) or getattr(node.target, "__name__", "") for node in graph.graph.nodes}
    assert (MOVING.keys() | REAL.keys()) - found == DETECTOR_OPERATORS | NEVER_EXPORTED


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 4, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv(x)
        return result


REFUSED: dict[str, tuple[Case, str]] = {
    "unknown operator": (case(torch.cos, MAP), "aten.cos.default in module backbone.0"),
    "grouped convolution": (case(Grouped(), MAP), "backbone.0.conv has 2 groups"),
    "sum with a factor": (case(lambda x, y: torch.add(x, y, alpha=2), MAP, MAP), "alpha=2"),
    "difference with a factor": (case(lambda x, y: torch.sub(x, y, alpha=3), MAP, MAP), "alpha=3"),
    "division rounded down": (
        case(lambda x: torch.div(x, 2, rounding_mode="floor"), MAP),
        "rounding_mode=floor",
    ),
    "softmax of another axis": (case(lambda x: x.softmax(1), MAP), "softmax in backbone.0: .* last axis"),
    "smallest entries": (case(lambda x: x.topk(2, largest=False)[0], ROWS), "topk in backbone.0"),
    "largest entries of another axis": (case(lambda x: x.topk(2, 0)[0], ROWS), "topk in backbone.0"),
    "max pool of a part of a window": (
        case(nn.MaxPool2d(2, ceil_mode=True), MAP),
        r"max_pool2d.* in module backbone.0 gives float32 \(1, 6, 3, 4\)",
    ),
    "max pool, dilated": (case(nn.MaxPool2d(2, dilation=2), MAP), "max pool backbone.0 is dilated"),
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
    "integers times a fraction": (
        case(lambda x: (x > 0).sum(1) * 0.5, ROWS),
        r"gives float32 \(4,\), what is known of it for TFLite int32",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_operator_without_a_form_is_refused_by_operator_and_module(name: str) -> None:
    made, message = REFUSED[name]
    with pytest.raises(UnsupportedOperator, match=message):
        write(graph_of(Cases([made])))
