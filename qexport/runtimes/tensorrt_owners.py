"""To which modules a layer of a TensorRT engine belongs.

TensorRT fuses, and names every node that is behind a layer; among them are the quantizers of the layers before it,
which only give it a scale. A layer that multiplies matrices belongs to the modules whose convolution or product it
computes; what else is fused into it is named, and takes no time of its own. Another layer belongs to all modules
whose work it does.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from qexport.runtimes.runner import NOWHERE, SharedKernel
from qexport.runtimes.tensorrt_layers import EngineLayer

_WEIGHTED = re.compile(r"(Conv|ConvTranspose|Gemm|MatMul|conv2d|conv_transpose2d|linear)(?![a-z])")
"""Operators by the names that ONNX and torch have for them."""
_QUANTIZING = re.compile(r"(Q|Deq)uantizeLinear|Cast|fake_quantize_")
_ROOTS = frozenset({"preprocess", "transform", "backbone", "rpn", "roi_heads"})
"""What the paths of a two-stage detector begin with; other nodes are the exporter's own and name no module."""


def owners_of_layers(
    layers: Iterable[EngineLayer], rows: Collection[str] | None = None
) -> dict[str, str | SharedKernel]:
    """Return the module path, or the several, of every layer by its name.

    Args:
        layers: of the engine.
        rows: for a baseline: the artifact's paths. A module that is not among them gives way to those that are.
    """
    return {layer.name: owner_of(layer, rows) for layer in layers}


def owner_of(layer: EngineLayer, rows: Collection[str] | None = None) -> str | SharedKernel:
    """Return to which modules a layer belongs; `NOWHERE` for one that names no module."""
    named = modules_of(layer, rows)
    if not named:
        return NOWHERE
    weighted = [path for path, operators in named.items() if any(map(_WEIGHTED.match, operators))]
    # An element-wise kernel behind a convolution names it too, for its scale and its bias, but does not compute it.
    if weighted and layer.kind in {"convolution", "linear"}:
        fused = tuple(path for path in named if path not in weighted)
        return weighted[0] if len(named) == 1 else SharedKernel(tuple(weighted), by_macs=True, fused=fused)
    return next(iter(named)) if len(named) == 1 else SharedKernel(tuple(named))


def weighted_modules(layer: EngineLayer) -> tuple[str, ...]:
    """Return the modules whose convolution or matrix product a layer names, each once."""
    return tuple(
        path for path, operators in modules_of(layer).items() if any(map(_WEIGHTED.match, operators))
    )


def modules_of(layer: EngineLayer, rows: Collection[str] | None = None) -> dict[str, tuple[str, ...]]:
    """Return by module path the operators that a layer computes: those that do more than quantize, if there are."""
    found: dict[str, tuple[str, ...]] = {}
    for node in layer.nodes:
        path, _, operator = node.partition("/")
        path = path.partition("@")[0]
        if path.partition(".")[0] in _ROOTS:
            found[path] = (*found.get(path, ()), operator)
    working = {path: found[path] for path in found if not all(map(_QUANTIZING.match, found[path]))}
    named = working or found
    if rows is not None and any(path in rows for path in named):
        return {path: operators for path, operators in named.items() if path in rows}
    return named
