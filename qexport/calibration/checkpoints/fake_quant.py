"""The fake quantizers of torch.ao and torchao in a state dict: scales, zero points, and which codes they have.

A state dict does not say the range of codes (quint8 or qint8, 7 bits for `reduce_range`). It follows from the scale,
the zero point and the observed range; where it does not, the prepared model has to tell.

The scale is the `.scale` buffer, which training used. `convert` of torch.ao computes it anew from the observer, and
for FusedMovingAvgObsFakeQuantize that is another one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from qexport.calibration.checkpoints.batch_norm import unfuse
from qexport.calibration.checkpoints.prepared import Place, Prepared
from qexport.calibration.checkpoints.ranges import QatRange, check_scales, refuse_unseen

WEIGHT = ".weight_fake_quant"
ACTIVATION = ".activation_post_process"
_NUMBERED = re.compile(r"(^|\.)activation_post_process_\d+$")
_INSIDE = re.compile(
    r"(^|\.)(weight_fake_quant|activation_post_process(_\d+)?)\.(scale|zero_point|eps|.*_enabled|min_val|max_val"
    r"|activation_post_process\..*|.*histogram.*)$"
)
_WRAPPED = re.compile(r"^(.*?)quant\.activation_post_process\.scale$")
_CODES = ((0, 255), (0, 127), (-128, 127), (-127, 127), (-64, 63))
"""Codes that torch's QAT configurations use, the usual ones first."""
_TOLERANCE = 1e-3
"""Of a scale against the one that its observed range gives: -128..127 and -127..127 are 4e-3 apart."""


@dataclass(frozen=True, slots=True)
class FakeQuant:
    """One fake quantizer, as a state dict has it."""

    name: str
    """`backbone.body.conv1.weight_fake_quant`."""
    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    low: tuple[float, ...]
    """Smallest value observed; empty where there is no observer."""
    high: tuple[float, ...]

    @property
    def seen(self) -> bool:
        """It saw data."""
        fresh = all(scale == 1.0 for scale in self.scale) and not any(self.zero_point)
        return not fresh or (bool(self.low) and all(map(math.isfinite, self.low + self.high)))

    @property
    def owner(self) -> str:
        """Path of the module that it belongs to."""
        return self.name.rpartition(".")[0]


def fake_quants(state: Mapping[str, Tensor]) -> dict[str, FakeQuant]:
    """Return the fake quantizers of a state dict, by name."""
    found = {}
    for key in state:
        name, _, last = key.rpartition(".")
        if last == "fake_quant_enabled" and f"{name}.scale" in state and f"{name}.zero_point" in state:
            found[name] = FakeQuant(
                name,
                _floats(state[f"{name}.scale"]),
                tuple(round(value) for value in _floats(state[f"{name}.zero_point"])),
                _floats(state.get(f"{name}.activation_post_process.min_val")),
                _floats(state.get(f"{name}.activation_post_process.max_val")),
            )
    return found


def is_numbered(name: str) -> bool:
    """Tell whether a fake quantizer belongs to a node of a graph, and only the graph knows to which."""
    return _NUMBERED.search(name) is not None


def without_wrappers(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the keys of a state dict without the `module.` that torch.ao's QuantWrapper adds, with the keys it has."""
    keys = {key: key for key in state}
    for key in state:
        wrapped = _WRAPPED.match(key)
        inside = f"{wrapped[1]}module." if wrapped else ""
        if wrapped and any(other.startswith(inside) for other in keys):
            keys = {
                wrapped[1] + other.removeprefix(inside) if other.startswith(inside) else other: own
                for other, own in keys.items()
            }
    return keys


def float_state(
    state: Mapping[str, Tensor], norms: Mapping[str, str], path: Path
) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Return the float weights under the detector's keys, and the paths of layers that were fused with BatchNorm.

    Raises:
        CheckpointError: a fused layout that the detector does not have.
    """
    fused = frozenset(
        key.removesuffix(".bn.running_mean")
        for key in state
        if key.endswith(".bn.running_mean")
        and f"{key.removesuffix('.bn.running_mean')}{WEIGHT}.scale" in state
    )
    kept = {key: value for key, value in state.items() if not _INSIDE.search(key)}
    return unfuse(kept, fused, norms, path), fused


def ranges_of(
    found: Mapping[str, FakeQuant],
    fused: frozenset[str],
    prepared: Prepared | None,
    path: Path,
    state: Mapping[str, Tensor],
) -> tuple[QatRange, ...]:
    """Return the ranges of the fake quantizers whose place is known.

    Args:
        found: the fake quantizers.
        fused: layers that hold a BatchNorm.
        prepared: the user's prepared model, if given.
        path: of the checkpoint.
        state: the float weights.

    Raises:
        CheckpointError: none of them saw data, or a scale is zero or not finite.
    """
    if not any(entry.seen for entry in found.values()):
        refuse_unseen(dict.fromkeys(found, "scale 1, observed range empty"), path)
    ranges: list[QatRange] = []
    for entry in found.values():
        codes = prepared.codes.get(entry.name) if prepared else None
        ranges += [_range_at(entry, place, codes) for place in _places(entry, fused, prepared)]
    return check_scales(ranges, path, state)


def _places(entry: FakeQuant, fused: frozenset[str], prepared: Prepared | None) -> Iterable[Place]:
    if is_numbered(entry.name):
        return prepared.places.get(entry.name, ()) if prepared else ()
    owner, includes_norm = entry.owner, entry.owner in fused
    if entry.name.endswith(WEIGHT):
        return (Place(owner, "weight", includes_norm=includes_norm),)
    return (Place(owner, "output", includes_norm=includes_norm),)


def _range_at(entry: FakeQuant, place: Place, codes: tuple[int, int] | None) -> QatRange:
    codes = codes or _codes_of(entry, is_weight=place.port == "weight")
    problem = ""
    if not entry.seen:
        problem = "it never saw data (scale 1, observed range empty)"
    elif codes is None:
        problem = (
            "its scale does not follow from its observed range, so the range of its codes cannot be told"
        )
    qmin, qmax = codes or (-128, 127)
    return QatRange(
        path=place.path,
        port=place.port,
        scale=entry.scale,
        buffer=f"{entry.name}.scale",
        call=place.call,
        op=place.op,
        zero_point=entry.zero_point,
        qmin=qmin,
        qmax=qmax,
        axis=0 if len(entry.scale) > 1 else None,
        includes_norm=place.includes_norm,
        problem=problem,
    )


def _codes_of(entry: FakeQuant, *, is_weight: bool) -> tuple[int, int] | None:
    """Return the codes with which the observed range gives the scale and the zero point."""
    if any(zero > 127 for zero in entry.zero_point):
        return (0, 255)
    usual = _CODES[2] if is_weight and not any(entry.zero_point) else None
    if not entry.low or len(entry.low) != len(entry.scale):
        return usual
    errors = {codes: _error_with(entry, *codes) for codes in _CODES}
    best = min(errors, key=lambda codes: errors[codes])
    return best if errors[best] < _TOLERANCE else usual


def _error_with(entry: FakeQuant, qmin: int, qmax: int) -> float:
    """Return by which share the scale differs from what these codes would give, symmetric or affine."""
    worst = 0.0
    for scale, zero, smallest, largest in zip(
        entry.scale, entry.zero_point, entry.low, entry.high, strict=True
    ):
        if not qmin <= zero <= qmax:
            return math.inf
        low, high = min(smallest, 0.0), max(largest, 0.0)
        affine = (high - low) / (qmax - qmin)
        symmetric = 2 * max(-low, high) / (qmax - qmin)
        options = [affine] if abs(zero - (qmin - low / max(affine, 1e-12))) < 1 else []
        # torch puts zero at 127 of 0..255 where the codes were given, and at 128 where they are the type's own.
        options += [symmetric] if zero in ((qmin + qmax) // 2, (qmin + qmax + 1) // 2) else []
        worst = max(
            worst, min((abs(scale / option - 1) for option in options if option > 0), default=math.inf)
        )
    return worst


def _floats(value: Tensor | None) -> tuple[float, ...]:
    return tuple(float(entry) for entry in value.flatten()) if value is not None else ()
