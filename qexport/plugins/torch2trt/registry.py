"""Every converter, listed by name: a file that is not here converts nothing."""

from __future__ import annotations

from collections.abc import Mapping

from qexport.plugins.torch2trt import (
    activations,
    adaptive_avg_pool2d,
    adaptive_max_pool2d,
    avg_pool2d,
    batch_norm,
    best_scores,
    clamp,
    comparisons,
    concatenation,
    conv2d,
    copies,
    elementwise,
    fake_quantize,
    hardsigmoid,
    hardswish,
    index_select,
    interpolate,
    linear,
    matmul,
    max_pool2d,
    nms,
    normalised_image,
    pad,
    permute,
    reduce,
    remainder,
    reshape,
    roi_align,
    silu,
    slicing,
    softmax,
    topk,
    unary,
    where,
)
from qexport.plugins.torch2trt.registration import Convert, Family, Operator

OPERATORS: tuple[Operator, ...] = (
    adaptive_avg_pool2d,
    adaptive_max_pool2d,
    avg_pool2d,
    best_scores,
    conv2d,
    hardsigmoid,
    hardswish,
    interpolate,
    linear,
    matmul,
    max_pool2d,
    nms,
    normalised_image,
    pad,
    remainder,
    reshape,
    roi_align,
    silu,
    topk,
)
"""Files about one operator: `FUNCTIONS` and `convert`."""

FAMILIES: tuple[Family, ...] = (
    activations,
    batch_norm,
    clamp,
    comparisons,
    concatenation,
    copies,
    elementwise,
    fake_quantize,
    index_select,
    permute,
    reduce,
    slicing,
    softmax,
    unary,
    where,
)
"""Files about several functions that are much alike: `CONVERTERS`."""

CONVERT_CONSTANTS = frozenset(fake_quantize.CONVERTERS)
"""Functions that are layers even where no argument depends on an input; all others are computed beforehand."""


NOT_TO_BE_TRUSTED = (
    # Wrong without a word: over an axis of its own choice, and with another beta than 1.
    *("torch.nn.functional.log_softmax", "torch.nn.functional.softplus"),
    # One window for all, which fits where the output divides the input.
    *(f"torch.nn.functional.adaptive_{kind}_pool{rank}d" for kind in ("avg", "max") for rank in (1, 3)),
    # As many outputs as inputs.
    *(f"torch.nn.functional.conv_transpose{rank}d" for rank in (1, 2, 3)),
)
"""Converters of torch2trt that are not used, even where there is none of ours."""


def converters(extra: tuple[Operator | Family, ...] = ()) -> dict[str, Convert]:
    """Return the converter of every torch function, by dotted name.

    Args:
        extra: converters of your own; they go before ours.

    Raises:
        ValueError: two files of ours convert the same function.
    """
    found: dict[str, Convert] = {}
    modules: tuple[Operator | Family, ...] = (*OPERATORS, *FAMILIES)
    for module in modules:
        own = converters_of(module)
        twice = sorted(found.keys() & own.keys())
        if twice:
            raise ValueError(f"{module} converts {twice[0]}, which another file converts too")
        found |= own
    for given in extra:
        found |= converters_of(given)
    return found


def converters_of(module: Operator | Family) -> Mapping[str, Convert]:
    """Return what one file converts."""
    if isinstance(module, Family):
        return module.CONVERTERS
    return dict.fromkeys(module.FUNCTIONS, module.convert)
