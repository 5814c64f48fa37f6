"""What each layer's integers do to the detector: signal to noise at the outputs of both heads, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node

from qexport.layers import Layer, Stage
from qexport.quantization.local import proposals_node
from qexport.quantization.partial import PartlyQuantized, Values
from qexport.quantization.reference import QuantizedDetector
from qexport.sensitivity_results import Grain, UnitNoise

WEIGHTED_KINDS = ("convolution", "linear")
_BLOCK_LEVEL = 3


@dataclass(frozen=True, slots=True)
class Unit:
    """What is made float at a time."""

    name: str
    stage: Stage
    paths: tuple[str, ...]
    """Module paths of its layers."""
    patterns: tuple[str, ...]
    """That leave it in float, and nothing else."""
    macs: int
    weight_bytes: int


def make_units(layers: Sequence[Layer], grain: Grain) -> tuple[Unit, ...]:
    """Return the units of a detector, in order of execution.

    Sums, pools, resizes and RoIAlign are in units as convolutions and linears are: with every unit in float nothing of
    the detector is quantized.

    Args:
        layers: as `inspect_layers` gives them; those that are float already are in none.
        grain: how large a unit is.
    """
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.quantized:
            groups.setdefault(_name(layer, grain), []).append(layer)
    owners = {layer.path: name for name, members in groups.items() for layer in members}
    return tuple(
        Unit(
            name=name,
            stage=members[0].stage,
            paths=tuple(dict.fromkeys(member.path for member in members)),
            patterns=tuple(dict.fromkeys(_pattern(member.path, name, owners) for member in members)),
            macs=sum(member.macs for member in members),
            weight_bytes=sum(member.parameters for member in members),
        )
        for name, members in groups.items()
    )


def measure_noise(
    quantized: QuantizedDetector,
    partly: PartlyQuantized,
    units: Sequence[Unit],
    frames: Iterable[NDArray[np.generic]],
    *,
    on_unit: Callable[[], None] = lambda: None,
) -> tuple[tuple[UnitNoise, ...], float | None]:
    """Measure what quantizing each unit alone costs, and what leaving it float gains.

    Args:
        quantized: the detector with all of its rows.
        partly: the same, with rows to switch.
        units: what to switch at a time.
        frames: what the static detector takes; one is held at a time.
        on_unit: called after each unit of each frame.

    Returns:
        A row for each unit, and the signal to noise of the whole int8 detector in dB.
    """
    outputs = partly.head_outputs()
    pinned = proposals_node(quantized.graph)
    rows = {unit.name: _rows_of(partly, unit) for unit in units}
    kept = {unit.name: partly.keys_with(unit.patterns)[0] for unit in units}
    whole = Noise(outputs)
    alone = {unit.name: Noise(outputs) for unit in units}
    without = {unit.name: Noise(outputs) for unit in units}
    for frame in frames:
        given = torch.from_numpy(frame)
        floats = partly.run(given, frozenset())
        int8 = partly.rerun(floats, frozenset(), partly.keys, pinned={pinned})
        whole.add(reference=floats, actual=int8)
        for unit in units:
            name = unit.name
            one = partly.rerun(floats, frozenset(), rows[name], pinned={pinned})
            alone[name].add(reference=floats, actual=one)
            rest = partly.rerun(int8, partly.keys, kept[name], pinned={pinned})
            without[name].add(reference=floats, actual=rest)
            on_unit()
    everything = whole.ratio
    return tuple(
        UnitNoise(
            name=unit.name,
            stage=unit.stage,
            keep_float=unit.patterns,
            layers=len(unit.paths),
            macs=unit.macs,
            weight_bytes=unit.weight_bytes,
            alone_db=_db(alone[unit.name].ratio),
            left_float_db=_db(without[unit.name].ratio),
            share=1.0 - without[unit.name].ratio / everything if everything else 0.0,
        )
        for unit in units
    ), _db(everything)


class Noise:
    """Sums of signal and noise at each of the outputs."""

    def __init__(self, outputs: Mapping[str, Sequence[Node]]) -> None:
        self._outputs = outputs
        self._signal = dict.fromkeys(outputs, 0.0)
        self._noise = dict.fromkeys(outputs, 0.0)

    def add(self, *, reference: Values, actual: Values) -> None:
        """Add one run."""
        for path, nodes in self._outputs.items():
            for node in nodes:
                wanted: Tensor = reference[node].double()
                self._signal[path] += float(wanted.square().sum())
                self._noise[path] += float((wanted - actual[node].double()).square().sum())

    @property
    def ratio(self) -> float:
        """Noise over signal, the mean over the outputs that have a signal."""
        ratios = [self._noise[path] / self._signal[path] for path in self._outputs if self._signal[path]]
        return sum(ratios) / len(ratios) if ratios else 0.0

    @property
    def db(self) -> float | None:
        """Signal over noise in dB; None where nothing differs."""
        return _db(self.ratio)


def _name(layer: Layer, grain: Grain) -> str:
    if grain == "stage":
        return layer.stage
    parts = layer.path.split(".")
    return ".".join(parts[:_BLOCK_LEVEL]) if grain == "block" else layer.path


def _pattern(path: str, unit: str, owners: Mapping[str, str]) -> str:
    """Return the pattern of a layer; one that has layers of other units below it is named without them."""
    if all(owner == unit for below, owner in owners.items() if below.startswith(f"{path}.")):
        return path
    return f"{path[:-1]}[{path[-1]}]"  # a plain path would cover what is below it


def _rows_of(partly: PartlyQuantized, unit: Unit) -> frozenset[str]:
    return frozenset().union(*(partly.rows_of(path) for path in unit.paths))


def _db(ratio: float) -> float | None:
    return None if ratio == 0.0 else -10 * math.log10(ratio)
