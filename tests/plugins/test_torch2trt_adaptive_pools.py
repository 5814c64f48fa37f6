"""The adaptive pools of torch2trt: built by TensorRT, evaluated, compared with torch's in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name
from converted import TRT, Call
from torch import Tensor

from qexport.errors import ExportError, UnsupportedOperator
from qexport.plugins.adaptive_avg_pool import WINDOW_LIMIT
from qexport.plugins.torch2trt import adaptive_avg_pool2d, adaptive_max_pool2d
from qexport.runtimes.tensorrt_network import read_network

Output = int | tuple[int | None, int | None]
Function = Callable[..., Tensor]
AVERAGE, MAXIMUM = F.adaptive_avg_pool2d, F.adaptive_max_pool2d

CASES: tuple[tuple[tuple[int, ...], Output], ...] = (
    ((1, 2, 1333, 800), 1),
    ((1, 2, 1333, 800), 7),
    ((1, 2, 1333, 800), 10),
    ((1, 2, 400, 400), 1),
    ((1, 2, 317, 317), 1),
    ((1, 3, 10, 10), 7),
    ((2, 8, 50, 50), 7),
    ((1, 4, 50, 50), 1),
    ((1, 4, 13, 13), 7),
    ((1, 2, 12, 9), (None, 4)),
    ((1, 2, 12, 9), (1, None)),
    ((2, 3, 100, 90), (60, 60)),
    ((1, 2, 640, 640), 2),
    ((1, 2, 3, 4), 7),
    ((5, 10, 10), 7),
    ((5, 30, 20), (20, 12)),
    ((5, 14, 14), 7),
    ((5, 61, 53), 1),
)


@pytest.mark.parametrize(("shape", "output"), CASES)
def test_adaptive_avg_pool_built_equals_torch(shape: tuple[int, ...], output: Output) -> None:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    call = Call(AVERAGE, x, output)
    (found,) = call.converted(adaptive_avg_pool2d.convert)
    expected = AVERAGE(x.double(), output)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    assert call.network.num_layers <= (4 if expected.shape[-2:] == (1, 1) else 6)
    check_windows(call)


@pytest.mark.parametrize(("shape", "output"), CASES)
def test_adaptive_max_pool_built_equals_torch(shape: tuple[int, ...], output: Output) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) - 3
    call = Call(MAXIMUM, x, output)
    (found,) = call.converted(adaptive_max_pool2d.convert)
    assert torch.equal(found, MAXIMUM(x, output))
    assert call.network.num_layers <= adaptive_max_pool2d.MOST_LAYERS
    check_windows(call)


@pytest.mark.parametrize(
    ("function", "converter"), [(AVERAGE, adaptive_avg_pool2d), (MAXIMUM, adaptive_max_pool2d)]
)
def test_adaptive_pool_of_random_sizes_equals_torch(function: Function, converter: ModuleType) -> None:
    generator = torch.Generator().manual_seed(1)

    def number(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=generator))

    for _ in range(40):
        rows, columns = number(90), number(90)
        output = (number(min(rows, 64)), number(min(columns, 64)))
        if output == (rows, columns):
            continue
        call = Call(function, torch.rand(1, 2, rows, columns, generator=generator), output)
        (found,) = call.converted(converter.convert)
        expected = function(call.method_args[0].double(), output)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("converter", [adaptive_avg_pool2d, adaptive_max_pool2d])
def test_adaptive_pool_to_the_size_of_the_input_makes_no_layer(converter: ModuleType) -> None:
    x = torch.zeros(1, 2, 7, 9)
    call = Call(AVERAGE, x, (None, 9))
    converter.convert(call)
    assert call.network.num_layers == 0
    assert call.method_return._trt is x._trt  # type: ignore[attr-defined]


@pytest.mark.parametrize("converter", [adaptive_avg_pool2d, adaptive_max_pool2d])
def test_adaptive_pool_of_rows_that_are_not_fixed_is_refused(converter: ModuleType) -> None:
    call = Call(AVERAGE, torch.zeros(1, 2, 8, 9), 3)
    call.method_args[0]._trt = call.network.add_input("free", TRT.float32, (1, 2, -1, 9))
    with pytest.raises(UnsupportedOperator, match="inputs of one size"):
        converter.convert(call)


def test_adaptive_avg_pool_named_arguments_are_read() -> None:
    x = torch.rand(1, 2, 9, 9)
    call = Call(AVERAGE, x, output_size=4)
    (found,) = call.converted(adaptive_avg_pool2d.convert)
    torch.testing.assert_close(found, AVERAGE(x, 4))


def test_adaptive_max_pool_with_indices_is_refused() -> None:
    call = Call(MAXIMUM, torch.zeros(1, 2, 8, 9), 3, return_indices=True)
    with pytest.raises(UnsupportedOperator, match="no indices"):
        adaptive_max_pool2d.convert(call)


def test_adaptive_max_pool_of_a_window_that_one_axis_cannot_split_is_refused() -> None:
    call = Call(MAXIMUM, torch.zeros(1, 1, 1, 100_000), 1)
    with pytest.raises(ExportError, match="fewer than 100000"):
        adaptive_max_pool2d.convert(call)


def test_adaptive_avg_pool_of_integers_is_refused() -> None:
    call = Call(lambda x, size: x[:, :, :7, :7], torch.zeros(1, 2, 10, 10, dtype=torch.int32), 7)
    with pytest.raises(UnsupportedOperator, match="float32 or float16"):
        adaptive_avg_pool2d.convert(call)


def check_windows(call: Call) -> None:
    """Check that no pool has a window that TensorRT refuses, nor a reduction as long."""
    for layer in read_network(TRT, call.network, library="").described.layers:
        if layer.kind == "POOLING":
            window = layer.attributes["window_size_nd"]
            assert isinstance(window, tuple)
            assert math.prod(window) < WINDOW_LIMIT
