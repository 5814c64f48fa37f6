"""What LiteRT's profiler timed, by operators of the file, and to which modules these belong.

TFLite's own kernels are timed by operator. XNNPACK takes whole pieces of the graph and times its own nodes: it leaves
out operators that only rename memory, fuses padding and clamping, and adds nodes. Nodes stand in the order of their
operators; which belongs to which follows from what each can be. Where that leaves several answers, all are named.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

from qexport.errors import TargetUnavailable
from qexport.runtimes.runner import NOWHERE, KernelTime, ProfiledRun, SharedKernel
from qexport.runtimes.tflite_library import Operator, OperatorGraph
from qexport.runtimes.tflite_operators import ACTIVATIONS, ADDED, ADDED_BEHIND, LEFT_OUT, NODES
from qexport.runtimes.tflite_profiler import DELEGATE_NODE, Event, RecordedRun

_MOST_NODES = 6
"""Of one operator, unless it has more inputs."""


def path_of(name: str) -> str:
    """Return the module path in a tensor's name: `rpn.head.conv.0.0@3/CONV_2D` to `rpn.head.conv.0.0`."""
    return name.partition("/")[0].partition("@")[0]


def owners_of_operators(graph: OperatorGraph, rows: Collection[str] | None = None) -> dict[str, str]:
    """Return the module path of every operator, by its name.

    What has no path, as an output of the model, and an activation that is not among `rows` go to what they act on.

    Args:
        graph: of the file.
        rows: for a baseline: the artifact's paths.
    """
    makers = {tensor: operator for operator in graph.operators for tensor in operator.outputs}
    owners = {}
    for operator in graph.operators:
        at = operator
        while "/" not in at.name or (
            rows is not None and at.code in ACTIVATIONS and path_of(at.name) not in rows
        ):
            before = [makers[tensor] for tensor in at.inputs if tensor in makers]
            if not before:
                break
            at = before[0]
        owners[operator.name] = path_of(at.name) if "/" in at.name else NOWHERE
    return owners


@dataclass(frozen=True, slots=True)
class Timeline:
    """To which operators each event of a run belongs."""

    graph: OperatorGraph
    places: tuple[tuple[Operator, ...], ...]
    """By event: its operator, or all that it can belong to."""
    events: tuple[Event, ...]
    """Of the run that it was made from."""

    @property
    def names(self) -> tuple[str, ...]:
        """By event, the name of its kernel."""
        return tuple(_name(place) for place in self.places)

    def owners(self, rows: Collection[str] | None = None) -> dict[str, str | SharedKernel]:
        """Return the module path, or the several, of every kernel, and of every operator, by name."""
        single = owners_of_operators(self.graph, rows)
        found: dict[str, str | SharedKernel] = dict(single)
        for place in self.places:
            paths = tuple(dict.fromkeys(single[operator.name] for operator in place))
            found[_name(place)] = paths[0] if len(paths) == 1 else SharedKernel(paths, by_macs=True)
        return found

    def profiled(self, run: RecordedRun) -> ProfiledRun:
        """Return a run by kernels.

        Raises:
            TargetUnavailable: it ran other kernels than the first.
        """
        if [_identity(event) for event in run.events] != [_identity(event) for event in self.events]:
            raise TargetUnavailable(
                f"LiteRT's profiler named {len(run.events)} operators in one run and {len(self.events)} others in the "
                "first: they cannot be summed."
            )
        times = zip(self.names, run.events, strict=True)
        return ProfiledRun(
            run.whole_ms, tuple(KernelTime(name, event.tag, event.duration_ms) for name, event in times)
        )


def make_timeline(graph: OperatorGraph, run: RecordedRun) -> Timeline:
    """Say which operators each event of a run belongs to.

    Args:
        graph: of the file.
        run: with the kernels that the graph was read with.

    Raises:
        TargetUnavailable: the events are not those of this graph.
    """
    places: list[tuple[Operator, ...]] = []
    seen, pieces = set(), 0
    for group in _groups(run.events):
        if group[0].type == DELEGATE_NODE:
            if pieces < len(graph.partitions):
                members = [graph.operators[index] for index in graph.partitions[pieces]]
                places.extend(place_nodes(members, [event.tag for event in group]))
            pieces += 1
            continue
        index = group[0].index
        if index >= len(graph.operators) or graph.operators[index].code != group[0].tag or index in seen:
            raise TargetUnavailable(
                f"LiteRT's profiler timed {group[0].tag} as operator {index}, which the file has not or has as another."
            )
        seen.add(index)
        places.append((graph.operators[index],))
    taken = {index for partition in graph.partitions for index in partition}
    if pieces != len(graph.partitions) or seen | taken != set(range(len(graph.operators))) or seen & taken:
        raise TargetUnavailable(
            f"LiteRT's profiler timed {len(seen)} operators and {pieces} pieces of XNNPACK's; the interpreter has "
            f"{len(graph.operators) - len(taken)} and {len(graph.partitions)}."
        )
    return Timeline(graph, tuple(places), run.events)


def place_nodes(operators: Sequence[Operator], nodes: Sequence[str]) -> list[tuple[Operator, ...]]:
    """Return for each node of a piece of the graph the operators that it can belong to.

    Of all ways to deal the nodes out in order, those that leave out and add the fewest are taken. Where there is none,
    every node can belong to every operator.

    Args:
        operators: of the piece, in their order.
        nodes: names, in the order in which XNNPACK runs them.
    """
    steps = _steps(operators, nodes)
    last = (len(operators), len(nodes))
    ahead: dict[tuple[int, int], int] = {(0, 0): 0}
    for at in sorted(steps):
        if at in ahead:
            for end, cost in steps[at].items():
                ahead[end] = min(ahead.get(end, ahead[at] + cost), ahead[at] + cost)
    back: dict[tuple[int, int], int] = {last: 0}
    for at in sorted(steps, reverse=True):
        costs = [cost + back[end] for end, cost in steps[at].items() if end in back]
        if costs:
            back[at] = min(costs)
    if last not in ahead:
        return [tuple(operators)] * len(nodes)
    found: list[list[Operator]] = [[] for _ in nodes]
    for at in sorted(steps):
        for end, cost in steps[at].items():
            if at in ahead and end in back and ahead[at] + cost + back[end] == ahead[last]:
                for node in range(at[1], end[1]):
                    found[node].append(operators[at[0]])
    return [tuple({operator.index: operator for operator in place}.values()) for place in found]


def _steps(
    operators: Sequence[Operator], nodes: Sequence[str]
) -> dict[tuple[int, int], dict[tuple[int, int], int]]:
    """By (operators, nodes) that are dealt with: where one more operator leads to, and at what cost."""
    steps: dict[tuple[int, int], dict[tuple[int, int], int]] = {}
    for first, operator in enumerate(operators):
        for start in range(len(nodes) + 1):
            ways = steps.setdefault((first, start), {})
            if operator.code in LEFT_OUT:
                ways[(first + 1, start)] = 1
            most = max(_MOST_NODES, len(operator.inputs))
            for end in range(start + 1, min(start + most, len(nodes)) + 1):
                if _can_be(operator, nodes[start:end]):
                    ways[(first + 1, end)] = end - start - 1
    return steps


def _can_be(operator: Operator, nodes: Sequence[str]) -> bool:
    own = NODES.get(operator.code, ())
    allowed: tuple[str, ...] = ADDED
    found = False
    for node in nodes:
        if node.startswith(own):
            found, allowed = True, (*ADDED, *ADDED_BEHIND)
        elif not node.startswith(allowed):
            return False
    return found


def _groups(events: Sequence[Event]) -> list[list[Event]]:
    """Return operators one by one, and nodes of XNNPACK's by piece of the graph: there they are numbered from 0."""
    if not events:
        return []
    groups = [[events[0]]]
    for before, event in pairwise(events):
        both = before.type == event.type == DELEGATE_NODE
        if both and event.index == before.index + 1:
            groups[-1].append(event)
        else:
            groups.append([event])
    return groups


def _name(place: Sequence[Operator]) -> str:
    return place[0].name if len(place) == 1 else " | ".join(operator.name for operator in place)


def _identity(event: Event) -> tuple[str, int, int]:
    return event.tag, event.type, event.index
