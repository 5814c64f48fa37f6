"""Have the accuracy back without training: weights and scales that quantize better, as a checkpoint.

    RUN/mended/mended.pt      weights and encodings, for `qexport run --qat`
    RUN/mended/mended.json    what each means gave

The means are taken one after another, each on what the one before left: channels equalised, scales decided anew,
rounding learned, biases corrected. The signal to noise at the heads' outputs is measured on images that no means saw,
and a means that loses is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

import qexport
from qexport.encodings import ACTIVATIONS, PER_TENSOR, Encodings, QuantParams
from qexport.errors import QexportError
from qexport.files import json_bytes, write_json
from qexport.mend_results import NOTE, MeansResult, MendReport
from qexport.settings import WeightScales
from qexport.work import Work

if TYPE_CHECKING:
    from torch import Tensor

    from qexport.detectors.static import StaticDetector
    from qexport.quantization.partial import PartlyQuantized

FOLDER = "mended"
Means = Literal["equalize", "learn-rounding", "correct-bias"]
MEANS: tuple[Means, ...] = ("equalize", "learn-rounding", "correct-bias")
"""In the order in which they are taken."""


def mend(work: Work, means: Sequence[Means], *, images: int) -> tuple[MendReport, Path]:
    """Apply means against the loss of accuracy.

    Args:
        work: the run.
        means: which, in any order.
        images: of the calibration images, that the means see; as many again, or what is left, measure.

    Returns:
        What each gave, and the checkpoint.

    Raises:
        QexportError: weights that are not quantized, or too few calibration images to hold some out.
    """
    if work.encodings.scheme == ACTIVATIONS:
        raise QexportError(
            "mending is for quantized weights, and this run's stay float (--scheme activations). First: "
            f"qexport calibrate {work.path} --scheme int8"
        )
    samples = work.subject.calibration_samples()
    if len(samples) < 2:
        raise QexportError(
            "mending measures on images that it did not see, and there is one calibration image. "
            "Give more: qexport calibrate RUN --images 64"
        )
    seen = min(images, len(samples) // 2)
    frames = list(work.subject.inputs(samples[:seen]))
    held_out = list(work.subject.inputs(samples[seen : 2 * seen]))
    mending = _Mending(work, frames, held_out)
    best = mending.sqnr_db()
    results = [MeansResult(means="none", sqnr_db=best, changed="", kept=True)]
    for each in MEANS:
        if each not in means:
            continue
        before = mending.state()
        changed = mending.apply(each)
        found = mending.sqnr_db()
        results.append(MeansResult(means=each, sqnr_db=found, changed=changed, kept=found >= best))
        if found >= best:
            best = found
        else:
            mending.restore(before)
    report = MendReport(
        encodings_sha256=work.encodings.rows_sha256,
        images=seen,
        held_out=len(held_out),
        results=tuple(results),
    )
    path = mending.save(work.path / FOLDER / "mended.pt", report)
    write_json(work.path / FOLDER / "mended.json", report)
    return report, path


class _Mending:
    """The detector as it is after the means so far."""

    def __init__(
        self, work: Work, frames: Sequence[NDArray[np.generic]], held_out: Sequence[NDArray[np.generic]]
    ) -> None:
        from qexport.quantization.fold import fold_batch_norm, folded_pairs  # noqa: PLC0415 - torch begins here

        self._work, self._frames, self._held_out = work, frames, held_out
        self._pairs = folded_pairs(work.subject.static)
        self._folded = fold_batch_norm(work.subject.static)
        self.static: StaticDetector = work.subject.static
        self.encodings: Encodings = work.encodings

    def apply(self, means: Means) -> str:
        """Take one means; say what it changed."""
        steps = {
            "equalize": self._equalize,
            "learn-rounding": self._learn_rounding,
            "correct-bias": self._correct_biases,
        }
        return steps[means]()

    def state(self) -> tuple[StaticDetector, StaticDetector, Encodings]:
        """Return what a means changes, for `restore`."""
        return copy.deepcopy(self._folded), self.static, self.encodings

    def restore(self, state: tuple[StaticDetector, StaticDetector, Encodings]) -> None:
        """Undo what was done since `state`."""
        self._folded, self.static, self.encodings = state

    def sqnr_db(self) -> float:
        """Return the signal to noise at the heads' outputs on the images that were held out."""
        from qexport.benchmarks.sensitivity import measure_noise  # noqa: PLC0415 - torch begins here
        from qexport.quantization.partial import PartlyQuantized  # noqa: PLC0415
        from qexport.quantization.reference import quantize  # noqa: PLC0415

        quantized = quantize(self.static, self.encodings)
        _, db = measure_noise(quantized, PartlyQuantized(quantized), [], self._held_out)
        return float("inf") if db is None else db

    def save(self, path: Path, report: MendReport) -> Path:
        """Write the checkpoint, with what each means gave."""
        from qexport.training.state import save_result  # noqa: PLC0415 - torch begins here

        notes: dict[str, str | int | float] = {
            "means": ", ".join(result.means for result in report.results[1:] if result.kept),
            "images": len(self._frames),
            "qexport": qexport.__version__,
            NOTE: json_bytes(report).decode(),
        }
        return save_result(path, self._state(), self.encodings, notes)

    def _equalize(self) -> str:
        from qexport.calibration.calibrator import calibrate  # noqa: PLC0415 - torch begins here
        from qexport.calibration.means.equalization import equalize  # noqa: PLC0415

        weight_scales: WeightScales = "per-tensor" if self.encodings.scheme == PER_TENSOR else "per-channel"
        with self._work.progress("equalize channels", 2) as step:
            equal, links = equalize(self._folded, self._frames, weight_scales=weight_scales)
            step()
            self._take(equal.state_dict())
            settings, subject = self._work.settings, self._work.subject
            self.encodings = calibrate(
                self.static,
                subject.inputs(subject.calibration_samples()),
                observer=settings.observer,
                percentile=settings.percentile,
                weight_scales=weight_scales,
                keep_float=self._work.encodings.keep_float,
                notes={
                    k: v
                    for k, v in self._work.encodings.calibration.items()
                    if k not in ("observer", "images")
                },
            )
            step()
        return f"channels between {len(links)} layers and their readers"

    def _learn_rounding(self) -> str:
        import torch  # noqa: PLC0415

        from qexport.calibration.means.rounding import learn_rounding  # noqa: PLC0415 - torch begins here

        partly = self._partly()
        scales = {
            row.path: torch.tensor(row.params.scale)
            for row in self.encodings.rows
            if row.port == "weight" and isinstance(row.params, QuantParams)
        }
        weights = {path: self._tensor(f"{path}.weight") for path in partly.layers()}
        with self._work.progress("learn rounding", len(weights)) as step:
            rounded = learn_rounding(
                partly, weights, scales, self._frames, seed=self._work.settings.seed, on_layer=step
            )
        moved = sum(int((rounded[path] != _nearest(weights[path], scales[path])).sum()) for path in rounded)
        every = sum(weight.numel() for weight in weights.values())
        self._take({f"{path}.weight": weight for path, weight in rounded.items()})
        return f"{100 * moved / every:.1f} % of the weights round to another code"

    def _correct_biases(self) -> str:
        from qexport.calibration.means.bias import correct_biases  # noqa: PLC0415 - torch begins here

        partly = self._partly()
        there = self._folded.state_dict()
        biases = {path: self._tensor(f"{path}.bias") for path in partly.layers() if f"{path}.bias" in there}
        with self._work.progress("correct biases", len(partly.layers())) as step:
            corrected = correct_biases(partly, biases, self._frames, on_layer=step)
        self._take({f"{path}.bias": bias for path, bias in corrected.items()})
        return f"biases of {len(corrected)} layers"

    def _partly(self) -> PartlyQuantized:
        from qexport.quantization.partial import PartlyQuantized  # noqa: PLC0415 - torch begins here
        from qexport.quantization.reference import quantize  # noqa: PLC0415

        return PartlyQuantized(quantize(self.static, self.encodings))

    def _tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._folded.state_dict()[name]
        return tensor.detach().clone()

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        """Let the detector have these weights."""
        import torch  # noqa: PLC0415 - torch begins here

        from qexport.detectors.fingerprint import fingerprint  # noqa: PLC0415
        from qexport.detectors.static import make_static  # noqa: PLC0415
        from qexport.training.state import with_state  # noqa: PLC0415

        with torch.no_grad():
            own = self._folded.state_dict()
            for name, tensor in tensors.items():
                own[name].copy_(tensor)
        settings, subject = self._work.settings, self._work.subject
        self.static = make_static(
            with_state(subject.loaded.module, self._state()),
            frame_px=subject.frame_px,
            proposals=settings.proposals,
            detections=settings.detections,
            preprocess=settings.preprocess,
        )
        self.encodings = msgspec.structs.replace(self.encodings, detector_sha256=fingerprint(self.static))

    def _state(self) -> dict[str, Tensor]:
        from qexport.training.state import trained_state  # noqa: PLC0415 - torch begins here

        weights = {
            name: tensor
            for name, tensor in self._folded.state_dict().items()
            if name.endswith((".weight", ".bias"))
        }
        return trained_state(self._work.subject.loaded.module, self._pairs, weights)


def _nearest(weight: Tensor, scale: Tensor) -> Tensor:
    """Return the weights rounded to the nearest code, as real values."""
    import torch  # noqa: PLC0415 - torch begins here

    steps = scale.reshape(-1, *[1] * (weight.dim() - 1))
    return torch.clamp(torch.round(weight / steps), -127, 127) * steps
