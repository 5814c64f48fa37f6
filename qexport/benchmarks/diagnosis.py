"""Find the culprit when accuracy falls: the loudest stage, its loudest layers, and what their values look like."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node

from qexport.benchmarks.sensitivity import WEIGHTED_KINDS, Noise, make_units, measure_noise
from qexport.diagnosis_results import Cause, Diagnosis, Suspect
from qexport.encodings import EncodingRow, Encodings
from qexport.layers import Layer
from qexport.quantization.graph import argument_node, constant_of, scale_of, weight_key
from qexport.quantization.local import proposals_node
from qexport.quantization.partial import PartlyQuantized
from qexport.quantization.reference import QuantizedDetector
from qexport.results import ParityReport
from qexport.sensitivity_results import UnitNoise

SUSPECTS = 3
FEW_IMAGES = 16
"""A calibration with fewer images than this is suspected where values are saturated."""
SATURATED = 1e-3
"""Share of values beyond the range from which on saturation is the cause."""
UNEQUAL = 20.0
"""Range of the widest channel over that of the median one, from which on one scale for all is the cause."""
OUTLYING = 6.0
"""Range over what all but one of a thousand values keep to, from which on outliers are the cause."""
WEIGHTS_OUTLYING = 12.0
"""Largest weight of a channel over their root mean square, the median over the channels. Of a normal distribution with
a thousand weights it is 3."""
_WITHIN = 0.999


def diagnose(
    subject: str,
    drop: float,
    quantized: QuantizedDetector,
    partly: PartlyQuantized,
    encodings: Encodings,
    layers: Sequence[Layer],
    frames: Sequence[NDArray[np.generic]],
) -> Diagnosis:
    """Say which layers' integers cost the accuracy, and why.

    Args:
        subject: who fell.
        drop: by how much, as a fraction of mAP.
        quantized: the detector with its encodings.
        partly: the same, with rows to switch.
        encodings: its table.
        layers: as `inspect_layers` gives them.
        frames: what the static detector takes; few suffice.
    """
    weighted = [layer for layer in layers if layer.kind in WEIGHTED_KINDS]
    stages, _ = measure_noise(quantized, partly, make_units(weighted, "stage"), frames)
    stage = min(stages, key=_loudness)
    units = [unit for unit in make_units(weighted, "layer") if unit.stage == stage.stage]
    rows, _ = measure_noise(quantized, partly, units, frames)
    loudest = sorted(rows, key=_loudness)[:SUSPECTS]
    examined = _Examined(quantized, partly, frames)
    table = encodings.by_key()
    images = encodings.calibration.get("images", 0)
    # A percentile cuts values on purpose, and auto may.
    cuts = str(encodings.calibration.get("observer", "")).startswith(("percentile", "auto"))
    few = isinstance(images, int) and images < FEW_IMAGES and not cuts
    suspects = []
    for row in loudest:
        keys = sorted(partly.rows_of(row.name))
        noise = examined.noise(keys)
        worst = min(keys, key=lambda key: _or_silent(noise[key]))
        cause, evidence, mend = _explain(examined, table[worst], row.name, few=few, images=images)
        suspects.append(
            Suspect(
                path=row.name,
                stage=row.stage,
                row=worst,
                noise_db=noise[worst],
                cause=cause,
                evidence=evidence,
                mend=mend,
            )
        )
    return Diagnosis(
        subject=subject, drop=drop, stage=stage.stage, share=stage.share, suspects=tuple(suspects)
    )


def blame_runtime(subject: str, drop: float, parity: ParityReport) -> Diagnosis:
    """Name the layers that a runtime computes otherwise than the quantized reference, which keeps its accuracy."""
    compared = [row for row in parity.layers if row.values]
    worst = sorted(compared, key=lambda row: (-(row.max_step or 0), -(row.differing or 0) / row.values))
    suspects = tuple(
        Suspect(
            path=row.path,
            stage=row.stage,
            row=f"{row.path}@{row.call}/{row.port}",
            noise_db=None,
            cause="runtime",
            evidence=f"{row.max_step} steps at most, {1e6 * (row.differing or 0) / row.values:.0f} of a million values "
            "differ from the reference on the same inputs",
            mend=f"--keep-float {row.path}, or another version of the runtime",
        )
        for row in worst[:SUSPECTS]
    )
    return Diagnosis(subject=subject, drop=drop, stage=suspects[0].stage, share=None, suspects=suspects)


@dataclass(slots=True)
class _Tensor:
    """What an activation looked like over all frames."""

    largest: float = 0.0
    beyond: int = 0
    """Values that the scale cannot hold."""
    values: int = 0
    within: float = 0.0
    """What all but one of a thousand values keep to; the largest over the frames."""
    channels: Tensor | None = None
    """Largest magnitude by channel."""


class _Examined:
    """Runs the frames in float, keeps what the activations look like, and measures rows one by one."""

    def __init__(
        self, quantized: QuantizedDetector, partly: PartlyQuantized, frames: Iterable[NDArray[np.generic]]
    ) -> None:
        self._partly = partly
        self._pinned = proposals_node(quantized.graph)
        self._runs = [partly.run(torch.from_numpy(frame), frozenset()) for frame in frames]
        self._nodes = quantized.quantize_nodes
        self._weights: Mapping[str, Tensor] = {
            weight_key(node): constant_of(quantized.float_graph, argument_node(node, 1))
            for node in quantized.float_graph.graph.nodes
            if len(node.args) > 1 and isinstance(node.args[1], Node) and node.args[1].op == "get_attr"
        }

    def noise(self, keys: Sequence[str]) -> dict[str, float | None]:
        """Return the signal to noise in dB of each row alone."""
        found = {}
        for key in keys:
            noise = Noise(self._partly.head_outputs())
            for floats in self._runs:
                alone = self._partly.rerun(floats, frozenset(), {key}, pinned={self._pinned})
                noise.add(reference=floats, actual=alone)
            found[key] = noise.db
        return found

    def activation(self, key: str) -> _Tensor:
        """Return what an activation looks like."""
        node, found = self._nodes[key], _Tensor()
        most = 127.5 * scale_of(node)
        for values in self._runs:
            magnitude: Tensor = values[argument_node(node)].abs()
            found.largest = max(found.largest, float(magnitude.max()))
            found.beyond += int((magnitude > most).sum())
            found.values += magnitude.numel()
            kept = magnitude.flatten().kthvalue(max(1, int(_WITHIN * magnitude.numel()))).values
            found.within = max(found.within, float(kept))
            axis = 1 if magnitude.dim() > 1 else 0
            channels = magnitude.transpose(0, axis).flatten(1).amax(1)
            found.channels = channels if found.channels is None else torch.maximum(found.channels, channels)
        return found

    def weight(self, key: str) -> Tensor:
        """Return a float weight."""
        return self._weights[key]


def _explain(
    examined: _Examined, row: EncodingRow, path: str, *, few: bool, images: object
) -> tuple[Cause, str, str]:
    """Return cause, evidence and what mends it, for a layer and its loudest row."""
    if row.port == "weight":
        return _explain_weight(examined.weight(row.key).flatten(1).abs(), row, path)
    found, scale = examined.activation(row.key), row.params.scale[0]
    assert found.channels is not None  # at least one frame ran
    limit, share = 127 * scale, found.beyond / max(found.values, 1)
    unequal = float(found.channels.max() / found.channels.median().clamp(min=1e-12))
    outlying = limit / max(found.within, 1e-12)
    if share > SATURATED:
        most = found.largest / limit
        evidence = (
            f"{100 * share:.1f} % of the values of {row.key} are beyond its range, up to {most:.1f} times"
        )
        if few:
            return "too few calibration images", f"{evidence}; calibrated on {images}", "--images 64 or more"
        return "saturation", evidence, "--observer min-max, or a larger --percentile"
    if unequal > UNEQUAL:
        evidence = f"the widest channel of {row.key} has {unequal:.0f} times the range of the median one"
        return "unequal channels", evidence, f"`qexport mend RUN --equalize`, or --keep-float {path}"
    times = f"the range of {row.key} is {outlying:.1f} times what 99.9 % of its values keep to"
    if outlying > OUTLYING:
        return "outliers", times, "--observer auto, or --observer mse"
    return "rounding", times, f"`qexport mend RUN`, `qexport qat`, or --keep-float {path}"


def _explain_weight(magnitude: Tensor, row: EncodingRow, path: str) -> tuple[Cause, str, str]:
    """Explain a weight's noise by its magnitudes, (output channels, weights of each)."""
    channels = magnitude.amax(1)
    unequal = float(channels.max() / channels.median().clamp(min=1e-12))
    if unequal > UNEQUAL and len(set(row.params.scale)) == 1:
        evidence = (
            f"its widest channel has {unequal:.0f} times the range of the median one, and they share a scale"
        )
        mend = f"--weight-scales per-channel, `qexport mend RUN --equalize`, or --keep-float {path}"
        return "unequal channels", evidence, mend
    peak = float((channels / magnitude.square().mean(1).sqrt().clamp(min=1e-12)).median())
    evidence = f"its weights reach {peak:.0f} times their root mean square"
    cause: Cause = "weights with outliers" if peak > WEIGHTS_OUTLYING else "rounding"
    return cause, evidence, f"`qexport mend RUN`, `qexport qat`, or --keep-float {path}"


def _loudness(unit: UnitNoise) -> float:
    return _or_silent(unit.alone_db)


def _or_silent(db: float | None) -> float:
    return float("inf") if db is None else db
