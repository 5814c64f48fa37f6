"""Eager QAT of torch.ao.quantization: QuantStub, DeQuantStub, fused modules, a fake quantizer inside every layer."""

from __future__ import annotations

import dataclasses

from qexport.calibration.checkpoints.content import Content
from qexport.calibration.checkpoints.fake_quant import (
    ACTIVATION,
    fake_quants,
    float_state,
    is_numbered,
    ranges_of,
    without_wrappers,
)
from qexport.calibration.checkpoints.format import Detector, Format
from qexport.calibration.checkpoints.prepared import load_prepared
from qexport.calibration.checkpoints.ranges import QatCheckpoint


def _recognised(content: Content) -> bool:
    found = fake_quants(content.state)
    own = any(name.endswith(ACTIVATION) or name == ACTIVATION[1:] for name in found)
    weights = any(name.endswith(".weight_fake_quant") for name in found)
    return (own or weights) and not any(is_numbered(name) for name in found)


def _read(content: Content, detector: Detector, prepare: str | None) -> QatCheckpoint:
    prepared = load_prepared(prepare, content.state, content.path) if prepare else None
    keys = without_wrappers(content.state)
    state = {key: content.state[own] for key, own in keys.items()}
    floats, fused = float_state(state, detector.norms, content.path)
    ranges = ranges_of(fake_quants(state), fused, prepared, content.path, floats)
    named = tuple(dataclasses.replace(entry, buffer=keys[entry.buffer]) for entry in ranges)
    return detector.checkpoint(FORMAT.name, content.path, floats, named)


FORMAT = Format(
    "PyTorch eager QAT",
    "LAYER.weight_fake_quant.scale, LAYER.activation_post_process.scale",
    _recognised,
    _read,
)
