"""Observers: what they count, which clipping value they choose, and how much memory they need for it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qexport.quantization.observers import (
    BINS,
    SCALE_BITS,
    SMALLEST_SCALE,
    ChannelMax,
    MagnitudeHistogram,
    Preset,
    round_up,
)
from qexport.settings import ObserverName

METHODS: tuple[ObserverName, ...] = ("min-max", "percentile", "mse")
ROUNDED_UP = 1 + 2.0 ** (1 - SCALE_BITS)

finite = st.floats(-1e4, 1e4, width=32).filter(lambda value: value == 0 or abs(value) > 1e-3)
batches = st.lists(st.lists(finite, min_size=1, max_size=20), min_size=1, max_size=8)


def watch(method: ObserverName, *tensors: Tensor, percentile: float = 99.99) -> MagnitudeHistogram:
    observer = MagnitudeHistogram(method=method, percentile=percentile)
    for tensor in tensors:
        assert observer(tensor) is tensor
    return observer


def clip_of(observer: MagnitudeHistogram) -> float:
    return float(observer.scale()) * 127


@given(batches)
@settings(max_examples=60)
def test_min_max_scale_restores_every_value_within_half_a_step(values: list[list[float]]) -> None:
    seen = [torch.tensor(batch, dtype=torch.float32) for batch in values]
    scale = float(watch("min-max", *seen).scale())
    for batch in seen:
        codes = torch.clamp(torch.round(batch.double() / scale), -128, 127)
        assert float((codes * scale - batch.double()).abs().max()) <= scale / 2 * (1 + 1e-4)


@given(batches, st.sampled_from(("percentile", "mse")))
@example([[1.0], [2.0]], "percentile")
@settings(max_examples=60)
def test_histogram_whose_range_doubled_counts_as_if_it_had_been_that_wide(
    values: list[list[float]], method: ObserverName
) -> None:
    seen = [torch.tensor(batch, dtype=torch.float32) for batch in values]
    observer = watch(method, *seen)
    magnitudes = torch.cat(seen).abs().double().numpy()
    if observer.range == 0.0:
        assert not magnitudes.any()
        assert int(observer.counts[0]) == magnitudes.size
        return
    assert math.log2(observer.range).is_integer()
    places = (magnitudes * BINS / observer.range).astype(np.int64)
    np.testing.assert_array_equal(observer.counts.numpy(), np.bincount(places, minlength=BINS))


@given(batches, st.sampled_from(METHODS))
@settings(max_examples=60)
def test_scale_is_positive_and_never_beyond_the_largest_value(
    values: list[list[float]], method: ObserverName
) -> None:
    seen = [torch.tensor(batch, dtype=torch.float32) for batch in values]
    largest = max(float(batch.abs().max()) for batch in seen)
    scale = float(watch(method, *seen).scale())
    assert SMALLEST_SCALE <= scale <= max(largest / 127, SMALLEST_SCALE) * ROUNDED_UP


def test_percentile_leaves_out_the_outliers_that_it_says() -> None:
    values = torch.cat([torch.linspace(0, 1, 9_900), torch.full((100,), 60.0)])
    assert clip_of(watch("percentile", values, percentile=99.0)) == pytest.approx(1.0, rel=0.02)
    assert clip_of(watch("percentile", values, percentile=99.5)) == pytest.approx(60.0, rel=0.001)
    assert clip_of(watch("percentile", values, percentile=100.0)) == pytest.approx(60.0, rel=0.001)


def test_mse_clips_a_lone_outlier_and_keeps_an_even_spread() -> None:
    random = torch.Generator().manual_seed(0)
    bell = torch.randn(200_000, generator=random)
    outlier = torch.cat([bell, torch.tensor([8.0])])
    assert 2.4 <= clip_of(watch("mse", outlier)) < 6.0
    even = torch.rand(200_000, generator=random)
    assert clip_of(watch("mse", even)) == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_all_zero_gives_the_smallest_scale(method: ObserverName) -> None:
    assert float(watch(method, torch.zeros(3, 4)).scale()) == SMALLEST_SCALE


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_value_that_is_not_finite_makes_the_scale_infinite(method: ObserverName, bad: float) -> None:
    observer = watch(method, torch.ones(4), torch.tensor([1.0, bad]), torch.ones(4))
    assert math.isinf(float(observer.scale()))


def test_histogram_counts_more_values_than_float32_can() -> None:
    zeros = 2**24 + 3
    values = torch.zeros(zeros + 1)
    values[-1] = 1.0
    observer = watch("percentile", values)
    assert int(observer.counts[0]) == zeros
    assert int(observer.counts.sum()) == zeros + 1


@pytest.mark.parametrize("method", METHODS)
def test_histogram_needs_the_same_memory_whatever_it_saw(method: ObserverName) -> None:
    observer = watch(method, torch.ones(10))
    before = held_bytes(observer)
    for scale in range(1, 40):
        observer(torch.randn(10_000) * scale**3)
    assert held_bytes(observer) == before


def held_bytes(observer: MagnitudeHistogram) -> int:
    held = 0
    for value in vars(observer).values():
        assert not isinstance(value, list)
        held += value.numel() * value.element_size() if isinstance(value, Tensor) else 0
    return held


def test_channel_max_has_one_scale_a_channel_and_a_zero_channel_has_one_too() -> None:
    weight = torch.tensor([[[1.0, -2.0]], [[0.0, 0.0]], [[0.5, 0.25]]])
    observer = ChannelMax(ch_axis=0)
    observer(weight)
    expected = [2.0 / 127, SMALLEST_SCALE, 0.5 / 127]
    assert observer.scale().tolist() == pytest.approx(expected, rel=1e-6)


def test_preset_answers_what_it_was_given() -> None:
    observer = Preset(given=(0.25, 0.5))
    observer(torch.full((2, 2), 1e9))
    scale, zero_point = observer.calculate_qparams()
    assert scale.tolist() == [0.25, 0.5]
    assert zero_point.tolist() == [0, 0]


@given(st.floats(SMALLEST_SCALE, 1e6))
def test_round_up_keeps_its_bits_and_gives_away_little(scale: float) -> None:
    rounded = round_up(scale)
    assert round_up(rounded) == rounded
    mantissa, _ = math.frexp(rounded)
    assert (mantissa * 2**SCALE_BITS).is_integer()
    assert scale * (1 - 2.0**-18) <= rounded <= scale * ROUNDED_UP
