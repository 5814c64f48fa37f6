"""Encodings from a QAT checkpoint: its own scales to the bit, and what it does not say filled or calibrated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qexport.calibration.calibrator import (
    Observed,
    activation_rows,
    make_row,
    name_scheme,
    raise_for_bias,
    show,
    show_and_choose,
    to_floats,
    watch,
    weight_rows,
)
from qexport.calibration.checkpoints.ranges import QatCheckpoint
from qexport.calibration.claims import Claims
from qexport.calibration.expression import Expressed
from qexport.detectors.fingerprint import fingerprint
from qexport.detectors.static import StaticDetector
from qexport.encodings import WEIGHT_RANGE, EncodingRow, Encodings, QuantParams, digest_of_rows, origin_of
from qexport.errors import CalibrationError, CheckpointError
from qexport.observer_results import ObserverReport
from qexport.quantization.observers import name_observer
from qexport.settings import ObserverName, Scheme, WeightScales

_LISTED = 60


def encodings_from_checkpoint(
    static: StaticDetector,
    checkpoint: QatCheckpoint,
    frames: Iterable[NDArray[np.generic]],
    *,
    strict: bool = False,
    observer: ObserverName = "min-max",
    percentile: float = 99.99,
    scheme: Scheme = "int8",
    weight_scales: WeightScales = "per-channel",
    keep_float: tuple[str, ...] = (),
    notes: Mapping[str, str | int | float] | None = None,
    on_image: Callable[[], None] = lambda: None,
    on_choice: Callable[[ObserverReport], None] = lambda _: None,
) -> Encodings:
    """Decide the quantization of a static detector by the scales that it was trained with.

    Args:
        static: the detector, with the checkpoint's weights in it; it is not changed.
        checkpoint: as read.
        frames: as for `calibrate`; looked at only where a tensor has no scale in the checkpoint.
        strict: refuse rows that the checkpoint does not say, or that int8 with zero point 0 cannot express.
        observer: for the tensors that the checkpoint does not say.
        percentile: for the observer of that name.
        scheme: whether weights are quantized too.
        weight_scales: of the weights that the checkpoint does not say.
        keep_float: patterns of module paths that stay float.
        notes: what else the table should say of its origin.
        on_image: called after each frame.
        on_choice: called with what `auto` came to, where something was left to choose.

    Raises:
        CheckpointError: scales of another detector, quantizers that never saw data, or, with `strict`, rows that are
            filled or requantized.
        CalibrationError: no frames where some are needed, a pattern that matches nothing, or values not finite.
    """
    own = _checked_fingerprint(static, checkpoint)
    observed = watch(static, observer=observer, percentile=percentile, scheme=scheme, keep_float=keep_float)
    claims = Claims(static, observed, checkpoint)
    trained, weights = claims.activations(), claims.weights()
    unsaid = _unsaid(observed, trained, weights, checkpoint)
    if strict and unsaid:
        advice = "Quantize them in training, keep them in float with --keep-float, or leave --strict out"
        raise CheckpointError(
            f"{checkpoint.path}: --strict, and the checkpoint does not say {len(unsaid)} scales:\n{_listed(unsaid)}\n"
            + " ".join((*checkpoint.notes, f"{advice}: they are calibrated then, and each row says so."))
        )
    needed = any(not key.endswith("/weight") for key in unsaid)
    if needed and observer == "auto":
        fixed = {key: said.scale[0] for key, said in trained.items()}
        images, report = show_and_choose(observed, frames, on_image, fixed)
        on_choice(report)
    else:
        images = _show(observed, frames, on_image, needed=needed, empty=static.example_input())
    rows = _rows(observed, trained, weights, weight_scales)
    if strict:
        _refuse_requantized(rows, checkpoint)
    origin: dict[str, str | int | float] = {
        "observer": name_observer(observer, percentile) if images else "none",
        "images": images,
        "qat": checkpoint.format,
        "qat scales not used": len({entry.buffer for entry in checkpoint.ranges} - claims.used),
    }
    if checkpoint.notes:
        origin["qat note"] = " ".join(checkpoint.notes)
    return Encodings(
        detector_sha256=own,
        scheme=name_scheme(rows, scheme),
        calibration={**origin, **(notes or {})},
        keep_float=keep_float,
        rows=rows,
        float_rows=observed.float_rows,
        rows_sha256=digest_of_rows(rows, observed.float_rows),
    )


def _checked_fingerprint(static: StaticDetector, checkpoint: QatCheckpoint) -> str:
    own = fingerprint(static)
    if checkpoint.detector_sha256 not in ("", own):
        raise CheckpointError(
            f"{checkpoint.path}: its scales are of another detector (fingerprint {checkpoint.detector_sha256[:12]}, "
            f"this one's is {own[:12]}): weights, layers or image size differ. Give the weights and the --frame that "
            "the scales were made with."
        )
    return own


def _unsaid(
    observed: Observed,
    trained: Mapping[str, Expressed],
    weights: Mapping[str, Expressed],
    checkpoint: QatCheckpoint,
) -> list[str]:
    """Return the keys of the rows that the checkpoint does not say."""
    wanted = [key for key, _ in observed.activations() if key not in trained]
    wanted += [key for key, _, _ in observed.weights() if key not in weights]
    if not trained and not weights:
        raise CheckpointError(
            f"{checkpoint.path}: none of its {len(checkpoint.ranges)} scales is of a tensor that this detector "
            f"quantizes. {' '.join(checkpoint.notes) or 'Give the factory of the training run with --model.'}"
        )
    return list(dict.fromkeys(wanted))


def _show(
    observed: Observed,
    frames: Iterable[NDArray[np.generic]],
    on_image: Callable[[], None],
    *,
    needed: bool,
    empty: Tensor,
) -> int:
    """Let the observers see the frames, where one of them is needed, else an empty one: weights are seen anyhow."""
    if not needed:
        show(observed, [empty.numpy()])
        return 0
    images = show(observed, frames, on_image)
    if images == 0:
        raise CalibrationError(
            "no image to calibrate with, and the checkpoint does not say every scale: choose another "
            "--calibration-split or folder."
        )
    return images


def _rows(
    observed: Observed,
    trained: Mapping[str, Expressed],
    weights: Mapping[str, Expressed],
    weight_scales: WeightScales,
) -> tuple[EncodingRow, ...]:
    activations = [
        msgspec.structs.replace(row, params=QuantParams(said.scale), source=said.source)
        if (said := trained.get(row.key)) is not None
        else row
        for row in activation_rows(observed, "calibrated ")
    ]
    scales = {row.key: row.params.scale[0] for row in activations}
    nodes = {key: node for key, node, _ in observed.weights()}
    rows = []
    for row in weight_rows(observed, scales, weight_scales):
        said = weights.get(row.key)
        if said is None:
            rows.append(msgspec.structs.replace(row, source=f"calibrated {row.source}"))
            continue
        raised, changed = raise_for_bias(observed, nodes[row.key], torch.tensor(said.scale), scales)
        text = said.source
        if changed:
            text = f"requantized: {text.partition(': ')[2]}; {changed} channels raised for the bias"
        params = QuantParams(to_floats(raised), qmin=WEIGHT_RANGE[0], qmax=WEIGHT_RANGE[1], axis=0)
        rows.append(make_row(row.key, params, text))
    return (*activations, *rows)


def _refuse_requantized(rows: tuple[EncodingRow, ...], checkpoint: QatCheckpoint) -> None:
    changed = [f"{row.key}: {row.source}" for row in rows if origin_of(row) == "requantized"]
    if changed:
        raise CheckpointError(
            f"{checkpoint.path}: --strict, and {len(changed)} of {len(rows)} scales are not the checkpoint's:\n"
            f"{_listed(changed)}\nTrain with symmetric int8 activations (codes -128 to 127, zero point 0) and weights "
            "of codes -127 to 127, or leave --strict out: the rows say what was given away."
        )


def _listed(names: list[str]) -> str:
    lines = [f"  {name}" for name in names[:_LISTED]]
    more = len(names) - _LISTED
    return "\n".join(lines + ([f"  and {more} more"] if more > 0 else []))
