"""Plans of adaptive average pools: exact, few layers, no large window, whatever the sizes."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qexport.errors import UnsupportedOperator
from qexport.plugins.adaptive_avg_pool import (
    ONNX_RUNTIME,
    POOL_TERMS,
    TENSORRT,
    TORCH,
    WINDOW_LIMIT,
    Matrix,
    Pair,
    Pool,
    PoolPlan,
    Reduce,
    Step,
    most_layers,
    plan,
    regular_window,
    resolve_output_size,
    window_bounds,
)

RUNTIMES = {"torch": TORCH, "ONNX Runtime": ONNX_RUNTIME, "TensorRT": TENSORRT}
LIMITS = {"torch": 2**62, "ONNX Runtime": 2**62, "TensorRT": WINDOW_LIMIT}
PRIMES = (2, 3, 7, 13, 61, 127, 317, 997, 1333, 1999)
Map = NDArray[np.float64]

sizes = st.tuples(st.integers(1, 2000), st.integers(1, 2000))


@st.composite
def pools(draw: st.DrawFn) -> tuple[Pair, Pair]:
    """Draw an input and an output size."""
    rows, columns = draw(sizes)
    return (rows, columns), (draw(_outputs(rows)), draw(_outputs(columns)))


def _outputs(inputs: int) -> st.SearchStrategy[int]:
    return st.one_of(st.integers(1, min(inputs, 64)), st.just(inputs))


@settings(max_examples=300)
@given(pools(), st.sampled_from(sorted(RUNTIMES)), st.sampled_from((3, 256, 25_600)))
def test_plan_of_any_size_is_exact_within_the_limits(sizes: tuple[Pair, Pair], name: str, maps: int) -> None:
    check(plan(*sizes, costs=RUNTIMES[name], maps=maps), name)


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("output", [(1, 1), (7, 7), (10, 10), (1, 7), (7, 1), (800, 1)])
def test_plan_of_a_whole_image_is_exact_within_the_limits(output: Pair, name: str) -> None:
    check(plan((1333, 800), output, costs=RUNTIMES[name], maps=3), name)


@pytest.mark.parametrize("name", RUNTIMES)
def test_plan_of_primes_is_exact_within_the_limits(name: str) -> None:
    for rows, columns in product(PRIMES, (5, 1009)):
        for output in {(1, 1), (min(rows, 31), min(columns, 64)), (rows, 2)}:
            check(plan((rows, columns), output, costs=RUNTIMES[name]), name)


@pytest.mark.parametrize("name", RUNTIMES)
def test_plan_to_a_larger_map_is_exact(name: str) -> None:
    for sizes in (((3, 4), (7, 7)), ((1, 1), (6, 2)), ((5, 9), (6, 10))):
        check(plan(*sizes, costs=RUNTIMES[name]), name)


def test_regular_window_is_found_exactly_where_the_windows_allow_a_pool() -> None:
    found = 0
    for inputs, outputs in product([*range(1, 130), 800, 997, 1333, 2000], range(1, 65)):
        window, bounds = regular_window(inputs, outputs), window_bounds(inputs, outputs)
        regular = _as_pool(bounds, inputs)
        assert (window is not None) == regular, (inputs, outputs)
        if window is not None:
            starts = [i * window.stride - window.padding for i in range(outputs)]
            clipped = [(max(0, at), min(inputs, at + window.kernel)) for at in starts]
            assert clipped == bounds
            assert 2 * window.padding <= window.kernel, "torch pads a pool by half its window at most"
            found += 1
    assert found > 1000


def test_plan_layers_never_pass_the_bound() -> None:
    worst = {True: 0, False: 0}
    grid = (*range(1, 40), 100, 317, 400, 800, 1333, 1999, 2000)
    for rows, columns in product(grid, (1, 7, 12, 317, 800, 1999)):
        for output in ((1, 1), (min(rows, 7), min(columns, 10)), (max(1, rows // 2), 1), (rows, columns)):
            found = plan((rows, columns), output, costs=TENSORRT, maps=64)
            worst[output == (1, 1)] = max(worst[output == (1, 1)], found.layers)
    assert worst[True] <= 4
    assert 4 <= worst[False] <= 6


@pytest.mark.parametrize(
    ("sizes", "form"),
    [
        (((14, 14), (7, 7)), "pool(2x2/2x2)"),
        (((50, 50), (7, 7)), "pool(8x8/7x7)"),
        (((13, 13), (7, 7)), "pool(3x3/2x2)"),
        (((10, 10), (7, 7)), "matrix(0: 10->7) matrix(1: 10->7)"),
        (((1999, 997), (1, 1)), "reduce(0) reduce(1)"),
        (((9, 9), (9, 9)), "identity"),
    ],
)
def test_plan_for_tensorrt_takes_pools_where_regular_and_products_where_not(
    sizes: tuple[Pair, Pair], form: str
) -> None:
    assert plan(*sizes, costs=TENSORRT).form == form


@pytest.mark.parametrize("size", [(1333, 800), (400, 400), (317, 317), (316, 316)])
def test_plan_of_a_global_pool_never_makes_a_window_that_tensorrt_refuses(size: Pair) -> None:
    found = plan(size, (1, 1), costs=TENSORRT, maps=32)
    assert 1 <= found.layers <= 4
    check(found, "TensorRT")


def test_plan_of_a_common_factor_multiplies_less_with_groups() -> None:
    found = plan((1, 2000), (1, 1200), costs=TENSORRT)
    (step,) = found.steps
    assert isinstance(step, Matrix)
    assert (step.groups, step.weights().shape) == (400, (3, 5))
    check(found, "TensorRT")


def test_plan_costs_less_than_the_products_it_is_chosen_over() -> None:
    found = plan((50, 50), (10, 10), costs=ONNX_RUNTIME)
    products: tuple[Step, ...] = (Matrix(0, 50, 10), Matrix(1, 50, 10))
    first = products[0].cost_ns((50, 50), 256, ONNX_RUNTIME)
    assert found.cost_ns < first + products[1].cost_ns((10, 50), 256, ONNX_RUNTIME)


def test_plan_of_fewer_layers_is_kept_to_them() -> None:
    for size, output in (((90, 60), (60, 40)), ((100, 90), (60, 60))):
        free = plan(size, output, costs=TORCH)
        kept = plan(size, output, costs=TORCH, layers=4)
        assert kept.layers == 4 < free.layers
        check(kept, "torch")


def test_plan_of_too_few_layers_is_refused() -> None:
    with pytest.raises(UnsupportedOperator, match="allow at least 4"):
        plan((10, 10), (7, 7), costs=TENSORRT, layers=3)


@pytest.mark.parametrize(
    ("asked", "found"),
    [(None, (12, 9)), (7, (7, 7)), ((None, 4), (12, 4)), ([5, None], (5, 9)), ((3, 2), (3, 2))],
)
def test_output_size_none_is_the_size_of_the_input(asked: int | tuple[int, ...] | None, found: Pair) -> None:
    assert resolve_output_size(asked, (12, 9)) == found


@pytest.mark.parametrize("asked", [0, (3, 0), (3,), (1, 2, 3), -1])
def test_output_size_without_sense_is_refused(asked: int | tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedOperator, match="expected one number or two"):
        resolve_output_size(asked, (12, 9))


def check(found: PoolPlan, name: str) -> None:
    """Check layers, windows and sizes, and compare with the means of the windows, in float64."""
    assert found.layers <= most_layers(found.output_size)
    size = found.input_size
    x = np.random.default_rng(0).random(size)
    y = x
    for step in found.steps:
        y, before = evaluate(step, y), size
        size = step.output_size(size)
        assert y.shape == size
        assert not isinstance(step, Pool) or step.volume <= POOL_TERMS < WINDOW_LIMIT
        if isinstance(step, Reduce):
            assert math.prod(before[axis] for axis in step.axes) < LIMITS[name]
    assert size == found.output_size
    np.testing.assert_allclose(y, _means(_means(x, size[0]).T, size[1]).T, rtol=1e-11)


def evaluate(step: Step, x: Map) -> Map:
    """Return what a layer computes."""
    if isinstance(step, Reduce):
        result: Map = x.mean(axis=step.negative_axes, keepdims=True)
        return result
    if isinstance(step, Pool):
        for axis in (0, 1):
            x = _strided(x, axis, step.kernel[axis], step.stride[axis], step.padding[axis])
        return x
    if step.axis == 0:
        parts = x.reshape(step.groups, -1, x.shape[1])
        return (step.weights() @ parts).reshape(step.outputs, -1)
    return evaluate(Matrix(0, step.inputs, step.outputs, step.groups), x.T).T


def _strided(x: Map, axis: int, kernel: int, stride: int, padding: int) -> Map:
    length = x.shape[axis]
    starts = range(-padding, length + padding - kernel + 1, stride)
    windows = [(max(0, at), min(length, at + kernel)) for at in starts]
    means = [x.take(range(first, end), axis).mean(axis, keepdims=True) for first, end in windows]
    return np.concatenate(means, axis)


def _means(x: Map, outputs: int) -> Map:
    return np.stack([x[first:end].mean(axis=0) for first, end in window_bounds(len(x), outputs)])


def _as_pool(bounds: list[Pair], inputs: int) -> bool:
    """Return whether some kernel, stride and padding, at most half the kernel, gives these windows."""
    longest = max(end - first for first, end in bounds)
    if len(bounds) == 1:
        return True
    for padding in (0, 1):
        for kernel in range(longest, longest + 2):
            for stride in {bounds[1][0] + padding, max(1, bounds[1][0] + padding - 1)} - {0}:
                starts = [i * stride - padding for i in range(len(bounds))]
                clipped = [(max(0, at), min(inputs, at + kernel)) for at in starts]
                fits = starts[-1] + kernel <= inputs + padding
                if clipped == bounds and fits and 2 * padding <= kernel:
                    return True
    return False
