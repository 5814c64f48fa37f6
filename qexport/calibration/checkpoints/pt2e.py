"""PT2E QAT of torchao: `prepare_qat_pt2e`, on the detector's parts.

All quantizers are numbered, the weights' too: nothing can be placed without the graph.
"""

from __future__ import annotations

from qexport.calibration.checkpoints.content import Content
from qexport.calibration.checkpoints.fake_quant import fake_quants, float_state, is_numbered, ranges_of
from qexport.calibration.checkpoints.format import Detector, Format
from qexport.calibration.checkpoints.prepared import load_prepared
from qexport.calibration.checkpoints.ranges import QatCheckpoint
from qexport.errors import CheckpointError


def _recognised(content: Content) -> bool:
    found = fake_quants(content.state)
    return bool(found) and all(map(is_numbered, found))


def _read(content: Content, detector: Detector, prepare: str | None) -> QatCheckpoint:
    if prepare is None:
        raise CheckpointError(
            f"{content.path}: a PT2E QAT checkpoint. Its quantizers are numbered (activation_post_process_0, ...), and "
            "only the prepared graph knows to which tensors they belong. Give the function that prepared the model: "
            "--qat-prepare FILE:FUNCTION."
        )
    prepared = load_prepared(prepare, content.state, content.path)
    floats, fused = float_state(content.state, detector.norms, content.path)
    ranges = ranges_of(fake_quants(content.state), fused, prepared, content.path, floats)
    return detector.checkpoint(FORMAT.name, content.path, floats, ranges)


FORMAT = Format("PyTorch PT2E QAT", "activation_post_process_N.scale alone", _recognised, _read)
