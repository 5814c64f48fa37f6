"""FX QAT of torch.ao.quantization: `prepare_qat_fx`, on the detector or on its parts.

The quantizers of activations belong to nodes of a graph and are numbered; without the graph only the weights' can be
placed.
"""

from __future__ import annotations

from qexport.calibration.checkpoints.content import Content
from qexport.calibration.checkpoints.fake_quant import (
    WEIGHT,
    fake_quants,
    float_state,
    is_numbered,
    ranges_of,
)
from qexport.calibration.checkpoints.format import Detector, Format
from qexport.calibration.checkpoints.prepared import load_prepared
from qexport.calibration.checkpoints.ranges import QatCheckpoint


def _recognised(content: Content) -> bool:
    found = fake_quants(content.state)
    return any(map(is_numbered, found)) and any(name.endswith(WEIGHT) for name in found)


def _read(content: Content, detector: Detector, prepare: str | None) -> QatCheckpoint:
    prepared = load_prepared(prepare, content.state, content.path) if prepare else None
    floats, fused = float_state(content.state, detector.norms, content.path)
    found = fake_quants(content.state)
    ranges = ranges_of(found, fused, prepared, content.path, floats)
    numbered = [name for name in found if is_numbered(name)]
    notes = (
        ()
        if prepared
        else (
            f"{len(numbered)} scales of activations ({numbered[0]} and others) belong to nodes of a graph that the "
            "file does not hold, and were left out. Give the function that prepared the model: "
            "--qat-prepare FILE:FUNCTION.",
        )
    )
    return detector.checkpoint(FORMAT.name, content.path, floats, ranges, notes)


FORMAT = Format(
    "PyTorch FX QAT", "LAYER.weight_fake_quant.scale, activation_post_process_N.scale", _recognised, _read
)
