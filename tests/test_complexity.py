"""MACs, parameters and sparsity against hand counts; peak memory against a process of known size."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qexport.benchmarks.complexity import (
    average_sparsity,
    count_complexity,
    count_macs,
    count_parameters,
    peak_memory,
    quantized_sparsity,
)
from qexport.errors import QexportError

MIB = 1 << 20


class Head(nn.Module):
    """A convolution that is called once per level, as the RPN head is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        return [self.conv(level) for level in levels]


class Tiny(nn.Module):
    """uint8 frame (8, 8, 3) -> trunk -> head on two levels -> linear, with one product of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential()
        self.backbone.add_module("conv1", nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False))
        self.backbone.add_module("bn1", nn.BatchNorm2d(4))
        self.head = Head()
        self.score = nn.Linear(4, 5)

    def forward(self, frame: Tensor) -> Tensor:
        feature = self.backbone(frame.permute(2, 0, 1)[None].float() / 255)
        levels = self.head([feature, nn.functional.max_pool2d(feature, 2)])
        scores: Tensor = self.score(levels[0].flatten(2).transpose(1, 2)[0])
        return scores.T @ scores


CONV1 = 4 * 4 * 4 * 3 * 9  # 4 x 4 positions, 4 output channels, 3 input channels, 3 x 3
HEAD = (4 * 4 + 2 * 2) * 4 * 4 * 9  # both levels
SCORE = 16 * 4 * 5  # 16 positions
PRODUCT = 5 * 16 * 5


@pytest.fixture
def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny().eval()


@pytest.fixture
def frame() -> Tensor:
    return torch.full((8, 8, 3), 100, dtype=torch.uint8)


def test_count_macs_of_conv_and_linear_equals_hand_count(tiny: Tiny, frame: Tensor) -> None:
    total, by_path = count_macs(tiny, (frame,))
    assert by_path == {"backbone.conv1": CONV1, "head.conv.0": HEAD, "score": SCORE, "": PRODUCT}
    assert total == CONV1 + HEAD + SCORE + PRODUCT


def test_count_macs_of_grouped_convolution_counts_its_own_channels() -> None:
    total, by_path = count_macs(nn.Conv2d(4, 4, 3, groups=4), (torch.zeros(1, 4, 5, 5),))
    assert total == 3 * 3 * 4 * 9
    assert by_path == {"": total}


def test_count_macs_of_module_without_products_is_zero() -> None:
    assert count_macs(nn.ReLU(), (torch.zeros(1, 3),)) == (0, {})


def test_count_parameters_shared_by_two_layers_counts_once(tiny: Tiny) -> None:
    own = 4 * 3 * 9 + 2 * 4 + (4 * 4 * 9 + 4) + (4 * 5 + 5)
    assert count_parameters(tiny) == own
    tiny.again = tiny.score
    assert count_parameters(tiny) == own


def test_average_sparsity_counts_weights_and_no_biases(tiny: Tiny) -> None:
    assert average_sparsity(tiny) == 0.0
    with torch.no_grad():
        tiny.score.weight[:2] = 0.0
        tiny.score.bias.zero_()
    assert average_sparsity(tiny) == 8 / (4 * 3 * 9 + 4 * 4 * 9 + 20)


def test_quantized_sparsity_weighs_all_codes_alike() -> None:
    codes = [np.array([[0, 1], [2, 0]], np.int8), np.array([0, -127, 3, 4, 5, 6], np.int8)]
    assert quantized_sparsity(codes) == 3 / 10
    assert quantized_sparsity([]) == 0.0


def test_count_complexity_gathers_every_count(tiny: Tiny, frame: Tensor) -> None:
    codes = [np.array([0, 1, 2, 3], np.int8)]
    found = count_complexity(tiny, (frame,), weight_codes=codes, float_bytes=400, artifact_bytes=100)
    assert found.macs == CONV1 + HEAD + SCORE + PRODUCT
    assert found.parameters == count_parameters(tiny)
    assert (found.average_sparsity, found.average_sparsity_quantized) == (0.0, 0.25)
    assert (found.float_bytes, found.artifact_bytes) == (400, 100)


def test_peak_memory_of_process_with_200_mib_is_about_that() -> None:
    # This process, with torch loaded, is larger than the bare child: its own size must not show.
    bare = peak_memory([sys.executable, "-I", "-S", "-c", "pass"])
    filled = peak_memory([sys.executable, "-I", "-S", "-c", "x = b'1' * (200 << 20)"])
    assert bare < 60 * MIB
    assert 200 * MIB <= filled - bare + 8 * MIB <= 220 * MIB


def test_peak_memory_of_second_process_forgets_the_first() -> None:
    large = peak_memory([sys.executable, "-I", "-S", "-c", "x = b'1' * (100 << 20)"])
    small = peak_memory([sys.executable, "-I", "-S", "-c", "pass"])
    assert small < large - 80 * MIB


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ([sys.executable, "-c", "raise SystemExit('no such artifact')"], "exit code 1.*no such artifact"),
        ([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], "exit code 137"),
        (["no-such-program-of-ours"], "no-such-program-of-ours: No such file"),
    ],
)
def test_peak_memory_of_failing_command_raises_what_it_wrote(command: list[str], said: str) -> None:
    with pytest.raises(QexportError, match=f"(?s){said}"):
        peak_memory(command)
