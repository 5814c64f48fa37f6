"""SplitAdaptiveAvgPool2d against torch's own pool in float64; torch's own float32 is up to 1e-5 off itself."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qexport.errors import UnsupportedOperator
from qexport.plugins.adaptive_avg_pool_module import OutputSize, SplitAdaptiveAvgPool2d

CASES: dict[tuple[int, ...], tuple[OutputSize, ...]] = {
    (1, 3, 1333, 800): (1, 7, 10),
    (1, 4, 400, 400): (1, (7, None)),
    (2, 16, 10, 10): (7, (3, 9), 10, (None, None)),
    (1, 256, 50, 50): (1, 7, 10, (None, 20)),
    (5, 13, 17): (1, 6, (5, None), (None, 1)),
    (1, 2, 1999, 61): ((61, 61), 31),
    (1, 2, 3, 4): (7,),
}


@settings(max_examples=60)
@given(st.integers(1, 2000), st.integers(1, 300), st.data())
def test_module_of_any_size_equals_torch(rows: int, columns: int, data: st.DataObject) -> None:
    output = (data.draw(st.integers(1, min(rows, 64))), data.draw(st.integers(1, min(columns, 64))))
    check((1, 2, rows, columns), output)


@pytest.mark.parametrize(
    ("shape", "output"), [(shape, output) for shape, outputs in CASES.items() for output in outputs]
)
def test_module_of_a_size_in_use_equals_torch(shape: tuple[int, ...], output: OutputSize) -> None:
    check(shape, output)


def test_module_of_no_output_size_returns_the_map() -> None:
    x = torch.rand(1, 2, 5, 6)
    assert torch.equal(SplitAdaptiveAvgPool2d(None)(x), x)  # torch's own takes (None, None) alone


def test_module_gradient_equals_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape, output in (
        ((2, 3, 10, 13), 7),
        ((1, 2, 12, 9), 3),
        ((3, 14, 15), 1),
        ((1, 4, 30, 20), (20, 12)),
    ):
        x = torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
        seed = None
        found = []
        for pool in (SplitAdaptiveAvgPool2d(output), nn.AdaptiveAvgPool2d(output)):
            y = pool(x)
            seed = torch.randn(y.shape, dtype=y.dtype, generator=generator) if seed is None else seed
            found.append(torch.autograd.grad(y, x, seed)[0])
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_module_weights_kept_in_inference_mode_serve_training() -> None:
    x, pool = torch.rand(1, 2, 11, 11), SplitAdaptiveAvgPool2d(8)
    with torch.inference_mode():
        pool(x)
    x.requires_grad_()
    pool(x).sum().backward()
    assert x.grad is not None
    assert x.grad.sum().item() == pytest.approx(2 * 8 * 8, rel=1e-6)


@pytest.mark.parametrize("output", [1, 7, 10, (None, 3)])
def test_module_exports_without_an_adaptive_pool(output: OutputSize) -> None:
    x, pool = torch.rand(1, 4, 50, 40), SplitAdaptiveAvgPool2d(output).eval()
    program = torch.export.export(pool, (x,))
    names = [str(node.target) for node in program.graph.nodes]
    assert not any("adaptive" in name for name in names), names
    torch.testing.assert_close(program.module()(x), pool(x))


def test_module_of_another_layout_in_memory_equals_torch() -> None:
    x = torch.rand(2, 5, 23, 19).to(memory_format=torch.channels_last)
    torch.testing.assert_close(SplitAdaptiveAvgPool2d(7)(x), F.adaptive_avg_pool2d(x, 7))


def test_module_of_half_precision_keeps_the_type() -> None:
    x = torch.rand(1, 2, 10, 10).bfloat16()
    assert SplitAdaptiveAvgPool2d(7)(x).dtype == torch.bfloat16


def test_module_shows_its_output_size() -> None:
    assert str(SplitAdaptiveAvgPool2d((7, None))) == "SplitAdaptiveAvgPool2d(output_size=(7, None))"


@pytest.mark.parametrize("shape", [(4, 4), (1, 1, 1, 4, 4)])
def test_module_of_another_number_of_axes_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedOperator, match=r"takes \(N, C, H, W\) or \(C, H, W\)"):
        SplitAdaptiveAvgPool2d(2)(torch.zeros(shape))


def check(shape: tuple[int, ...], output: OutputSize) -> None:
    """Compare on random maps, and bound the layers."""
    x = torch.rand(shape, generator=torch.Generator().manual_seed(math.prod(shape)))
    pool = SplitAdaptiveAvgPool2d(output)
    found, expected = pool(x), nn.AdaptiveAvgPool2d(output)(x.double())
    assert found.shape == expected.shape
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    assert pool.plan(x).layers <= (4 if expected.shape[-2:] == (1, 1) else 6)
