"""Calibrate: run frames through the observed graph, one at a time, and write down the scales."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from qexport.calibration.choosing import Tensors, choose_observers, is_held_out
from qexport.detectors.fingerprint import fingerprint
from qexport.detectors.static import StaticDetector
from qexport.encodings import (
    ACTIVATION_RANGE,
    ACTIVATIONS,
    PER_CHANNEL,
    PER_TENSOR,
    WEIGHT_RANGE,
    EncodingRow,
    Encodings,
    FloatRow,
    QuantParams,
    digest_of_rows,
)
from qexport.errors import CalibrationError
from qexport.observer_results import ObserverReport
from qexport.quantization.fold import fold_batch_norm
from qexport.quantization.graph import (
    argument_node,
    base_of,
    constant_of,
    export_graph,
    op_name,
    port_keys,
    site_of,
    weight_key,
)
from qexport.quantization.observers import ChannelMax, MagnitudeHistogram, SymmetricObserver, name_observer
from qexport.quantization.quantizer import (
    WEIGHTED,
    SymmetricInt8Quantizer,
    activation_spec,
    check_patterns,
    weight_spec,
)
from qexport.quantization.reference import BIAS_LIMIT
from qexport.settings import ObserverName, Scheme, WeightScales


def calibrate(
    static: StaticDetector,
    frames: Iterable[NDArray[np.generic]],
    *,
    observer: ObserverName = "min-max",
    percentile: float = 99.99,
    scheme: Scheme = "int8",
    weight_scales: WeightScales = "per-channel",
    keep_float: tuple[str, ...] = (),
    notes: Mapping[str, str | int | float] | None = None,
    on_image: Callable[[], None] = lambda: None,
    on_choice: Callable[[ObserverReport], None] = lambda _: None,
) -> Encodings:
    """Decide the quantization of a static detector from frames.

    Args:
        static: the detector; it is not changed.
        frames: what the artifact will be given: (H, W, 3) uint8 RGB frames, or (1, 3, h, w) float32 images
            where preprocessing is outside. One is held in memory at a time.
        observer: how a tensor's clipping value is chosen; with `auto` for each tensor by the error of what reads it.
        percentile: for the observer of that name.
        scheme: whether weights are quantized too.
        weight_scales: whether the channels of a weight share one scale.
        keep_float: patterns of module paths that stay float.
        notes: what else the table should say of its origin (dataset hash, seed, split).
        on_image: called after each frame.
        on_choice: called with what `auto` came to.

    Raises:
        CalibrationError: no frames, too few for `auto`, a pattern that matches nothing, or activations that are not
            finite.
    """
    observed = watch(static, observer=observer, percentile=percentile, scheme=scheme, keep_float=keep_float)
    if observer == "auto":
        images, report = show_and_choose(observed, frames, on_image)
        on_choice(report)
    else:
        images = show(observed, frames, on_image)
    if images == 0:
        raise CalibrationError("no image to calibrate with: choose another --calibration-split or folder.")
    activations = activation_rows(observed)
    input_scales = {row.key: row.params.scale[0] for row in activations}
    rows = (*activations, *weight_rows(observed, input_scales, weight_scales))
    return Encodings(
        detector_sha256=fingerprint(static),
        scheme=name_scheme(rows, scheme),
        calibration={
            "observer": name_observer(observer, percentile),
            "images": images,
            **(notes or {}),
        },
        keep_float=keep_float,
        rows=rows,
        float_rows=observed.float_rows,
        rows_sha256=digest_of_rows(rows, observed.float_rows),
    )


@dataclass(frozen=True, slots=True)
class Observed:
    """A detector's graph whose quantized tensors are watched."""

    graph: GraphModule
    """BatchNorm folded, an observer behind every tensor."""
    keys: Mapping[str, str]
    """Encodings key of what each operator computes, by node name."""
    float_rows: tuple[FloatRow, ...]

    def activations(self) -> Iterator[tuple[str, MagnitudeHistogram]]:
        """Yield the key of each activation with its observer; tensors of one scale have the same observer."""
        for node in self._watchers():
            watched = argument_node(node)
            if watched.op != "get_attr":
                yield self.keys[base_of(watched).name], getattr(self.graph, str(node.target))

    def weights(self) -> Iterator[tuple[str, Node, SymmetricObserver]]:
        """Yield the key of each weight, the node of its observer and the observer."""
        for node in self._watchers():
            if argument_node(node).op == "get_attr":
                yield weight_key(next(iter(node.users))), node, getattr(self.graph, str(node.target))

    def _watchers(self) -> Iterator[Node]:
        return (node for node in self.graph.graph.nodes if node.op == "call_module")


def watch(
    static: StaticDetector,
    *,
    observer: ObserverName,
    percentile: float,
    scheme: Scheme = "int8",
    keep_float: tuple[str, ...],
) -> Observed:
    """Return the graph of a static detector with an observer on every tensor that is quantized.

    Raises:
        CalibrationError: a pattern that matches nothing.
    """
    graph = export_graph(fold_batch_norm(static))
    keys = port_keys(graph)
    paths = sorted({site_of(node).path for node in graph.graph.nodes if node.op == "call_function"})
    quantizer = SymmetricInt8Quantizer(
        lambda _: activation_spec(MagnitudeHistogram.with_args(method=observer, percentile=percentile)),
        (lambda _: weight_spec(ChannelMax)) if scheme == "int8" else None,
        keep_float=keep_float,
    )
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torchao announces future moves of its own modules
        prepared = prepare_pt2e(graph, quantizer)
    check_patterns(keep_float, quantizer.plan, paths)
    return Observed(prepared, keys, quantizer.plan.float_rows)


def show(
    observed: Observed, frames: Iterable[NDArray[np.generic]], on_image: Callable[[], None] = lambda: None
) -> int:
    """Let the observers see frames, one at a time; return how many there were."""
    images = 0
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torchao's observers warn of their future
        for frame in frames:
            observed.graph(torch.from_numpy(frame))
            images += 1
            on_image()
    return images


def show_and_choose(
    observed: Observed,
    frames: Iterable[NDArray[np.generic]],
    on_image: Callable[[], None] = lambda: None,
    fixed: Mapping[str, float] | None = None,
) -> tuple[int, ObserverReport]:
    """Let the observers see frames, and each take the method that the readers of its tensor lose least by.

    The frames that the errors are measured on are kept from the observers until the methods are chosen; then the
    ranges are those of all frames.

    Args:
        observed: the graph.
        frames: at least two; one is held in memory, and the few that are measured on.
        on_image: called after each frame.
        fixed: scales that tensors have from elsewhere, by key.

    Returns:
        How many frames there were, and what was chosen.

    Raises:
        CalibrationError: fewer than two frames, or values that are not finite.
    """
    held_out: list[NDArray[np.generic]] = []

    def seen() -> Iterator[NDArray[np.generic]]:
        for place, frame in enumerate(frames):
            if not is_held_out(place):
                yield frame
                continue
            held_out.append(frame)
            on_image()

    images = show(observed, seen(), on_image)
    if not held_out:
        raise CalibrationError(
            f"--observer auto measures on images that the observers did not see, and there is {images or 'no'} "
            "calibration image. Give more: --images 64, or choose another --observer."
        )
    activation_rows(observed)  # raises where values are not finite: of these there is nothing to choose
    tensors = Tensors(observed.graph, tuple(observed.activations()), fixed or {})
    report = choose_observers(tensors, held_out, images=images)
    return images + show(observed, held_out), report


def activation_rows(observed: Observed, before: str = "") -> list[EncodingRow]:
    """Read the scales of activations off the observers, in order of execution.

    Args:
        observed: has seen frames.
        before: what each row's source begins with.
    """
    rows: dict[str, EncodingRow] = {}
    first_key: dict[int, str] = {}
    for key, watcher in observed.activations():
        first = first_key.setdefault(id(watcher), key)
        origin = before + watcher.name if first == key else f"shared with {first}"
        rows.setdefault(key, make_row(key, _params(watcher, key, ACTIVATION_RANGE, None), origin))
    return list(rows.values())


def weight_rows(
    observed: Observed, input_scales: Mapping[str, float], weight_scales: WeightScales
) -> list[EncodingRow]:
    """Read the scales of weights off the observers.

    Args:
        observed: has seen a frame.
        input_scales: of the activations, by key.
        weight_scales: with `per-tensor` every channel has the scale of the widest.
    """
    rows: dict[str, EncodingRow] = {}
    for key, node, watcher in observed.weights():
        if key not in rows:
            params = _params(watcher, key, WEIGHT_RANGE, 0)
            raised, changed = raise_for_bias(observed, node, torch.tensor(params.scale), input_scales)
            origin = "min-max" + (f", {changed} channels raised for the bias" if changed else "")
            if weight_scales == "per-tensor":
                raised = raised.amax().expand_as(raised)
            rows[key] = make_row(key, msgspec.structs.replace(params, scale=to_floats(raised)), origin)
    return list(rows.values())


def raise_for_bias(
    observed: Observed, node: Node, scale: torch.Tensor, input_scales: Mapping[str, float]
) -> tuple[torch.Tensor, int]:
    """Return a weight's scales raised where a bias would not fit into int32 otherwise, and how many were raised.

    A channel that BatchNorm almost switched off has tiny weights and an ordinary bias; the bias is stored
    in units of the input's scale times the channel's scale.

    Args:
        observed: the graph.
        node: of the weight's observer.
        scale: (channels,) float32.
        input_scales: of the activations, by key.
    """
    lowest = torch.zeros_like(scale)
    for user in node.users:
        if op_name(user) in WEIGHTED and len(user.args) > 2 and user.args[2] is not None:
            watched = argument_node(argument_node(user))
            step = torch.tensor([input_scales[observed.keys[base_of(watched).name]]], dtype=torch.float32)
            bias = constant_of(observed.graph, argument_node(user, 2))
            lowest = torch.maximum(lowest, bias.abs() / (step * BIAS_LIMIT))
    raised = torch.maximum(scale, lowest)
    return raised, int((raised > scale).sum())


def name_scheme(rows: Iterable[EncodingRow], scheme: Scheme) -> str:
    """Return what a table says of its scheme: per tensor where the channels of every weight have one scale."""
    if scheme == "activations":
        return ACTIVATIONS
    of_weights = [row.params.scale for row in rows if row.port == "weight"]
    shared = any(len(scale) > 1 for scale in of_weights) and all(len(set(scale)) == 1 for scale in of_weights)
    return PER_TENSOR if shared else PER_CHANNEL


def _params(watcher: SymmetricObserver, key: str, limits: tuple[int, int], axis: int | None) -> QuantParams:
    scale = watcher.scale()
    if not bool(torch.isfinite(scale).all()):
        raise CalibrationError(
            f"{key}: values that are not finite were seen during calibration. "
            "The weights or the images overflow there: check the float detector on the same images."
        )
    return QuantParams(to_floats(scale), qmin=limits[0], qmax=limits[1], axis=axis)


def make_row(key: str, params: QuantParams, source: str) -> EncodingRow:
    """Return the row of the tensor with this key."""
    site, _, port = key.partition("/")
    path, _, call = site.rpartition("@")
    return EncodingRow(path, int(call), port, params, source)


def to_floats(scale: torch.Tensor) -> tuple[float, ...]:
    """Return float32 values as Python floats, which hold them exactly."""
    return tuple(float(value) for value in scale)
