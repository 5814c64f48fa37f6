"""The bench of adaptive average pools: one small case for real, and its page on numbers that are known."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

TOOLS = Path(__file__).parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

from bench_pool import PoolCase, PoolTime, measure_pools, pool_lines  # noqa: E402 - the tools are no package

TIME = PoolTime(
    shape=(1, 64, 10, 10),
    output_size=(7, 7),
    runtime="torch",
    form="matrix(1: 10->7) matrix(0: 10->7)",
    layers=4,
    tensorrt_layers=4,
    own_ms=0.5,
    split_ms=0.25,
)


def test_measure_pools_times_both_forms_in_both_runtimes() -> None:
    times = measure_pools(0.01, (PoolCase((1, 8, 10, 10), (7, 7)),))
    assert [measured.runtime for measured in times] == ["torch", "ONNX Runtime"]
    for measured in times:
        assert measured.own_ms is not None
        assert measured.own_ms > 0 < measured.split_ms
        assert measured.layers == measured.tensorrt_layers == 4


def test_pool_lines_show_layers_and_ratio_and_count_slower_forms() -> None:
    slower = msgspec.structs.replace(TIME, split_ms=0.6)
    within_noise = msgspec.structs.replace(TIME, own_ms=0.001, split_ms=0.0025)
    alone = msgspec.structs.replace(TIME, own_ms=None)
    lines = pool_lines([TIME, slower, within_noise, alone])
    first = (
        "| 1x64x10x10 | 7x7 | torch | matrix(1: 10->7) matrix(0: 10->7) | 4 | 4 | 0.5000 | 0.2500 | 0.50 |"
    )
    assert first in lines
    assert any("| not exported | 0.2500 |  |" in line for line in lines)
    assert lines[-1] == "1 of 4 slower than torch's own."
