"""Find the fastest configuration whose accuracy stays inside a budget, with few measurements of accuracy.

Measuring mAP is dear, signal to noise is cheap. So noise decides in which order units become float, greedily: each
time the one that takes away most noise for the time that it costs. Along that order the number of float units is
found by bisection on mAP, and then each of them is tried in int8 again, the dearest first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import Node

from qexport.benchmarks.sensitivity import Noise, Unit
from qexport.quantization.local import proposals_node
from qexport.quantization.partial import PartlyQuantized, Values
from qexport.quantization.reference import QuantizedDetector
from qexport.sensitivity_results import Point

Evaluate = Callable[[Sequence[Unit]], Point]
"""Measures the accuracy with these units in float."""


@dataclass(frozen=True, slots=True)
class Search:
    """What a search came to."""

    points: tuple[Point, ...]
    """In the order in which they were measured, each once; the first is all int8."""
    chosen: int | None
    """The cheapest one inside the budget; None where even all units in float are outside."""


def order_units(
    quantized: QuantizedDetector,
    partly: PartlyQuantized,
    units: Sequence[Unit],
    frames: Sequence[NDArray[np.generic]],
    costs: Mapping[str, float],
    *,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[Unit, ...]:
    """Return the units in the order in which they should become float.

    Args:
        quantized: the detector with all of its rows.
        partly: the same, with rows to switch.
        units: what to order.
        frames: what the static detector takes; few suffice.
        costs: what a unit costs in float, by its name, above zero.
        on_step: called after each unit that is placed.
    """
    pinned, outputs = proposals_node(quantized.graph), partly.head_outputs()
    given = [torch.from_numpy(frame) for frame in frames]
    floats = [partly.run(frame, frozenset()) for frame in given]
    keys = partly.keys
    current = [partly.rerun(values, frozenset(), keys, pinned={pinned}) for values in floats]
    left, order = list(units), list[Unit]()
    while left:
        ratios = {}
        now = _ratio(outputs, floats, current)
        for unit in left:
            kept = partly.keys_with([pattern for one in (*order, unit) for pattern in one.patterns])[0]
            tried = [partly.rerun(values, keys, kept, pinned={pinned}) for values in current]
            ratios[unit.name] = (now - _ratio(outputs, floats, tried)) / costs[unit.name]
        best = max(left, key=lambda unit: ratios[unit.name])
        order.append(best)
        left.remove(best)
        kept = partly.keys_with([pattern for one in order for pattern in one.patterns])[0]
        current = [partly.rerun(values, keys, kept, pinned={pinned}) for values in current]
        keys = kept
        on_step()
    return tuple(order)


def search(
    order: Sequence[Unit], costs: Mapping[str, float], evaluate: Evaluate, *, max_drop: float
) -> Search:
    """Find the cheapest configuration inside the budget.

    Args:
        order: the units, as `order_units` gives them.
        costs: what a unit costs in float, by its name.
        evaluate: measures one configuration.
        max_drop: the budget, as a fraction of mAP.
    """
    measured: dict[frozenset[str], Point] = {}

    def keeps(units: Sequence[Unit]) -> bool:
        names = frozenset(unit.name for unit in units)
        if names not in measured:
            measured[names] = evaluate(units)
        return measured[names].drop <= max_drop

    found: list[Unit] | None = [] if keeps([]) else None
    if found is None and keeps(order):
        low, high = 0, len(order)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if keeps(order[:middle]) else (middle, high)
        found = _trimmed(order[:high], costs, keeps)
    points = tuple(measured.values())
    if found is None:
        return Search(points, None)
    return Search(points, list(measured).index(frozenset(unit.name for unit in found)))


def _trimmed(
    found: Sequence[Unit], costs: Mapping[str, float], keeps: Callable[[Sequence[Unit]], bool]
) -> list[Unit]:
    """Return the units without those, the dearest first, that the budget does not need in float.

    What was needed beside others may not be once they are gone: mAP does not fall steadily with each unit.
    """
    kept, before = list(found), len(found) + 1
    while len(kept) < before:
        before = len(kept)
        for unit in sorted(kept, key=lambda one: -costs[one.name]):
            fewer = [one for one in kept if one is not unit]
            if keeps(fewer):
                kept = fewer
    return kept


def _ratio(outputs: Mapping[str, Sequence[Node]], floats: Sequence[Values], tried: Sequence[Values]) -> float:
    noise = Noise(outputs)
    for reference, actual in zip(floats, tried, strict=True):
        noise.add(reference=reference, actual=actual)
    return noise.ratio
