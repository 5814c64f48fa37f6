"""From timed kernels to one row per module path."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from qexport.layers import STAGES, Kind, Layer, Stage, stage_of
from qexport.results import LayerLatency
from qexport.runtimes.runner import ProfiledRun, SharedKernel


@dataclass(frozen=True, slots=True)
class PathCost:
    """What one module path costs in one runtime, all of its calls together."""

    median_ms: float
    """Median over the runs of the sum of its kernels."""
    kernels: Mapping[str, float]
    """By kernel type, the mean over the runs of the time of all its kernels of this type, ms."""
    others: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By kernel type, the paths that have a part of the time of these kernels too."""


def sum_by_path(
    profiled: Sequence[ProfiledRun],
    owners: Mapping[str, str | SharedKernel],
    layers: Sequence[Layer] = (),
) -> dict[str, PathCost]:
    """Sum kernels by module path; what several paths share is divided among them, so that the sums stay the same.

    Args:
        profiled: runs with every kernel timed.
        owners: module path, or the several, of every kernel, by its name.
        layers: the static detector's, for multiply-accumulates.
    """
    macs: defaultdict[str, int] = defaultdict(int)
    for layer in layers:
        macs[layer.path] += layer.macs
    shares = {name: shares_of(owner, macs) for name, owner in owners.items()}
    by_run: list[dict[str, float]] = []
    types: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    others: defaultdict[str, defaultdict[str, dict[str, None]]] = defaultdict(lambda: defaultdict(dict))
    for run in profiled:
        own: defaultdict[str, float] = defaultdict(float)
        for kernel in run.kernels:
            timed = [path for path, share in shares[kernel.name].items() if share]
            for path, share in shares[kernel.name].items():
                own[path] += share * kernel.duration_ms
                types[path][kernel.kernel] += share * kernel.duration_ms / len(profiled)
                others[path][kernel.kernel].update(dict.fromkeys(other for other in timed if other != path))
        by_run.append(own)
    return {
        path: PathCost(
            median(own.get(path, 0.0) for own in by_run),
            dict(kernels),
            {kernel: tuple(paths) for kernel, paths in others[path].items() if paths},
        )
        for path, kernels in types.items()
    }


def shares_of(owner: str | SharedKernel, macs: Mapping[str, int]) -> dict[str, float]:
    """Return the share of a kernel's time that each of its paths has; they add up to 1.

    Args:
        owner: a path, or the several.
        macs: multiply-accumulates by path.
    """
    if isinstance(owner, str):
        return {owner: 1.0}
    # A module that the detector does not list is weighed as the lightest, not as nothing.
    weights = {path: max(1, macs.get(path, 0)) if owner.by_macs else 1 for path in owner.paths}
    total = sum(weights.values())
    return {path: weight / total for path, weight in weights.items()} | dict.fromkeys(owner.fused, 0.0)


def build_rows(
    paths: Mapping[str, PathCost],
    layers: Sequence[Layer],
    kind_of: Callable[[str], Kind],
    *,
    eager: Mapping[str, float] | None,
    fp32: Mapping[str, float] | None,
) -> tuple[LayerLatency, ...]:
    """Set the artifact's paths beside the baselines'.

    What only a baseline spends time on has a row too, with no kernels and 0 ms in the artifact.

    Args:
        paths: the artifact's, in order.
        layers: the static detector's, for the kinds.
        kind_of: the runtime's word on a kernel type.
        eager: by path, ms; None where it was not measured.
        fp32: likewise.
    """
    eager, fp32 = eager or {}, fp32 or {}
    nothing = PathCost(0.0, {})
    every = list(dict.fromkeys([*paths, *fp32, *eager]))
    rows = []
    for order, path in enumerate(every):
        cost, eager_ms = paths.get(path, nothing), eager.get(path)
        stage = stage_of(path)
        compared = bool(cost.kernels) and eager_ms
        rows.append(
            LayerLatency(
                order=order,
                path=path,
                stage=stage,
                kind=kind_of_path(path, stage, cost.kernels, layers, kind_of),
                kernels=tuple(_kernel_text(kernel, cost) for kernel in sorted(cost.kernels)),
                artifact_ms=cost.median_ms,
                eager_ms=eager_ms,
                fp32_ms=fp32.get(path),
                reduction_percent=100 * (1 - cost.median_ms / compared) if compared else None,
            )
        )
    return tuple(rows)


def _kernel_text(kernel: str, cost: PathCost) -> str:
    """Return a kernel type, with who shares the time of its kernels."""
    others = cost.others.get(kernel, ())
    if not others:
        return kernel
    who = others[0] + (f" and {len(others) - 1} more" if len(others) > 1 else "")
    return f"{kernel} (shared with {who})" if cost.kernels[kernel] else f"{kernel} (fused into {who})"


def kind_of_path(
    path: str,
    stage: Stage,
    kernels: Mapping[str, float],
    layers: Sequence[Layer],
    kind_of: Callable[[str], Kind],
) -> Kind:
    """Return the one kind of a path: its layer's, else that of the kernel type that costs most.

    Args:
        path: module path.
        stage: its stage; RoIAlign is RoIAlign, whatever kernels a target makes of it.
        kernels: cost of each kernel type, ms.
        layers: the static detector's.
        kind_of: the runtime's word on a kernel type.
    """
    declared = {layer.kind for layer in layers if layer.path == path}
    if len(declared) == 1:
        return declared.pop()
    if stage == "roi_align":
        return "roi_align"
    costs: defaultdict[Kind, float] = defaultdict(float)
    for kernel, cost_ms in kernels.items():
        kind = kind_of(kernel)
        if not declared or kind in declared:
            costs[kind] += cost_ms
    return max(costs, key=lambda kind: costs[kind]) if costs else "other"


def order_of(found: Sequence[str], layers: Sequence[Layer]) -> Callable[[str], tuple[int, int, int]]:
    """Return the sort key of paths: by stage, then as the detector runs them, then as the runtime does."""
    first: dict[str, int] = {}
    for layer in layers:
        first[layer.path] = min(layer.order, first.get(layer.path, layer.order))
    behind = max(first.values(), default=0) + 1
    return lambda path: (STAGES.index(stage_of(path)), first.get(path, behind), found.index(path))
