"""From steps to what runs: which steps are one segment, what goes in and out of it, and what runs after what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from qexport.plugins.executorch.steps import Constant, Kernel, Node, Region, Steps, Value, values_in


@dataclass(slots=True, eq=False)
class Segment:
    """An XNNPACK subgraph."""

    region: Region
    nodes: list[Node] = field(default_factory=list)
    inputs: list[Value] = field(default_factory=list)
    """From outside, constants excepted."""
    constants: list[Value] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    """What its nodes compute, in their order."""
    outputs: list[Value] = field(default_factory=list)
    """Those that something outside reads."""


def schedule(steps: Steps, results: Iterable[Value]) -> list[Segment | Kernel]:
    """Return segments and kernels in an order in which they can run: each segment as soon as it is complete.

    Steps that no result needs are left out.
    """
    return _Schedule(steps, list(results)).run()


class _Schedule:
    def __init__(self, steps: Steps, results: Sequence[Value]) -> None:
        self._results = results
        self._needed: set[Kernel | Node] = set()
        self._made: dict[Node, Value] = {}
        self._ask(results)
        self._order = [step for step in steps.order if step in self._needed]
        self._segments: dict[Region, Segment] = {}
        self._last: dict[Region, Node] = {}
        self._done: list[Segment | Kernel] = []
        self._placed: set[int] = set()

    def run(self) -> list[Segment | Kernel]:
        for step in self._order:
            if isinstance(step, Node):
                self._segments.setdefault(step.region, Segment(step.region)).nodes.append(step)
                self._last[step.region] = step
        for segment in self._segments.values():
            self._close(segment)
        self._find_outputs()
        for step in self._order:
            if isinstance(step, Kernel):
                self._place_kernel(step)
            elif self._last[step.region] is step:
                self._place_segment(self._segments[step.region])
        return self._done

    def _ask(self, values: Sequence[Value]) -> None:
        waiting = list(values)
        while waiting:
            value = waiting.pop()
            maker = value.maker
            if isinstance(maker, Node):
                self._made[maker] = value
            if isinstance(maker, (Kernel, Node)) and maker not in self._needed:
                self._needed.add(maker)
                waiting += values_in(maker.arguments if isinstance(maker, Kernel) else maker.inputs)

    def _close(self, segment: Segment) -> None:
        """Find what a segment reads from outside."""
        inputs: dict[Value, None] = {}
        constants: dict[Value, None] = {}
        for node in segment.nodes:
            segment.values.append(self._made[node])
            for value in node.inputs:
                own = isinstance(value.maker, Node) and value.maker.region == segment.region
                if not own:
                    (constants if isinstance(value.maker, Constant) else inputs)[value] = None
        segment.inputs += inputs
        segment.constants += constants

    def _find_outputs(self) -> None:
        """Find which values of a segment something outside reads."""
        asked = set(self._results)
        for step in self._order:
            if isinstance(step, Kernel):
                asked.update(values_in(step.arguments))
        for segment in self._segments.values():
            asked.update(segment.inputs)
        for segment in self._segments.values():
            segment.outputs += [value for value in segment.values if value in asked]

    def _place_kernel(self, step: Kernel) -> None:
        if id(step) in self._placed:
            return
        self._placed.add(id(step))
        for value in values_in(step.arguments):
            self._place_maker(value)
        self._done.append(step)

    def _place_segment(self, segment: Segment) -> None:
        if id(segment) in self._placed:
            return
        self._placed.add(id(segment))
        for value in segment.inputs:
            self._place_maker(value)
        self._done.append(segment)

    def _place_maker(self, value: Value) -> None:
        if isinstance(value.maker, Kernel):
            self._place_kernel(value.maker)
        elif isinstance(value.maker, Node):
            self._place_segment(self._segments[value.maker.region])
