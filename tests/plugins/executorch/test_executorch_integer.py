"""Operators of int8 codes against the quantized graph's own arithmetic: at most one step, in XNNPACK."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name
from executorch_graphs import Run, run_cases
from graph_cases import Case, case
from torch import nn

FINE, COARSE = 257 / 2**14, 773 / 2**14


def conv(size: tuple[int, int], channels: tuple[int, int], window: Any, **settings: Any) -> Case:
    """Return a convolution of a (1, C, H, W) map."""
    return case(nn.Conv2d(*channels, window, **settings), (1, channels[0], *size))


class Flat(nn.Module):
    """A map, flattened for a linear layer."""

    def __init__(self, size: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, size[0], 1)
        self.linear = nn.Linear(size[0] * size[1] * size[2], 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat: torch.Tensor = self.linear(torch.flatten(self.conv(x), 1))
        return flat


def moved(function: Callable[..., Any], *shapes: tuple[int, ...], **named: Any) -> Case:
    """Return an operator that keeps its input's scale, behind sums that have one."""

    def call(*tensors: torch.Tensor) -> Any:
        return function(*(each + each for each in tensors))

    return case(call, *shapes, **named)


CONVOLUTIONS = {
    "1x1": conv((5, 7), (3, 8), 1),
    "3x3 same": conv((9, 11), (5, 7), 3, padding=1),
    "3x3 same, no bias": conv((9, 11), (5, 7), 3, padding=1, bias=False),
    "3x3 valid": conv((9, 11), (5, 7), 3),
    "stride 2, odd size: padding as SAME": conv((9, 11), (5, 7), 3, stride=2, padding=1),
    "stride 2, even size: padding on both sides": conv((8, 12), (5, 7), 3, stride=2, padding=1),
    "stride 2, one size odd": conv((9, 12), (5, 7), 3, stride=2, padding=1),
    "7x7 stride 2": conv((20, 22), (3, 6), 7, stride=2, padding=3),
    "5x5 stride 3": conv((20, 23), (3, 6), 5, stride=3, padding=2),
    "2x2 stride 2": conv((8, 10), (4, 4), 2, stride=2),
    "4x4 padding 1": conv((8, 10), (4, 4), 4, padding=1),
    "more padding than a window needs": conv((6, 7), (3, 4), 3, padding=2),
    "padding of one axis": conv((9, 11), (5, 7), (3, 1), padding=(1, 0)),
    "oblong window and strides": conv((9, 11), (5, 7), (1, 5), stride=(2, 1), padding=(0, 2)),
    "dilation 2 same": conv((9, 11), (5, 7), 3, padding=2, dilation=2),
    "dilation 2 valid": conv((9, 11), (5, 7), 3, dilation=2),
    "dilation 2, less padding than its reach": conv((9, 11), (5, 7), 3, padding=1, dilation=2),
    "two groups": conv((9, 11), (6, 8), 3, padding=1, groups=2),
    "dilation and stride": conv((13, 15), (4, 4), 3, padding=2, dilation=2, stride=2),
    "stride larger than the window": conv((9, 11), (4, 4), 1, stride=2),
    "one pixel": conv((1, 1), (6, 5), 3, padding=1),
    "depthwise": conv((9, 11), (6, 6), 3, padding=1, groups=6),
    "depthwise stride 2": conv((8, 12), (6, 6), 5, padding=2, stride=2, groups=6),
    "depthwise with multiplier 3": conv((9, 11), (4, 12), 3, padding=1, groups=4),
    "depthwise dilated": conv((9, 11), (6, 6), 3, padding=2, dilation=2, groups=6),
    "depthwise with multiplier, stride 2": conv((9, 11), (4, 8), 3, padding=1, stride=2, groups=4),
    "two images": case(nn.Conv2d(3, 4, 3, padding=1), (2, 3, 6, 7)),
    "then relu": case(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), (1, 3, 9, 9)),
    "then relu6": case(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6()), (1, 3, 9, 9), scales=[0.25]),
}
LINEARS = {
    "rows": case(nn.Linear(12, 5), (4, 12)),
    "without bias": case(nn.Linear(12, 5, bias=False), (4, 12)),
    "then relu": case(nn.Sequential(nn.Linear(12, 5), nn.ReLU()), (4, 12)),
    "of a flat map": case(Flat((4, 3, 5)), (2, 3, 3, 5)),
    "of a flat map of one pixel": case(Flat((4, 1, 1)), (2, 3, 1, 1)),
    "two in a row": case(nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3)), (4, 12)),
}
MAP, OTHER = (1, 6, 5, 7), (1, 6, 1, 1)
ELEMENTS = {
    "add": case(torch.add, MAP, MAP, scales=[FINE, COARSE]),
    "add of equal scales": case(torch.add, MAP, MAP),
    "add of a tensor to itself": case(lambda x: x + x, MAP),
    "add then relu": case(lambda x, y: F.relu(x + y), MAP, MAP, scales=[COARSE, FINE]),
    "add of one value a channel": case(torch.add, MAP, OTHER, scales=[FINE, COARSE]),
    "one value a channel plus a map": case(torch.add, OTHER, MAP, scales=[FINE, COARSE]),
    "add of rows": case(torch.add, (4, 9), (4, 9), scales=[FINE, COARSE]),
    "mul": case(torch.mul, MAP, MAP, scales=[FINE, COARSE]),
    "mul by one value a channel": case(torch.mul, MAP, OTHER, scales=[FINE, COARSE]),
    "one value a channel times a map": case(torch.mul, OTHER, MAP, scales=[FINE, COARSE]),
    "mul by one map for all channels": case(torch.mul, MAP, (1, 1, 5, 7)),
}
POOLS = {
    "mean of maps": case(lambda x: x.mean((2, 3)), MAP),
    "mean of maps, axes kept": case(lambda x: x.mean((2, 3), keepdim=True), MAP),
    "mean of maps, axes counted from the end": case(lambda x: x.mean((-1, -2)), MAP),
    "adaptive average to one": case(nn.AdaptiveAvgPool2d(1), MAP),
    "squeeze and excite": case(lambda x, y: y * F.relu(x + x.mean((2, 3), keepdim=True)), MAP, MAP),
}
MOVES = {
    "max pool": moved(nn.MaxPool2d(2), (1, 6, 8, 10)),
    "max pool with padding": moved(nn.MaxPool2d(3, 2, 1), (1, 6, 9, 12)),
    "max pool, oblong": moved(nn.MaxPool2d((3, 2), (2, 1), (1, 0)), (1, 6, 9, 12)),
    "max pool of negative values": moved(lambda x: F.max_pool2d(x, 3, 2, 1), (1, 6, 9, 12), scales=[-1 / 32]),
    "upsample by two": moved(nn.Upsample(scale_factor=2), MAP),
    "upsample to odd sizes": moved(nn.Upsample(size=(9, 20)), MAP),
    "upsample to fewer": moved(nn.Upsample(size=(3, 4)), MAP),
    "cat of maps": moved(lambda x, y: torch.cat([x, y], 1), MAP, (1, 3, 5, 7), scales=[FINE, COARSE]),
    "cat of maps along height": moved(lambda x, y: torch.cat([x, y], 2), MAP, MAP, scales=[FINE, COARSE]),
    "cat of rows": moved(lambda x, y: torch.cat([x, y]), (4, 9), (2, 9), scales=[FINE, COARSE]),
    "every second cell": moved(lambda x: x[:, :, ::2, ::2], MAP),
    "a part of each axis": moved(lambda x: x[:, 1:4, 2:, :-2], MAP),
    "relu that the sum takes with it": moved(F.relu, MAP),
    "relu of a pool": moved(lambda x: F.relu(F.max_pool2d(x, 2)), MAP),
    "channels last": moved(lambda x: x.permute(0, 2, 3, 1), MAP),
    "channels last, then in rows": moved(lambda x: x.permute(0, 2, 3, 1).view(-1, 6), MAP),
    "channels and rows change places": moved(lambda x: x.permute(0, 2, 1, 3), MAP),
}
CASES: dict[str, Case] = {
    f"{kind}: {name}": made
    for kind, table in {
        "conv": CONVOLUTIONS,
        "linear": LINEARS,
        "elements": ELEMENTS,
        "pool": POOLS,
        "move": MOVES,
    }.items()
    for name, made in table.items()
}


MOVING = ("convert", "reshape", "slice", "transpose")


@pytest.fixture(scope="module")
def run() -> Run:
    return run_cases(CASES)


@pytest.mark.parametrize("name", CASES)
def test_integer_operator_differs_from_the_reference_by_one_step_at_most(name: str, run: Run) -> None:
    wanted, step = run.wanted[name], run.steps[name]
    assert np.abs(wanted).max() > 60 * step
    found = run.found[name]
    assert found.shape == wanted.shape
    steps = np.abs(found - wanted) / step
    assert steps.max() < 1.01
    # Halves are rounded to even by some, up by others: of a sum of equal scales a quarter is such.
    assert (steps > 0.5).mean() < 0.3


@pytest.mark.parametrize("name", CASES)
def test_integer_operator_is_written_as_int8_nodes_of_xnnpack_alone(name: str, run: Run) -> None:
    path = run.paths[name]
    nodes = [(kind, int8) for site, kind, int8 in run.program.nodes() if f"{site}.".startswith(f"{path}.")]
    assert any(int8 for _, int8 in nodes)
    # What the cases are given is cut out of all values and quantized, what they give is turned back in float.
    assert all(int8 for kind, int8 in nodes if kind not in MOVING)
    own = {operator for site, operator in run.program.kernels() if f"{site}.".startswith(f"{path}.")}
    assert own <= {"aten::slice_copy.Tensor_out"}
