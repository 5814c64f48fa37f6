"""What the TensorRT back end does by itself, against numpy and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from converted import TRT, EmptyNetwork
from numpy.testing import assert_array_equal
from operator_cases import ROI_CASES

from qexport.errors import UnsupportedOperator
from qexport.plugins.roi_align_grid import Atlas, pool_by_grid
from qexport.plugins.roi_align_sampler import LevelSize, Pooling, Sampler, level_of
from qexport.plugins.tensorrt.network_builder import NetworkBuilder

X = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4) - 7


class WithoutInt64:
    """The library as versions before TensorRT 10 show it."""

    def __getattr__(self, name: str) -> Any:
        if name == "int64":
            raise AttributeError(name)
        return getattr(TRT, name)


def test_network_builder_of_operands_of_different_rank_broadcasts_as_numpy() -> None:
    empty = EmptyNetwork()
    build = NetworkBuilder(TRT, empty.network)
    x, row = empty.input(X), empty.input(X[0, 0])
    outputs = [
        build.add(x, row),
        build.sub(build.constant(2.0, np.float32), x),
        build.matmul(build.constant(np.ones((1, 3)), np.float32), x),
    ]
    summed, difference, product = empty.run(*outputs)
    assert_array_equal(summed, X + X[0, 0])
    assert_array_equal(difference, 2 - X)
    assert_array_equal(product, torch.ones(1, 3) @ X)


def test_network_builder_of_pads_repeats_the_edge_or_adds_zeros() -> None:
    empty = EmptyNetwork()
    build = NetworkBuilder(TRT, empty.network)
    x = empty.input(X)
    zeros, edge = empty.run(
        build.pad(x, [0, 1, 0, 0, 2, 3]), build.pad(x, build.integers(0, 0, 2, 0, 1, 0), edge=True)
    )
    assert_array_equal(zeros, np.pad(X, [(0, 0), (1, 2), (0, 3)]))
    assert_array_equal(edge, np.pad(X, [(0, 0), (0, 1), (2, 0)], mode="edge"))


def test_network_builder_of_slices_and_shapes_equals_numpy() -> None:
    empty = EmptyNetwork()
    build = NetworkBuilder(TRT, empty.network)
    x = empty.input(X)
    beyond = 2**63 - 1
    outputs = [
        build.slice(x, [1, 1], [beyond, 3], [1, 2]),
        build.expand(build.unsqueeze(x, [1]), [2, 5, 3, 4]),
        build.squeeze(build.slice(x, [1], [2], [0]), [0]),
        build.gather(x, build.constant(1, np.int64), axis=-1),
        build.transpose(x, [2, 0, 1]),
        build.largest(x),
        build.reduce_mean(x, [0, 2]),
    ]
    expected = [
        X[:, 1:, 1:3],
        X[:, None].expand(2, 5, 3, 4),
        X[1],
        X[..., 1],
        X.permute(2, 0, 1),
        X.max(),
        X.mean((0, 2), keepdim=True),
    ]
    for found, wanted in zip(empty.run(*outputs), expected, strict=True):
        assert_array_equal(found, wanted)


def test_network_builder_of_no_number_compares_false() -> None:
    empty = EmptyNetwork()
    build = NetworkBuilder(TRT, empty.network)
    given = empty.input(torch.tensor([1.0, 2.0, 3.0, float("nan")]))
    two = build.constant(2.0, np.float32)
    less, more = empty.run(build.less_or_equal(given, two), build.greater(given, two))
    assert less.tolist() == [True, True, False, False]
    assert more.tolist() == [False, False, True, False]


@pytest.mark.parametrize("most", [3, 100])
def test_network_builder_of_a_loop_ends_when_told_or_after_the_most_turns(most: int) -> None:
    empty = EmptyNetwork()
    build = NetworkBuilder(TRT, empty.network)

    def turn(inner: Any, held: Any) -> tuple[Any, Any]:
        after = inner.add(held, inner.constant([[1.0]], np.float32))
        return inner.greater(inner.constant(10.0, np.float32), inner.largest(after)), after

    (found,) = empty.run(build.repeat(empty.input(torch.zeros(2, 2)), turn, most, name="count"))
    assert_array_equal(found, np.full((2, 2), min(most, 10)))


def test_network_builder_of_a_dynamic_shape_is_refused() -> None:
    empty = EmptyNetwork()
    given = empty.network.add_input("frame", TRT.float32, (-1, 3))
    build = NetworkBuilder(TRT, empty.network)
    with pytest.raises(UnsupportedOperator, match=r"frame has the dynamic shape \(-1, 3\)"):
        build.floor(build.unsqueeze(given, [0]))


def test_network_builder_without_int64_pools_and_ranks_with_int32() -> None:
    case = ROI_CASES["four levels"]
    features = case.features()
    empty = EmptyNetwork()
    build = NetworkBuilder(WithoutInt64(), empty.network)
    pooling = Pooling(
        scales=tuple(case.scales),
        levels=tuple(LevelSize(*feature.shape[2:]) for feature in features),
        channels=case.channels,
        proposals=len(case.boxes),
        output_size=case.output_size,
        sampling_ratio=case.sampling_ratio,
    )
    boxes = empty.input(case.boxes)
    level = level_of(build, boxes, pooling.scales, case.canonical_scale, 4)
    assert level.dtype == TRT.int32
    maps = [empty.input(feature) for feature in features]
    sampler: Sampler[Any] = Sampler(build, boxes, level, pooling)
    pooled = pool_by_grid(build, maps, level, sampler, pooling, Atlas.of(pooling.levels))
    _, ranked = build.top_k(boxes, 5, axis=0)
    found, order = empty.run(pooled, ranked)
    np.testing.assert_allclose(found, case.torchvision(features), atol=1e-4, rtol=1e-4)
    assert_array_equal(order, case.boxes.sort(dim=0, descending=True, stable=True).indices[:5])
    layers = [empty.network.get_layer(index) for index in range(empty.network.num_layers)]
    assert "INT64" not in {layer.get_output(0).dtype.name for layer in layers}
