"""A graph in parts: modules by their paths, and who hands what to whom.

Every node of the graph belongs to a part. A part that is one layer is PyTorch's module for it; of the others each
becomes a module with the operators that it has. No part holds another.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from qexport.errors import UnsupportedOperator
from qexport.runtimes.qnnpack_program import tensor_name


class Parts:
    """Collects the parts of a graph while it is written."""

    def __init__(self) -> None:
        self._graph = Graph()
        self.given = self._graph.placeholder("frame")
        self._owner: dict[Node, str] = {}
        self._modules: dict[str, nn.Module] = {}
        self._constants: dict[str, dict[str, Tensor]] = {}

    def call(
        self, owner: str, function: Callable[..., object], arguments: tuple[object, ...], **options: object
    ) -> Node:
        """Write an operator into a part; arguments are nodes, numbers and lists of them."""
        made = self._graph.call_function(function, arguments, options)  # type: ignore[arg-type]
        self._owner[made] = owner
        return made

    def constant(self, owner: str, name: str, value: Tensor) -> Node:
        """Write a constant into a part."""
        held = name.rpartition(".")[2]
        self._constants.setdefault(owner, {})[held] = value
        made = self._graph.get_attr(held)
        self._owner[made] = owner
        return made

    def module(self, path: str, module: nn.Module, source: Node) -> Node:
        """Write a layer, which is a part by itself; the same module may be called again."""
        self._modules.setdefault(path, module)
        made = self._graph.call_module(path, (source,))
        self._owner[made] = made.name
        return made

    def owner(self, node: Node) -> str:
        """Return the part of an operator; empty for a layer and for the input."""
        return "" if node.op in ("call_module", "placeholder") else self._owner[node]

    def finish(
        self, results: Sequence[Node], wanted: Mapping[str, Node]
    ) -> tuple[GraphModule, dict[str, str]]:
        """Return the whole as a module that calls its parts, and the name of every wanted value.

        Args:
            results: the outputs.
            wanted: values to be found again, by key.

        Raises:
            UnsupportedOperator: two parts need each other.
        """
        self._graph.output((tuple(results), tuple(wanted.values())))
        members: dict[str, list[Node]] = {}
        for node, owner in self._owner.items():
            if node.users:
                members.setdefault(owner, []).append(node)
        root, graph = nn.Module(), Graph()
        values, names = {self.given: graph.placeholder(self.given.name)}, dict[Node, str]()
        calls: dict[str, int] = {}
        for owner in self._in_order(members):
            nodes = members[owner]
            given = [node for node in nodes if self._leaves(node, owner)]
            path, module, read = self._part(owner, nodes, given)
            if path not in calls:
                _place(root, path, module)
            made = graph.call_module(path, tuple(values[node] for node in read))
            for place, node in enumerate(given):
                values[node] = (
                    made if len(given) == 1 else graph.call_function(operator.getitem, (made, place))
                )
                names[node] = tensor_name(path, place, len(given), calls.get(path, 0))
            calls[path] = calls.get(path, 0) + 1
        graph.output(tuple(values[node] for node in results))
        whole = GraphModule(root, graph, class_name="Detector")
        whole.eval().requires_grad_(False)
        return whole, {key: names[node] for key, node in wanted.items()}

    def _leaves(self, node: Node, owner: str) -> bool:
        """Tell whether others than its own part read a value."""
        return any(self._owner.get(user) != owner for user in node.users)

    def _in_order(self, members: Mapping[str, Sequence[Node]]) -> list[str]:
        """Return the parts so that each comes after those that it reads."""
        needs = {
            owner: {
                self._owner[each] for node in nodes for each in node.all_input_nodes if each in self._owner
            }
            - {owner}
            for owner, nodes in members.items()
        }
        order: dict[str, None] = {}
        while len(order) < len(needs):
            ready = [owner for owner in needs if owner not in order and needs[owner] <= order.keys()]
            if not ready:
                left = ", ".join(owner for owner in needs if owner not in order)
                raise UnsupportedOperator(
                    f"{left}: each reads what the others compute, so that they cannot run one after another. Separate "
                    "them in the model."
                )
            order.update(dict.fromkeys(ready))
        return list(order)

    def _part(
        self, owner: str, nodes: Sequence[Node], given: Sequence[Node]
    ) -> tuple[str, nn.Module, list[Node]]:
        """Return a part's path, its module, and what it reads from others."""
        if nodes[0].op == "call_module":
            path = str(nodes[0].target)
            return path, self._modules[path], nodes[0].all_input_nodes
        own, graph, copies = set(nodes), Graph(), dict[Node, Node]()
        read = list(dict.fromkeys(each for node in nodes for each in node.all_input_nodes if each not in own))
        for node in read:
            copies[node] = graph.placeholder(node.name)
        for node in nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(copies[given[0]] if len(given) == 1 else tuple(copies[node] for node in given))
        root = nn.Module()
        for name, value in self._constants.get(owner, {}).items():
            root.register_buffer(name, value)
        return owner, GraphModule(root, graph, class_name="Operators"), read


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    *above, name = path.split(".")
    place = root
    for part in above:
        if not hasattr(place, part):
            place.add_module(part, nn.Module())
        place = place.get_submodule(part)
    place.add_module(name, module)
