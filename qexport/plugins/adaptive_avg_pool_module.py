"""`SplitAdaptiveAvgPool2d`: torch's AdaptiveAvgPool2d in plain pools, means and matrix products."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name
from torch import Tensor, nn

from qexport.errors import UnsupportedOperator
from qexport.plugins.adaptive_avg_pool import (
    TORCH,
    Matrix,
    Pool,
    PoolPlan,
    Reduce,
    Step,
    averaging_matrix,
    plan,
    resolve_output_size,
)

OutputSize = int | tuple[int | None, ...] | None


class SplitAdaptiveAvgPool2d(nn.Module):
    """Adaptive average pooling of (N, C, H, W) or (C, H, W), equal to `torch.nn.AdaptiveAvgPool2d`.

    It exports with static sizes into operators that every runtime has, and gradients flow through it.

    Args:
        output_size: rows and columns of the output, or one number for both; None is the input's size.
    """

    def __init__(self, output_size: OutputSize) -> None:
        super().__init__()
        self.output_size: OutputSize = (
            output_size if output_size is None or isinstance(output_size, int) else tuple(output_size)
        )

    def extra_repr(self) -> str:
        """Return what torch's own module shows."""
        return f"output_size={self.output_size}"

    def plan(self, x: Tensor) -> PoolPlan:
        """Return the steps for a map.

        Raises:
            UnsupportedOperator: not a map of 3 or 4 axes, or an output size without sense.
        """
        return _planned(x.shape, self.output_size).plan

    def forward(self, x: Tensor) -> Tensor:
        """Return the pooled map, of as many axes as `x`."""
        planned = _planned(x.shape, self.output_size)
        if planned.products is not None:
            return _two_products(*planned.products, x)
        for step in planned.plan.steps:
            x = _apply(step, x)
        return x.contiguous()


@dataclass(frozen=True, slots=True)
class _Planned:
    plan: PoolPlan
    products: tuple[Matrix, Matrix] | None
    """Over columns, then over rows, where these are the whole plan."""


@functools.lru_cache(maxsize=256)
def _planned(shape: tuple[int, ...], output_size: OutputSize) -> _Planned:
    if len(shape) not in (3, 4):
        raise UnsupportedOperator(
            f"SplitAdaptiveAvgPool2d takes (N, C, H, W) or (C, H, W), got a tensor of shape {shape}."
        )
    size = (shape[-2], shape[-1])
    maps = max(1, math.prod(shape[:-2]))
    found = plan(size, resolve_output_size(output_size, size), costs=TORCH, maps=maps)
    matrices = [step for step in found.steps if isinstance(step, Matrix) and step.groups == 1]
    whole = [step.axis for step in matrices] == [1, 0] and len(found.steps) == 2
    return _Planned(found, (matrices[0], matrices[1]) if whole else None)


def _apply(step: Step, x: Tensor) -> Tensor:
    if isinstance(step, Pool):
        return F.avg_pool2d(x, step.kernel, step.stride, step.padding, count_include_pad=False)
    if isinstance(step, Reduce):
        return x.mean(step.negative_axes, keepdim=True)
    return _rows_product(step, x) if step.axis == 0 else _columns_product(step, x)


def _two_products(columns: Matrix, rows: Matrix, x: Tensor) -> Tensor:
    """Return both products, each one call for all maps.

    The first result is (columns, maps * rows), so that the second finds the rows together in memory.
    """
    *lead, height, width = x.shape
    first = torch.mm(_weights(columns, x), x.reshape(-1, width).t())
    both = torch.mm(_weights(rows, x), first.view(-1, height).t())
    maps_last = both.view(rows.outputs, columns.outputs, -1)
    return maps_last.permute(2, 0, 1).contiguous().view(*lead, rows.outputs, columns.outputs)


def _columns_product(step: Matrix, x: Tensor) -> Tensor:
    """Return the product with all rows of all maps at once.

    The matrix stands on the left: a BLAS is up to twice as slow at a result of few columns.
    """
    *lead, height, width = x.shape
    product = torch.mm(_weights(step, x), x.reshape(-1, width // step.groups).t())
    return product.t().reshape(*lead, height, step.outputs)


def _rows_product(step: Matrix, x: Tensor) -> Tensor:
    *lead, height, width = x.shape
    parts = x.reshape(*lead[:-1], lead[-1] * step.groups, height // step.groups, width)
    return torch.matmul(_weights(step, x), parts).reshape(*lead, step.outputs, width)


def _weights(step: Matrix, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.tensor(step.weights().tolist(), dtype=x.dtype, device=x.device)
    return _kept_weights(step.inputs // step.groups, step.outputs // step.groups, x.dtype, x.device)


@functools.lru_cache(maxsize=64)
def _kept_weights(inputs: int, outputs: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(mode=False):  # one that is kept must also serve where gradients flow
        return torch.from_numpy(averaging_matrix(inputs, outputs)).to(device, dtype)
