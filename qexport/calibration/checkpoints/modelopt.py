"""NVIDIA ModelOpt: `mtq.quantize`, saved by `torch.save(model.state_dict())` or by `mto.save`.

A plain state dict does not say how many bits there are; where `mto.save` put ModelOpt's own state beside it, every
quantizer is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qexport.calibration.checkpoints.amax import holds, read_amax
from qexport.calibration.checkpoints.content import Content
from qexport.calibration.checkpoints.format import Detector, Format
from qexport.calibration.checkpoints.ranges import QatCheckpoint, name_some
from qexport.errors import CheckpointError

_BITS = 8


def _recognised(content: Content) -> bool:
    return holds(content.state, "weight_quantizer") or holds(content.state, "input_quantizer")


def _read(content: Content, detector: Detector, prepare: str | None) -> QatCheckpoint:
    del prepare
    quantizers = _quantizer_states(content.document)
    other = [
        f"{name} ({state['_num_bits']})"
        for name, state in quantizers.items()
        if not state.get("_disabled") and state.get("_num_bits", _BITS) != _BITS
    ]
    if other:
        raise CheckpointError(
            f"{content.path}: {len(other)} quantizers are not of 8-bit integers: {name_some(other)}. int8 alone is "
            "exported: train with INT8_DEFAULT_CFG."
        )
    unsigned = frozenset(name for name, state in quantizers.items() if state.get("_unsigned"))
    floats, ranges = read_amax(
        content.state,
        content.path,
        {"weight_quantizer": "weight", "input_quantizer": "input", "output_quantizer": "output"},
        unsigned,
    )
    return detector.checkpoint(FORMAT.name, content.path, floats, ranges)


def _quantizer_states(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return what ModelOpt's own state says of each quantizer; empty where the file does not hold it."""
    found: dict[str, Mapping[str, Any]] = {}
    modelopt = document.get("modelopt_state")
    for entry in modelopt.get("modelopt_state_dict", ()) if isinstance(modelopt, Mapping) else ():
        metadata = entry[1].get("metadata", {}) if len(entry) > 1 and isinstance(entry[1], Mapping) else {}
        states = metadata.get("quantizer_state", {})
        found |= {name: state for name, state in states.items() if isinstance(state, Mapping)}
    return found


FORMAT = Format(
    "NVIDIA ModelOpt",
    "LAYER.weight_quantizer._amax, LAYER.input_quantizer._amax",
    _recognised,
    _read,
    takes_prepare=False,
)
