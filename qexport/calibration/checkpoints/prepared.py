"""The user's prepared model: to which tensor each numbered fake quantizer of a graph belongs."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qexport.calibration.checkpoints.ranges import Port, name_some
from qexport.detectors.factory import build_from_file, build_from_package
from qexport.errors import CheckpointError
from qexport.quantization.graph import op_name, site_of

_NAMES = {"iadd": "add", "imul": "mul", "interpolate": "upsample_nearest2d", "add_relu": "add"}
_ACTIVATIONS = ("relu", "relu6", "hardtanh", "clamp")
_ACTIVATION_MODULES = (nn.ReLU, nn.ReLU6, nn.Hardtanh)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a fake quantizer stands."""

    path: str
    port: Port
    call: int | None = None
    op: str = ""
    includes_norm: bool = False


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a prepared model says of its fake quantizers, by name."""

    places: Mapping[str, tuple[Place, ...]]
    codes: Mapping[str, tuple[int, int]]
    """Smallest and largest code."""


def load_prepared(source: str, state: Mapping[str, Tensor], path: Path) -> Prepared:
    """Run the user's function, load the state dict into what it gives, and walk it.

    Args:
        source: `file.py:function` or `package.module:function`; the user's code is run.
        state: of the checkpoint.
        path: of the checkpoint.

    Raises:
        CheckpointError: the function is missing or fails, or builds another model.
    """
    place, _, name = source.rpartition(":")
    if not place or not name:
        raise CheckpointError(f"--qat-prepare {source}: expected FILE:FUNCTION, as in qat.py:prepare.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces its end in every call
        if place.endswith(".py"):
            if not Path(place).is_file():
                raise CheckpointError(f"--qat-prepare {source}: there is no file {place}.")
            model, _ = build_from_file(Path(place), name, source)
        else:
            model, _ = build_from_package(place, name, source)
        if not isinstance(model, nn.Module):
            raise CheckpointError(
                f"--qat-prepare {source}: the function returned a {type(model).__name__}, expected the prepared model."
            )
        _load(model, state, source, path)
    places: dict[str, tuple[Place, ...]] = {}
    for prefix, part in model.named_modules(remove_duplicate=False):
        if isinstance(part, GraphModule):
            places.update(_walk(part, f"{prefix}." if prefix else ""))
    codes = {
        name: (int(part.quant_min), int(part.quant_max))
        for name, part in model.named_modules(remove_duplicate=False)
        if _is_fake_quant(part)
    }
    return Prepared(places, codes)


def _load(model: nn.Module, state: Mapping[str, Tensor], source: str, path: Path) -> None:
    try:
        result = model.load_state_dict(dict(state), strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(
            f"--qat-prepare {source}: {path} does not fit the model that it builds: {reason} "
            "Give the function that prepared the model for training."
        ) from error
    for kind, keys in (("lacks", result.missing_keys), ("has", result.unexpected_keys)):
        if keys:
            raise CheckpointError(
                f"--qat-prepare {source}: builds another model than {path} was saved from: the checkpoint {kind} "
                f"{len(keys)} keys{' beside it' if kind == 'has' else ''}: {name_some(list(keys))}. Give the function "
                "that prepared the model for training, with the same quantizer configuration."
            )


def _is_fake_quant(part: object) -> bool:
    return hasattr(part, "fake_quant_enabled") and hasattr(part, "quant_min") and hasattr(part, "quant_max")


def _walk(graph: GraphModule, prefix: str) -> Iterator[tuple[str, tuple[Place, ...]]]:
    """Yield the places of each fake quantizer of a prepared graph."""
    modules = dict(graph.named_modules(remove_duplicate=False))
    scopes = _Scopes(graph, modules)
    for node in graph.graph.nodes:
        if node.op != "call_module" or not _is_fake_quant(modules.get(str(node.target))):
            continue
        found = tuple(
            Place(prefix + place.path, place.port, place.call, place.op, place.includes_norm)
            for place in scopes.places(node)
        )
        yield f"{prefix}{node.target}", found


class _Scopes:
    """The module, call and operator of every node of one prepared graph, FX's or PT2E's."""

    def __init__(self, graph: GraphModule, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        attributes = graph.meta.get("_observed_graph_module_attrs")
        self._scope_of: Mapping[str, Any] = attributes.node_name_to_scope if attributes is not None else {}
        self._sites: dict[Node, tuple[str, int | None, str]] = {}
        self._name_all(graph)

    def places(self, quantizer: Node) -> Iterator[Place]:
        """Yield what a fake quantizer stands for: a weight, an output, or the input of who reads it."""
        watched = quantizer.args[0]
        assert isinstance(watched, Node)  # a fake quantizer reads one tensor
        weight = self._weight_of(watched)
        if weight is not None:
            yield Place(weight, "weight", includes_norm=watched.op != "get_attr")
            return
        if watched.op == "placeholder":
            for user in quantizer.users:
                path, call, _ = self._sites.get(user, ("", None, ""))
                yield Place(path, "input", call)
            return
        path, call, op = self._sites[self._before_activation(watched)]
        module = self._modules.get(path)
        yield Place(path, "output", call, op, includes_norm=hasattr(module, "bn"))

    def _weight_of(self, watched: Node) -> str | None:
        """Return the path of the layer whose weight this is, as it is or scaled by its BatchNorm."""
        source = watched
        if op_name(watched) == "mul" and isinstance(watched.args[0], Node):
            source = watched.args[0]
        if source.op == "get_attr" and str(source.target).endswith(".weight"):
            return str(source.target).removesuffix(".weight")
        return None

    def _before_activation(self, node: Node) -> Node:
        """Return the operator that an activation is fused into: nothing between the two is quantized."""
        while self._is_activation(node) and node.args and isinstance(node.args[0], Node):
            if node.args[0].op == "placeholder" or _is_fake_quant(
                self._modules.get(str(node.args[0].target))
            ):
                break
            node = node.args[0]
        return node

    def _is_activation(self, node: Node) -> bool:
        if node.op == "call_module":
            return isinstance(self._modules.get(str(node.target)), _ACTIVATION_MODULES)
        return _operator(node) in _ACTIVATIONS

    def _name_all(self, graph: GraphModule) -> None:
        calls: Counter[str] = Counter()
        operators: Counter[tuple[str, int | None, str]] = Counter()
        totals = Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_module")
        scopes = {node: self._scope(node) for node in graph.graph.nodes}
        again = {path for path, call in scopes.values() if call}
        for node in graph.graph.nodes:
            if node.op == "call_module":
                target = str(node.target)
                self._sites[node] = (target, calls[target] if totals[target] > 1 else None, "")
                calls[target] += 1
            elif node.op in ("call_function", "call_method"):
                path, call = scopes[node]
                op = _operator(node)
                index = operators[path, call, op]
                operators[path, call, op] += 1
                self._sites[node] = (
                    path,
                    call if path in again else None,
                    op + (f"#{index}" if index else ""),
                )

    def _scope(self, node: Node) -> tuple[str, int | None]:
        # PT2E fills this table too, with the last part of the path only; its nodes have the whole path.
        if node.name in self._scope_of and not op_name(node):
            return str(self._scope_of[node.name][0]), None
        site = site_of(node)
        return site.path, site.call


def _operator(node: Node) -> str:
    """Return the operator's name as the exported graph has it: `add` for `operator.iadd` and for `aten.add_`."""
    name = op_name(node) or (
        node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    )
    name = name.removesuffix("_")
    return _NAMES.get(name, name)
