"""What a file runs, read from its graph: parts that are called one after another, and their operators in order.

The file has one method, frame in and boxes out. Its parts are modules; each can be called by itself, with what the part
before it gave or with something else, which is how inner tensors are had without a second file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from qexport.errors import ArtifactError

CALL = "__call"
"""Before the number of a module's call in a part's path, `rpn.head.conv.0.0__call1`."""
OPERATOR = "__op_"
"""Before the name of an operator in the path of a part that is one, `backbone.body.layer1.0__op_add`."""
_PART = re.compile(rf"(?P<module>.*?)(?:{OPERATOR}\w+?)?(?:{CALL}\d+)?")


def tensor_name(path: str, place: int, several: int, call: int = 0) -> str:
    """Return the name of what a part gives.

    Args:
        path: of the part.
        place: among what it gives.
        several: how many it gives.
        call: of a part that is called several times.
    """
    return path + (f"@{call}" if call else "") + (f":{place}" if several > 1 else "")


def module_of(path: str) -> str:
    """Return the path of the detector's module that a part computes for."""
    found = _PART.fullmatch(path)
    assert found is not None  # every part of it may be empty
    return found["module"]


@dataclass(frozen=True, slots=True)
class Step:
    """One call of a part."""

    path: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Program:
    """A loaded file.

    Args:
        module: as `torch.jit.load` gives it.
        source: where it is from, for messages.

    Raises:
        ArtifactError: it does more than call parts: another model's file.
    """

    def __init__(self, module: Any, source: object) -> None:
        self._module, self._source = module, source
        graph = module.graph
        given = list(graph.inputs())[1:]
        if len(given) != 1:
            raise self._other(f"takes {len(given)} tensors")
        self.given = str(given[0].debugName())
        self.steps, self.results = self._read(graph)
        self.parts = {step.path: _at(module, step.path) for step in self.steps}

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of everything that parts give."""
        return tuple(name for step in self.steps for name in step.outputs)

    def run(self, given: Any) -> Iterator[tuple[str, Any, Callable[[Any], None]]]:
        """Run part by part; what a part gave can be replaced for all who read it, until the next is asked for.

        Yields:
            The name of what was given, the tensor, and what takes another in its place.
        """
        values = {self.given: given}
        for step in self.steps:
            made = self.parts[step.path](*(values[name] for name in step.inputs))
            values.update(zip(step.outputs, made if isinstance(made, tuple) else (made,), strict=True))
            for name in step.outputs:
                yield name, values[name], partial(values.__setitem__, name)

    def operators(self) -> list[tuple[str, ...]]:
        """Return the operators of each call in their order, without what only builds lists and tuples."""
        return [
            tuple(
                str(node.kind())
                for node in self.parts[step.path].inlined_graph.nodes()
                if not str(node.kind()).startswith("prim::")
            )
            for step in self.steps
        ]

    def _read(self, graph: Any) -> tuple[tuple[Step, ...], tuple[str, ...]]:
        """Return the calls, and the names of the results."""
        modules: dict[str, str] = {str(next(iter(graph.inputs())).debugName()): ""}
        names: dict[str, tuple[str, ...]] = {self.given: (self.given,)}
        numbers: dict[str, Any] = {}
        calls: Counter[str] = Counter()
        steps = []
        for node in graph.nodes():
            kind = str(node.kind())
            read = [str(value.debugName()) for value in node.inputs()]
            made = [str(value.debugName()) for value in node.outputs()]
            if kind == "prim::GetAttr" and read[0] in modules:
                modules[made[0]] = f"{modules[read[0]]}.{node.s('name')}".removeprefix(".")
            elif (
                kind == "prim::CallMethod" and read[0] in modules and all(name in names for name in read[1:])
            ):
                path = modules[read[0]]
                several = _width(next(iter(node.outputs())))
                outputs = tuple(tensor_name(path, place, several, calls[path]) for place in range(several))
                calls[path] += 1
                steps.append(Step(path, tuple(names[name][0] for name in read[1:]), outputs))
                names[made[0]] = outputs
            elif kind == "prim::Constant":
                numbers[made[0]] = node
            elif kind == "prim::TupleIndex" and read[0] in names and read[1] in numbers:
                names[made[0]] = (names[read[0]][int(numbers[read[1]].i("value"))],)
            elif kind == "prim::TupleUnpack" and read[0] in names:
                names.update(zip(made, ((name,) for name in names[read[0]]), strict=True))
            elif kind == "prim::TupleConstruct" and all(name in names for name in read):
                names[made[0]] = tuple(names[name][0] for name in read)
            else:
                raise self._other(f"has {kind} beside its parts")
        results = [name for value in graph.outputs() for name in names[str(value.debugName())]]
        return tuple(steps), tuple(results)

    def _other(self, why: str) -> ArtifactError:
        return ArtifactError(f"{self._source}: another model's file: it {why}. Export again.")


def _width(value: Any) -> int:
    """Return how many tensors a value of a graph is."""
    kind = value.type()
    return len(kind.elements()) if kind.kind() == "TupleType" else 1


def _at(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module
