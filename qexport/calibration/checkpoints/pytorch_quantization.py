"""NVIDIA pytorch-quantization, ModelOpt's predecessor: `quant_modules.initialize()`, QuantConv2d, QuantLinear."""

from __future__ import annotations

from qexport.calibration.checkpoints.amax import holds, read_amax
from qexport.calibration.checkpoints.content import Content
from qexport.calibration.checkpoints.format import Detector, Format
from qexport.calibration.checkpoints.ranges import QatCheckpoint


def _recognised(content: Content) -> bool:
    return holds(content.state, "_weight_quantizer") or holds(content.state, "_input_quantizer")


def _read(content: Content, detector: Detector, prepare: str | None) -> QatCheckpoint:
    del prepare
    floats, ranges = read_amax(
        content.state, content.path, {"_weight_quantizer": "weight", "_input_quantizer": "input"}
    )
    return detector.checkpoint(FORMAT.name, content.path, floats, ranges)


FORMAT = Format(
    "NVIDIA pytorch-quantization",
    "LAYER._weight_quantizer._amax, LAYER._input_quantizer._amax",
    _recognised,
    _read,
    takes_prepare=False,
)
