"""A detector with the weights of a QAT checkpoint in it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from qexport.calibration.checkpoints import QatCheckpoint, format_of, read_checkpoint
from qexport.detectors.load import LoadedDetector, load_detector
from qexport.detectors.weights import apply_weights, check_finite
from qexport.errors import CheckpointError
from qexport.files import sha256_file, sha256_json

DEMO = "demo"


def load_trained(
    source: str, qat: Path, *, weights: Path | None, prepare: str | None, seed: int
) -> tuple[LoadedDetector, QatCheckpoint]:
    """Build the detector that `source` names, with the weights of a QAT checkpoint; return both.

    Args:
        source: as for `load_detector`.
        qat: the checkpoint.
        weights: for a format that has scales alone; another's own weights are taken in any case.
        prepare: `FILE:FUNCTION` of the user's, which is run.
        seed: while the factory runs.

    Raises:
        CheckpointError: as `load_detector` and `read_checkpoint`; no weights where the checkpoint has none.
    """
    kind = format_of(qat)
    if not kind.has_weights and weights is None and source != DEMO:
        raise CheckpointError(
            f"{qat} ({kind.name}) holds scales alone. Give the weights that they were made with: --weights FILE."
        )
    loaded = load_detector(source, None if kind.has_weights else weights, seed=seed)
    checkpoint = read_checkpoint(qat, loaded.module, prepare=prepare)
    digest = sha256_file(qat)
    if checkpoint.state is None:
        return dataclasses.replace(
            loaded, weights_sha256=sha256_json([loaded.weights_sha256, digest])
        ), checkpoint
    check_finite(checkpoint.state, str(qat))
    apply_weights(loaded.module, checkpoint.state, source=str(qat))
    return dataclasses.replace(loaded, weights_sha256=digest, random_weights=False), checkpoint
