"""Choose an observer for every tensor by the error of what reads it, on frames that no observer saw.

The squared error of a tensor itself is a poor judge: it spares the many small values and clips the few large ones,
which in a detector are the objects. So each candidate's range is judged by what the layers that read the tensor
compute of it, against what they compute of the float tensor. Another range than min-max's has to win on every frame and
by `MARGIN_DB`. Tensors that box arithmetic reads, logits and box deltas, keep min-max: of these the largest values
decide. At last each stage's choices are tried at the heads' outputs, all else in int8 too, and left where they lose.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from qexport.encodings import ACTIVATION_RANGE, WEIGHT_RANGE
from qexport.layers import STAGES, Stage, stage_of
from qexport.observer_results import MIN_MAX, ObserverReport, StageChoice, TensorChoice
from qexport.quantization.graph import ACTIVATIONS, FUSES_ACTIVATION, argument_node, base_of, op_name, site_of
from qexport.quantization.local import proposals_node
from qexport.quantization.observers import MagnitudeHistogram, SymmetricObserver
from qexport.quantization.quantizer import QUANTIZED_STAGES, SAME_SCALE
from qexport.settings import ObserverName

MARGIN_DB = 0.5
"""What another observer than min-max has to give at least."""
HELD_OUT = 8
"""Frames that the errors are measured on, at most."""
_EVERY = 4
_CANDIDATES: dict[str, tuple[ObserverName, float]] = {
    MIN_MAX: ("min-max", 100.0),
    "percentile 99.999": ("percentile", 99.999),
    "percentile 99.99": ("percentile", 99.99),
    "mse": ("mse", 100.0),
}
_Variant: TypeAlias = tuple[str, str]
"""A tensor's key, and the observer that it is quantized by."""


def is_held_out(place: int) -> bool:
    """Tell whether a frame is measured on, by its place among all of them: every fourth, until there are enough."""
    return place % _EVERY == 1 and place // _EVERY < HELD_OUT


@dataclass(slots=True)
class Tensors:
    """The watched graph, and its observers by the key of the first tensor that each watches.

    Args:
        graph: prepared by torchao, the observers have seen frames.
        activations: by key; tensors of one scale have one observer.
        fixed: scales that come from elsewhere and are not chosen, by key.
    """

    graph: GraphModule
    activations: Sequence[tuple[str, SymmetricObserver]]
    fixed: Mapping[str, float] = field(default_factory=dict)
    observers: dict[str, MagnitudeHistogram] = field(init=False, default_factory=dict)
    key_of: dict[int, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for key, observer in self.activations:
            assert isinstance(observer, MagnitudeHistogram)
            if id(observer) not in self.key_of:
                self.key_of[id(observer)] = key
                self.observers[key] = observer

    def key_at(self, node: Node) -> str:
        """Return the key of the tensor that a node watches; empty for any other node, and for a weight's."""
        if node.op != "call_module":
            return ""
        return self.key_of.get(id(self.graph.get_submodule(str(node.target))), "")

    def is_head(self, node: Node) -> bool:
        """Tell whether box arithmetic reads what a node watches."""
        return bool(self.key_at(node)) and any(
            stage_of(site_of(user).path) not in QUANTIZED_STAGES for user in node.users
        )


def choose_observers(
    tensors: Tensors, frames: Sequence[NDArray[np.generic]], *, images: int
) -> ObserverReport:
    """Let every observer take the method that its readers lose least by.

    Args:
        tensors: their observers have seen other frames; `choose` is called on them.
        frames: to measure on.
        images: that the observers have seen.
    """
    scales = _candidates(tensors)
    heads = frozenset(tensors.key_at(node) for node in tensors.graph.graph.nodes if tensors.is_head(node))
    tried = {key: own for key, own in scales.items() if len(own) > 1 and key not in heads}
    errors = _Errors(tensors, tried)
    with torch.no_grad():
        for frame in frames:
            errors.add(torch.from_numpy(frame))
        best = {key: errors.best(key) for key in tried}
        stages, chosen, around = take_stages(tensors, scales, best, frames)
    for key, observer in tensors.observers.items():
        observer.method, observer.percentile = _CANDIDATES[chosen.get(key, MIN_MAX)]
    return ObserverReport(
        images=images,
        held_out=len(frames),
        min_max_db=around[0],
        chosen_db=around[1],
        stages=stages,
        tensors=tuple(
            TensorChoice(
                key=key,
                sqnr_db=errors.table(key) if key in tried else {},
                best=best.get(key, MIN_MAX),
                chosen=chosen.get(key, MIN_MAX),
                why=_why(key, scales, heads, best, chosen),
            )
            for key in tensors.observers
            if key not in tensors.fixed
        ),
    )


def _candidates(tensors: Tensors) -> dict[str, dict[str, float]]:
    """Return the scales that the observers would choose, by key and observer; equal ones once."""
    found: dict[str, dict[str, float]] = {}
    for key, observer in tensors.observers.items():
        own = found.setdefault(key, {})
        if key in tensors.fixed:
            own[MIN_MAX] = tensors.fixed[key]
            continue
        for name, (method, percentile) in _CANDIDATES.items():
            scale = float(observer.scale_by(method, percentile))
            if math.isfinite(scale) and scale not in own.values():
                own[name] = scale
    return found


def _why(
    key: str,
    scales: Mapping[str, Mapping[str, float]],
    heads: frozenset[str],
    best: Mapping[str, str],
    chosen: Mapping[str, str],
) -> str:
    if key in heads:
        return "box arithmetic reads it: the largest values decide"
    if len(scales[key]) < 2:
        return "all observers come to one range"
    if best[key] != chosen.get(key, MIN_MAX):
        return "the choices of its stage lose at the heads"
    return f"no gain of {MARGIN_DB:g} dB on every image" if best[key] == MIN_MAX else ""


class _Errors(Interpreter):
    """Runs the float graph, and beside it every reader of a tensor on what each candidate makes of the tensor.

    Nothing but one frame's tensors is held, and what stands beside them goes with its last reader.
    """

    def __init__(self, tensors: Tensors, tried: Mapping[str, Mapping[str, float]]) -> None:
        super().__init__(tensors.graph)
        self._tensors, self._tried = tensors, tried
        self._beside: dict[Node, dict[_Variant, Any]] = {}
        self._ratios: dict[_Variant, list[float]] = {(key, name): [] for key in tried for name in tried[key]}

    def add(self, frame: Tensor) -> None:
        """Measure on one frame."""
        for ratios in self._ratios.values():
            ratios.append(0.0)
        self._beside = {}
        self.run(frame)

    def run_node(self, n: Node) -> Any:
        """Run one node, and its forms beside it; a watcher watches nothing."""
        if n.op == "call_module":
            result = self.env[argument_node(n)]
            self._beside[n] = self._quantized(n, result)
        else:
            result = super().run_node(n)
            self._compare(n, result)
        for read in self.user_to_last_uses.get(n, ()):
            self._beside.pop(read, None)
        return result

    def _quantized(self, node: Node, value: Tensor) -> dict[_Variant, Any]:
        key = self._tensors.key_at(node)
        own = {(key, name): value for name in self._tried.get(key, ())}
        # An operator that only moves values hands on what was quantized before it.
        moved = {
            variant: other
            for variant, other in self._beside.get(argument_node(node), {}).items()
            if variant in own
        }
        return {
            variant: _fake_quantized(other, self._tried[key][variant[1]])
            for variant, other in {**own, **moved}.items()
        }

    def _compare(self, node: Node, result: Any) -> None:
        variants = {variant for read in node.all_input_nodes for variant in self._beside.get(read, ())}
        if not variants or stage_of(site_of(node).path) not in QUANTIZED_STAGES:
            return
        goes_on = _goes_on(node) or not isinstance(result, Tensor)
        signal = 0.0 if goes_on else float(result.double().square().sum())
        for variant in sorted(variants):
            other = self._again(node, variant)
            if goes_on:
                self._beside.setdefault(node, {})[variant] = other
            elif signal:
                self._ratios[variant][-1] += float((result.double() - other.double()).square().sum()) / signal

    def _again(self, node: Node, variant: _Variant) -> Any:
        """Return what a node computes where one of the tensors that it reads is a candidate's."""

        def read(given: Node) -> Any:
            return self._beside.get(given, {}).get(variant, self.env[given])

        arguments: Any = map_arg(node.args, read)
        keywords: Any = map_arg(node.kwargs, read)
        return node.target(*arguments, **keywords)  # type: ignore[operator]

    def table(self, key: str) -> dict[str, float | None]:
        """Return the signal over noise of each candidate of a tensor, in dB."""
        return {name: _db(sum(ratios) / len(ratios)) for name, ratios in self._of(key).items()}

    def best(self, key: str) -> str:
        """Return the candidate with the least error, if it is below min-max's clearly and on every frame."""
        ratios = self._of(key)
        least = min(ratios, key=lambda name: sum(ratios[name]))
        clear = sum(ratios[least]) * 10 ** (MARGIN_DB / 10) <= sum(ratios[MIN_MAX])
        always = all(one < other for one, other in zip(ratios[least], ratios[MIN_MAX], strict=True))
        return least if clear and always else MIN_MAX

    def _of(self, key: str) -> dict[str, list[float]]:
        return {name: self._ratios[key, name] for name in self._tried[key]}


class _Heads(Interpreter):
    """Runs the graph with its tensors and weights quantized, or in float, and keeps what box arithmetic reads."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__(tensors.graph)
        self._tensors = tensors
        self._proposals = proposals_node(tensors.graph)
        self._scales: Mapping[str, float] | None = None
        self._pinned: Tensor | None = None
        self._weights: dict[Node, Tensor] = {}
        self._outputs: dict[str, list[Tensor]] = {}
        self.proposals = torch.empty(0)

    def outputs(
        self, frame: Tensor, scales: Mapping[str, float] | None, proposals: Tensor | None
    ) -> dict[str, list[Tensor]]:
        """Return the heads' outputs by module path.

        Args:
            frame: what the static detector takes.
            scales: of the activations, by key; None: all is float.
            proposals: that the box head is given; None: its own.
        """
        self._scales, self._pinned, self._outputs = scales, proposals, {}
        self.run(frame)
        return self._outputs

    def run_node(self, n: Node) -> Any:
        """Run one node; quantize where a watcher stands."""
        result = self._watched(n) if n.op == "call_module" else super().run_node(n)
        if self._tensors.is_head(n):
            self._outputs.setdefault(site_of(argument_node(n)).path, []).append(result)
        if n is self._proposals:
            self.proposals = result
            return result if self._pinned is None else self._pinned
        return result

    def _watched(self, node: Node) -> Tensor:
        value: Tensor = self.env[argument_node(node)]
        if self._scales is None:
            return value
        key = self._tensors.key_at(node)
        if key:
            return _fake_quantized(value, self._scales[key])
        if node not in self._weights:
            watcher = self._tensors.graph.get_submodule(str(node.target))
            assert isinstance(watcher, SymmetricObserver)
            scale = watcher.scale()
            zeros = torch.zeros(scale.numel(), dtype=torch.int32)
            self._weights[node] = torch.fake_quantize_per_channel_affine(
                value, scale, zeros, 0, *WEIGHT_RANGE
            )
        return self._weights[node]


def take_stages(
    tensors: Tensors,
    scales: Mapping[str, Mapping[str, float]],
    best: Mapping[str, str],
    frames: Sequence[NDArray[np.generic]],
) -> tuple[tuple[StageChoice, ...], dict[str, str], tuple[float | None, float | None]]:
    """Take the choices stage by stage, each where the heads gain by it.

    Returns:
        The stages, what is chosen by key, and the heads' signal over noise before and after, in dB.
    """
    heads = _Heads(tensors)
    given = [torch.from_numpy(frame) for frame in frames]
    floats = []
    for frame in given:
        outputs = heads.outputs(frame, None, None)
        floats.append((outputs, heads.proposals))

    def noise(chosen: Mapping[str, str]) -> float:
        own = {key: scales[key][chosen.get(key, MIN_MAX)] for key in scales}
        found = (heads.outputs(frame, own, pinned) for frame, (_, pinned) in zip(given, floats, strict=True))
        return _ratio(((wanted, actual) for (wanted, _), actual in zip(floats, found, strict=True)))

    taken: dict[str, str] = {}
    least = before = noise({})
    stages = []
    for stage in STAGES:
        own = {key: name for key, name in best.items() if name != MIN_MAX and _stage_of(key) == stage}
        if not own:
            continue
        ratio = noise({**taken, **own})
        stages.append(StageChoice(stage=stage, tensors=len(own), sqnr_db=_db(ratio), taken=ratio < least))
        if ratio < least:
            taken, least = {**taken, **own}, ratio
    return tuple(stages), taken, (_db(before), _db(least))


def _stage_of(key: str) -> Stage:
    return stage_of(key.partition("@")[0])


def _goes_on(node: Node) -> bool:
    """Tell whether what a node computes is no layer's output yet: values moved, or before a fused activation."""
    if base_of(node) is node and op_name(node) in SAME_SCALE:
        return True
    follower = next(iter(node.users), None)
    return (
        op_name(node) in FUSES_ACTIVATION
        and len(node.users) == 1
        and op_name(follower) in ACTIVATIONS
        and base_of(follower) is not follower  # type: ignore[arg-type]
    )


def _fake_quantized(value: Tensor, scale: float) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(value, scale, 0, *ACTIVATION_RANGE)


def _ratio(runs: Iterable[tuple[Mapping[str, list[Tensor]], Mapping[str, list[Tensor]]]]) -> float:
    """Return noise over signal, the mean over the outputs."""
    signal: dict[str, float] = {}
    noise: dict[str, float] = {}
    for wanted, actual in runs:
        for path, tensors in wanted.items():
            for one, other in zip(tensors, actual[path], strict=True):
                signal[path] = signal.get(path, 0.0) + float(one.double().square().sum())
                noise[path] = noise.get(path, 0.0) + float((one.double() - other.double()).square().sum())
    ratios = [noise[path] / signal[path] for path in signal if signal[path]]
    return sum(ratios) / len(ratios) if ratios else 0.0


def _db(ratio: float) -> float | None:
    return -10 * math.log10(ratio) if ratio > 0 else None
