"""Calibrate: run frames through the observed graph, one at a time, and write down the scales."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from qexport.detectors.fingerprint import fingerprint
from qexport.detectors.static import StaticDetector
from qexport.encodings import (
    ACTIVATION_RANGE,
    WEIGHT_RANGE,
    EncodingRow,
    Encodings,
    QuantParams,
    digest_of_rows,
)
from qexport.errors import CalibrationError
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
from qexport.quantization.observers import ChannelMax, MagnitudeHistogram, SymmetricObserver
from qexport.quantization.quantizer import (
    WEIGHTED,
    SymmetricInt8Quantizer,
    activation_spec,
    check_patterns,
    weight_spec,
)
from qexport.quantization.reference import BIAS_LIMIT
from qexport.settings import ObserverName

SCHEME = "int8-symmetric-per-channel"


def calibrate(
    static: StaticDetector,
    frames: Iterable[NDArray[np.generic]],
    *,
    observer: ObserverName = "min-max",
    percentile: float = 99.99,
    keep_float: tuple[str, ...] = (),
    notes: Mapping[str, str | int | float] | None = None,
    on_image: Callable[[], None] = lambda: None,
) -> Encodings:
    """Decide the quantization of a static detector from frames.

    Args:
        static: the detector; it is not changed.
        frames: what the artifact will be given: (H, W, 3) uint8 RGB frames, or (1, 3, h, w) float32 images
            where preprocessing is outside. One is held in memory at a time.
        observer: how a tensor's clipping value is chosen.
        percentile: for the observer of that name.
        keep_float: patterns of module paths that stay float.
        notes: what else the table should say of its origin (dataset hash, seed, split).
        on_image: called after each frame.

    Raises:
        CalibrationError: no frames, a pattern that matches nothing, or activations that are not finite.
    """
    graph = export_graph(fold_batch_norm(static))
    keys = port_keys(graph)
    paths = sorted({site_of(node).path for node in graph.graph.nodes if node.op == "call_function"})
    quantizer = SymmetricInt8Quantizer(
        lambda _: activation_spec(MagnitudeHistogram.with_args(method=observer, percentile=percentile)),
        lambda _: weight_spec(ChannelMax),
        keep_float=keep_float,
    )
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torchao announces future moves of its own modules
        prepared = prepare_pt2e(graph, quantizer)
        check_patterns(keep_float, quantizer.plan, paths)
        images = 0
        for frame in frames:
            prepared(torch.from_numpy(frame))
            images += 1
            on_image()
    if images == 0:
        raise CalibrationError("no image to calibrate with: choose another --calibration-split or folder.")
    source = f"percentile {percentile:g}" if observer == "percentile" else observer
    rows = tuple(_rows(prepared, keys, source))
    return Encodings(
        detector_sha256=fingerprint(static),
        scheme=SCHEME,
        calibration={"observer": source, "images": images, **(notes or {})},
        keep_float=keep_float,
        rows=rows,
        float_rows=quantizer.plan.float_rows,
        rows_sha256=digest_of_rows(rows, quantizer.plan.float_rows),
    )


def _rows(prepared: GraphModule, keys: Mapping[str, str], source: str) -> list[EncodingRow]:
    """Read the scales off the observers, in order of execution."""
    activations: dict[str, EncodingRow] = {}
    weights: dict[str, EncodingRow] = {}
    first_key: dict[int, str] = {}
    for node in prepared.graph.nodes:
        if node.op != "call_module":
            continue
        watched, watcher = argument_node(node), getattr(prepared, str(node.target))
        if watched.op == "get_attr":
            key = weight_key(next(iter(node.users)))
            weights.setdefault(key, _weight_row(prepared, node, watcher))
            continue
        key = keys[base_of(watched).name]
        first = first_key.setdefault(id(watcher), key)
        origin = source if first == key else f"shared with {first}"
        params = _params(watcher, key, ACTIVATION_RANGE, None)
        activations.setdefault(key, _row(key, params, origin))
    return [*activations.values(), *weights.values()]


def _weight_row(prepared: GraphModule, node: Node, watcher: ChannelMax) -> EncodingRow:
    """Return a weight's row, its scale raised where a bias would not fit into int32 otherwise.

    A channel that BatchNorm almost switched off has tiny weights and an ordinary bias; the bias is stored
    in units of the input's scale times the channel's scale.
    """
    key = weight_key(next(iter(node.users)))
    params = _params(watcher, key, WEIGHT_RANGE, 0)
    scale = torch.tensor(params.scale)
    lowest = torch.zeros_like(scale)
    for user in node.users:
        if op_name(user) in WEIGHTED and len(user.args) > 2 and user.args[2] is not None:
            observed = getattr(prepared, str(argument_node(user).target)).scale()
            bias = constant_of(prepared, argument_node(user, 2))
            lowest = torch.maximum(lowest, bias.abs() / (observed * BIAS_LIMIT))
    raised = torch.maximum(scale, lowest)
    changed = int((raised > scale).sum())
    origin = "min-max" + (f", {changed} channels raised for the bias" if changed else "")
    return _row(key, QuantParams(_floats(raised), qmin=params.qmin, qmax=params.qmax, axis=0), origin)


def _params(watcher: SymmetricObserver, key: str, limits: tuple[int, int], axis: int | None) -> QuantParams:
    scale = watcher.scale()
    if not bool(torch.isfinite(scale).all()):
        raise CalibrationError(
            f"{key}: values that are not finite were seen during calibration. "
            "The weights or the images overflow there: check the float detector on the same images."
        )
    return QuantParams(_floats(scale), qmin=limits[0], qmax=limits[1], axis=axis)


def _row(key: str, params: QuantParams, source: str) -> EncodingRow:
    site, _, port = key.partition("/")
    path, _, call = site.rpartition("@")
    return EncodingRow(path, int(call), port, params, source)


def _floats(scale: torch.Tensor) -> tuple[float, ...]:
    return tuple(float(value) for value in scale)
