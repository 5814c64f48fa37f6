"""Sums, means, and the largest and smallest value over axes."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qexport.plugins.torch2trt.data_types import operand, reshaped
from qexport.plugins.torch2trt.dotted import forms
from qexport.plugins.torch2trt.interface import ConversionContext, argument, give
from qexport.plugins.torch2trt.registration import Convert, bind
from qexport.runtimes.tensorrt_library import load_library


def _reduce(context: ConversionContext, operation: str) -> None:
    x: torch.Tensor = argument(context, 0, "input")
    result, kind = context.method_return, getattr(load_library().trt.ReduceOperation, operation)
    given = argument(context, 1, "dim")
    axes = [given] if isinstance(given, int) else list(given) if given else list(range(x.dim()))
    mask = sum(1 << axis for axis in {int(axis) % x.dim() for axis in axes})
    tensor = operand(context, x, result.dtype, x.dim())
    reduced = context.network.add_reduce(tensor, kind, mask, True).get_output(0)
    give(context, reshaped(context, reduced, result.shape))


CONVERTERS: Mapping[str, Convert] = {
    **bind(_reduce, "SUM", *forms("sum")),
    **bind(_reduce, "AVG", *forms("mean")),
    **bind(_reduce, "MAX", *forms("amax")),
    **bind(_reduce, "MIN", *forms("amin")),
}
"""By dotted name of the torch function."""
