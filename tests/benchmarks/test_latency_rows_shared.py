"""Kernels that several modules share: their time is divided, and the sums stay the same."""

from __future__ import annotations

import pytest

from qexport.benchmarks.latency_rows import build_rows, shares_of, sum_by_path
from qexport.layers import Layer
from qexport.runtimes.runner import KernelTime, ProfiledRun, SharedKernel
from qexport.runtimes.tensorrt_layers import kind_of

CONV, RELU, ADD, SISTER = (
    "backbone.body.conv1",
    "backbone.body.relu",
    "backbone.body.layer1.0",
    "backbone.body.layer1.0.downsample.0",
)


def _layer(path: str, macs: int, order: int) -> Layer:
    return Layer(
        order=order,
        path=path,
        call=0,
        op="conv2d",
        kind="convolution",
        stage="trunk",
        shape=(1,),
        parameters=0,
        macs=macs,
        quantized=True,
        reason="",
    )


@pytest.mark.parametrize(
    ("owner", "expected"),
    [
        (CONV, {CONV: 1.0}),
        (SharedKernel((CONV, RELU)), {CONV: 0.5, RELU: 0.5}),
        (SharedKernel((CONV, SISTER), by_macs=True), {CONV: 0.75, SISTER: 0.25}),
        (SharedKernel((CONV,), by_macs=True, fused=(RELU, ADD)), {CONV: 1.0, RELU: 0.0, ADD: 0.0}),
        # A module that the detector does not list counts as the lightest.
        (SharedKernel((CONV, "unlisted"), by_macs=True), {CONV: 300 / 301, "unlisted": 1 / 301}),
    ],
    ids=["one", "equally", "by macs", "fused", "unlisted"],
)
def test_shares_of_a_kernel_add_up_to_one(owner: str | SharedKernel, expected: dict[str, float]) -> None:
    shares = shares_of(owner, {CONV: 300, SISTER: 100})
    assert shares == pytest.approx(expected)
    assert sum(shares.values()) == pytest.approx(1.0)


def test_sum_by_path_of_shared_kernels_keeps_the_whole_and_names_who_shares() -> None:
    owners = {
        "conv": SharedKernel((CONV, SISTER), by_macs=True, fused=(RELU,)),
        "add": SharedKernel((RELU, ADD, CONV)),
        "copy": ADD,
    }
    kernels = (
        KernelTime("conv", "CaskConvolution", 4.0),
        KernelTime("add", "kgen", 0.9),
        KernelTime("copy", "Reformat", 0.1),
    )
    layers = [_layer(CONV, 100, 0), _layer(CONV, 200, 1), _layer(SISTER, 100, 2)]
    costs = sum_by_path([ProfiledRun(6.0, kernels)], owners, layers)
    assert sum(cost.median_ms for cost in costs.values()) == pytest.approx(5.0)
    assert {path: cost.median_ms for path, cost in costs.items()} == pytest.approx(
        {CONV: 3.3, SISTER: 1.0, RELU: 0.3, ADD: 0.4}
    )
    rows = {row.path: row.kernels for row in build_rows(costs, layers, kind_of, eager=None, fp32=None)}
    assert rows == {
        CONV: (f"CaskConvolution (shared with {SISTER})", f"kgen (shared with {RELU} and 1 more)"),
        SISTER: (f"CaskConvolution (shared with {CONV})",),
        RELU: (f"CaskConvolution (fused into {CONV} and 1 more)", f"kgen (shared with {ADD} and 1 more)"),
        ADD: ("Reformat", f"kgen (shared with {RELU} and 1 more)"),
    }


def test_sum_by_path_of_kernels_with_one_owner_names_nobody_else() -> None:
    run = ProfiledRun(1.0, (KernelTime("a", "QLinearConv", 0.5), KernelTime("b", "QLinearConv", 0.25)))
    cost = sum_by_path([run], {"a": CONV, "b": CONV})[CONV]
    assert (cost.median_ms, dict(cost.kernels), dict(cost.others)) == (0.75, {"QLinearConv": 0.75}, {})
