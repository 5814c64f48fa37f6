"""Evaluate a TensorRT network in torch, layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qexport.emulation.tensorrt_layers import COMPUTE
from qexport.errors import ArtifactError, UnsupportedOperator
from qexport.runtimes.tensorrt_network import Network, NetworkLayer

_LOOP_KINDS = ("TRIP_LIMIT", "RECURRENCE", "LOOP_OUTPUT")
_MOST_TURNS = 2**31 - 1
_NOTHING = torch.empty(0)


@dataclass(slots=True)
class _Loop:
    """A loop: what it holds from turn to turn, when it ends, what it gives."""

    recurrences: list[NetworkLayer] = field(default_factory=list)
    limits: list[NetworkLayer] = field(default_factory=list)
    results: list[NetworkLayer] = field(default_factory=list)
    body: list[NetworkLayer] = field(default_factory=list)
    """Layers that depend on what the loop holds, in order of execution."""

    def outputs(self) -> list[str]:
        return [name for layer in self.results for name in layer.outputs]

    def outer_inputs(self) -> set[str]:
        """Return what the loop reads from outside."""
        inside = {name for layer in (*self.body, *self.recurrences) for name in layer.outputs}
        every = {
            name
            for layer in (*self.body, *self.recurrences, *self.limits, *self.results)
            for name in layer.inputs
            if name
        }
        return every - inside


class EvaluatedNetwork:
    """A network that can be run on a CPU.

    What depends on constants alone (quantized weights) is computed once.

    Raises:
        UnsupportedOperator: a layer kind that has no evaluation.
    """

    def __init__(self, network: Network) -> None:
        unknown = [
            layer
            for layer in network.described.layers
            if layer.kind not in COMPUTE and layer.kind not in _LOOP_KINDS
        ]
        if unknown:
            raise UnsupportedOperator(
                f"layer {unknown[0].name} of kind {unknown[0].kind} has no evaluation on a CPU; "
                "run the engine on a GPU, or choose another form of the operator."
            )
        self.inputs = [tensor.name for tensor in network.described.inputs]
        self.outputs = [tensor.name for tensor in network.described.outputs]
        self._own = {
            layer.name: {
                name.partition("/")[2]: torch.from_numpy(network.arrays[name].copy()) for name in layer.arrays
            }
            for layer in network.described.layers
            if layer.arrays
        }
        self._steps = _in_order(network.described.layers, set(self.inputs))
        self._makers = {
            name: step
            for step in self._steps
            for name in (step.outputs() if isinstance(step, _Loop) else step.outputs)
        }
        self._constants: dict[str, Tensor] = {}
        self._fold()

    def run(self, feeds: Mapping[str, Tensor], wanted: Iterable[str] = ()) -> dict[str, Tensor]:
        """Return the outputs and the wanted tensors, by name.

        Raises:
            ArtifactError: an input is missing, or a wanted tensor is not in the network.
        """
        asked = [*self.outputs, *wanted]
        self._check(feeds, asked)
        needed = self._needed(asked)
        steps = [step for step in self._steps if id(step) in needed]
        uses = Counter(name for step in steps for name in _reads(step))
        uses.update(asked)
        values: dict[str, Tensor] = {**self._constants, **feeds}
        with torch.no_grad():
            for step in steps:
                values.update(self._evaluate(step, values))
                for name in _reads(step):
                    uses[name] -= 1
                    if not uses[name] and name not in self._constants:
                        values.pop(name, None)
        return {name: values[name] for name in asked}

    def run_forced(
        self, feeds: Mapping[str, Tensor], given: Mapping[str, Tensor], asked: Collection[str]
    ) -> dict[str, Tensor]:
        """Return what the layers that write tensors compute, each from tensors that are given.

        Args:
            feeds: the inputs.
            given: tensors whose readers see these values, whatever was computed.
            asked: those of them that are returned as they were computed.

        Raises:
            ArtifactError: an input is missing, or a tensor is not in the network.
        """
        self._check(feeds, given)
        needed = self._needed(asked, given)
        values: dict[str, Tensor] = {**self._constants, **feeds, **given}
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            for step in self._steps:
                if id(step) in needed:
                    computed = self._evaluate(step, values)
                    found.update((name, computed[name]) for name in computed if name in asked)
                    values.update((name, computed[name]) for name in computed if name not in given)
        return found

    def _check(self, feeds: Mapping[str, Tensor], asked: Iterable[str]) -> None:
        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise ArtifactError(
                f"the network takes {', '.join(self.inputs)}; not given: {', '.join(missing)}"
            )
        for name in asked:
            if name not in self._makers and name not in self._constants and name not in feeds:
                raise ArtifactError(f"the network has no tensor {name!r}: export again")

    def _needed(self, asked: Iterable[str], given: Collection[str] = ()) -> set[int]:
        needed: set[int] = set()
        waiting = list(asked)
        while waiting:
            step = self._makers.get(waiting.pop())
            if step is not None and id(step) not in needed:
                needed.add(id(step))
                waiting += [name for name in _reads(step) if name not in given]
        return needed

    def _fold(self) -> None:
        """Compute everything that depends on no input, and drop those steps."""
        left: list[NetworkLayer | _Loop] = []
        with torch.no_grad():
            for step in self._steps:
                if isinstance(step, NetworkLayer) and all(name in self._constants for name in _reads(step)):
                    self._constants.update(self._evaluate(step, self._constants))
                else:
                    left.append(step)
        self._steps = left
        read = {name for step in left for name in _reads(step)} | set(self.outputs)
        self._constants = {name: value for name, value in self._constants.items() if name in read}

    def _evaluate(self, step: NetworkLayer | _Loop, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if isinstance(step, _Loop):
            return self._run_loop(step, values)
        given = [values[name] if name else _NOTHING for name in step.inputs]
        result = COMPUTE[step.kind](step, given, self._own.get(step.name, {}))
        results = result if isinstance(result, tuple) else (result,)
        return dict(zip(step.outputs, results, strict=True))

    def _run_loop(self, loop: _Loop, outer: Mapping[str, Tensor]) -> dict[str, Tensor]:
        held = {layer.outputs[0]: outer[layer.inputs[0]] for layer in loop.recurrences}
        turns = min(
            (int(outer[limit.inputs[0]]) for limit in loop.limits if limit.attributes["kind"] == "COUNT"),
            default=_MOST_TURNS,
        )
        going = [limit.inputs[0] for limit in loop.limits if limit.attributes["kind"] == "WHILE"]
        for _ in range(turns):
            values: dict[str, Tensor] = {**outer, **held}
            if not all(bool(values[name]) for name in going if name in values):
                break
            for layer in loop.body:
                values.update(self._evaluate(layer, values))
            held = {layer.outputs[0]: values[layer.inputs[1]] for layer in loop.recurrences}
        return {layer.outputs[0]: held[layer.inputs[0]] for layer in loop.results}


def _reads(step: NetworkLayer | _Loop) -> set[str]:
    return step.outer_inputs() if isinstance(step, _Loop) else {name for name in step.inputs if name}


def _in_order(layers: Iterable[NetworkLayer], inputs: set[str]) -> list[NetworkLayer | _Loop]:
    """Return the layers in an order in which each finds its inputs; a loop is one step."""
    every = list(layers)
    loops: dict[str, _Loop] = {}
    for layer in every:
        if layer.kind in _LOOP_KINDS:
            loop = loops.setdefault(str(layer.attributes["loop"]), _Loop())
            kind = {"RECURRENCE": loop.recurrences, "TRIP_LIMIT": loop.limits, "LOOP_OUTPUT": loop.results}
            kind[layer.kind].append(layer)
            if layer.kind == "LOOP_OUTPUT" and layer.attributes["kind"] != "LAST_VALUE":
                raise UnsupportedOperator(
                    f"loop output {layer.name} collects every turn, which has no evaluation"
                )
    plain = [layer for layer in every if layer.kind not in _LOOP_KINDS]
    inside: set[str] = set()
    for loop in loops.values():
        known = {layer.outputs[0] for layer in loop.recurrences}
        known_before = -1
        members: dict[str, NetworkLayer] = {}
        while known_before != len(known):  # layers may be listed before what they read
            known_before = len(known)
            for layer in plain:
                if layer.name not in members and any(name in known for name in layer.inputs):
                    members[layer.name] = layer
                    known.update(layer.outputs)
        inside |= members.keys()
        held = {layer.outputs[0] for layer in loop.recurrences}
        outside = {name for member in members.values() for name in member.inputs if name} - known
        loop.body = [
            step for step in _sorted(list(members.values()), held | outside) if isinstance(step, NetworkLayer)
        ]
    steps: list[NetworkLayer | _Loop] = [layer for layer in plain if layer.name not in inside]
    return _sorted([*steps, *loops.values()], inputs)


def _sorted(
    steps: list[NetworkLayer | _Loop] | list[NetworkLayer], given: set[str]
) -> list[NetworkLayer | _Loop]:
    known, waiting = set(given), list(steps)
    ordered: list[NetworkLayer | _Loop] = []
    while waiting:
        rest: list[NetworkLayer | _Loop] = []
        for step in waiting:
            if _reads(step) <= known:
                ordered.append(step)
                known.update(step.outputs() if isinstance(step, _Loop) else step.outputs)
            else:
                rest.append(step)
        if len(rest) == len(waiting):
            names = [step.name for step in rest if isinstance(step, NetworkLayer)][:3]
            raise ArtifactError(f"layers that read what no layer makes: {', '.join(names)}. Export again.")
        waiting = rest
    return ordered
