"""The run's detector at several numbers of proposals: what each costs in mAP and saves in time.

    RUN/TARGET/proposals/N/             its int8 artifact, parity.json, complexity.json
    RUN/detections/TARGET-N-proposals.json
    RUN/TARGET/proposals.json           mAP over the number of proposals
    RUN/TARGET/proposals_latency.json   latency of each

All of them are made of the run's own table of encodings: its rows are of feature maps, which do not change with the
number of proposals, and the fingerprint that ties table and detector together leaves that number out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from qexport import steps
from qexport.artifact import MANIFEST, Artifact, load_artifact, save_artifact
from qexport.devices import has_device, runner_for
from qexport.engines import FOLDER, RECORD, EngineRecord, load_engines
from qexport.errors import QexportError, RunFolderError
from qexport.files import read_json, sha256_json, write_json
from qexport.layers import Layer
from qexport.results import Complexity, ImageDetections, ParityReport, ProposalCurve, ProposalLatency
from qexport.work import Work

if TYPE_CHECKING:
    from qexport.benchmarks.proposals import Variant
    from qexport.detectors.static import StaticDetector
    from qexport.quantization.reference import QuantizedDetector

CURVE = "proposals.json"
LATENCY = "proposals_latency.json"
VARIANTS = "proposals"
_INT8 = "int8"


def measure_proposals(
    work: Work,
    target: str,
    numbers: Sequence[int],
    *,
    own: Variant,
    own_detections: Sequence[ImageDetections],
    runs: int,
    warmup: int,
    threads: int,
) -> tuple[ProposalCurve, ProposalLatency | None]:
    """Measure the detector at each number of proposals; numbers that were measured before are taken as they are.

    Args:
        work: the run.
        target: its name.
        numbers: of proposals, as `check_numbers` lets them pass; the run's own is always among the points.
        own: the run's own artifact.
        own_detections: what it detects on the evaluation split.
        runs: measured runs of each.
        warmup: runs before them that do not count.
        threads: of the runtime.

    Returns:
        The curve, and its latency; None where the target's device is not here.

    Raises:
        ExportError: an artifact, read back, is not what the encodings say.
        ParityError: nothing could be compared.
    """
    variants, detections = [own], {own.proposals: own_detections}
    for number in sorted(set(numbers) - {own.proposals}, reverse=True):
        variant = _make_variant(work, target, number)
        variants.append(variant)
        subject = _subject(target, number)
        detections[number] = steps.detect_artifact(work, subject, variant.artifact, variant.folder)
    variants.sort(key=lambda variant: -variant.proposals)
    curve = _curve(work, variants, detections, own=own)
    if not has_device(target):
        return curve, None
    return curve, _latency(work, variants, runs=runs, warmup=warmup, threads=threads)


def check_numbers(work: Work, numbers: Sequence[int]) -> None:
    """Refuse numbers of proposals that the run's detector cannot be measured with.

    Raises:
        QexportError: none at all, one below 1, one given twice, or one above what the RPN ranks.
    """
    from qexport.benchmarks.proposals import require_numbers  # noqa: PLC0415 - torch begins here

    require_numbers(numbers)
    # The static form holds as many as its RPN keeps before NMS, and no more.
    most = _static(work, max(numbers)).proposals
    if most < max(numbers):
        height, width = work.subject.frame_px
        raise QexportError(
            f"{max(numbers)} proposals: on a {height}x{width} frame this detector's RPN keeps {most} boxes before "
            f"NMS, so that there are never more. Give numbers from 1 to {most}."
        )


def _make_variant(work: Work, target: str, number: int) -> Variant:
    """Export the detector with that number of proposals and compare it with its references."""
    from qexport.benchmarks.proposals import Variant  # noqa: PLC0415 - torch begins here

    form, subject = _Form(work, number), _subject(target, number)
    place = f"{target}/{VARIANTS}/{number}"
    folder = work.path / place

    def export() -> None:
        artifact = steps.export_artifact(
            work, target, folder, static=form.static, quantized=form.quantized, title=f"export {subject}"
        )
        _keep_int8_alone(artifact, folder)

    def compare() -> None:
        steps.compare_artifact(
            work, target, folder, quantized=form.quantized, layers=form.layers(), title=f"compare {subject}"
        )

    inputs = {
        "encodings": work.folder.digest("encodings.json"),
        "detector": work.folder.digest("detector.json"),
        "options": steps.options_of(work, target),
        "proposals": number,
    }
    int8 = work.artifact(target)[0].file(_INT8).name
    outputs = [f"{place}/{name}" for name in (MANIFEST, int8, "complexity.json")]
    work.folder.stage(f"export.{subject}", inputs, outputs, export)
    artifact, _ = load_artifact(folder)
    inputs = steps.inputs_of_compare(work, artifact)
    work.folder.stage(f"compare.{subject}", inputs, [f"{place}/parity.json"], compare)
    return Variant(
        artifact=artifact,
        folder=folder,
        macs=read_json(folder / "complexity.json", Complexity, RunFolderError).macs,
        parity=read_json(folder / "parity.json", ParityReport, RunFolderError),
    )


def _keep_int8_alone(artifact: Artifact, folder: Path) -> None:
    """Drop the float baselines: beside one artifact that is whole they would only fill the disk."""
    engines = load_engines(folder).engines
    kept_engines = tuple(engine for engine in engines if engine.role == _INT8)
    # An engine for a DLA core is built from the float file.
    roles = {_INT8, *(engine.source for engine in kept_engines)}
    files = tuple(file for file in artifact.files if file.role in roles)
    save_artifact(msgspec.structs.replace(artifact, files=files), folder)
    for file in artifact.files:
        if file not in files:
            (folder / file.name).unlink()
    if engines:
        write_json(folder / FOLDER / RECORD, EngineRecord(engines=kept_engines))
    for engine in engines:
        if engine not in kept_engines:
            (folder / FOLDER / engine.name).unlink()


def _curve(
    work: Work,
    variants: Sequence[Variant],
    detections: Mapping[int, Sequence[ImageDetections]],
    *,
    own: Variant,
) -> ProposalCurve:
    from qexport.benchmarks.detect import to_arrays  # noqa: PLC0415 - torch begins here
    from qexport.benchmarks.proposals import draw_curve  # noqa: PLC0415

    target, dataset, seed = own.artifact.target, work.subject.evaluation, work.settings.seed
    name = f"{target}/{CURVE}"

    def write() -> None:
        with work.progress(f"proposals {target}", 1) as step:
            boxes = {number: [to_arrays(image) for image in images] for number, images in detections.items()}
            curve = draw_curve(variants, boxes, dataset, own=own, seed=seed, on_step=step)
        work.folder.discard(f"bench.{target}-proposals")  # a report never holds times of two curves
        write_json(work.folder.file(name), curve)

    inputs = {
        "artifacts": [[one.proposals, one.artifact.sha256, one.macs, one.parity] for one in variants],
        "detections": [sha256_json(detections[one.proposals]) for one in variants],
        "options": [own.proposals, dataset.sha256, seed],
    }
    work.folder.stage(f"evaluate.{target}-proposals", inputs, [name], write)
    return read_json(work.folder.file(name), ProposalCurve, RunFolderError)


def _latency(
    work: Work, variants: Sequence[Variant], *, runs: int, warmup: int, threads: int
) -> ProposalLatency:
    from qexport.benchmarks.proposals import time_curve  # noqa: PLC0415 - torch begins here

    target = variants[0].artifact.target
    name = f"{target}/{LATENCY}"

    def write() -> None:
        frame = next(work.subject.frames(work.subject.parity_samples()))
        with work.progress(f"bench {target} proposals", warmup + runs) as step:
            latency = time_curve(
                variants,
                runner_for(target),
                np.ascontiguousarray(frame),
                warmup=warmup,
                runs=runs,
                threads=threads,
                on_run=step,
            )
        write_json(work.folder.file(name), latency)

    inputs = {"artifacts": [one.artifact.sha256 for one in variants], "options": [runs, warmup, threads]}
    work.folder.stage(f"bench.{target}-proposals", inputs, [name], write)
    return read_json(work.folder.file(name), ProposalLatency, RunFolderError)


class _Form:
    """The run's detector with another number of proposals; made when a stage needs it."""

    def __init__(self, work: Work, number: int) -> None:
        self._work, self._number = work, number

    @cached_property
    def static(self) -> StaticDetector:
        return _static(self._work, self._number)

    @cached_property
    def quantized(self) -> QuantizedDetector:
        from qexport.quantization.reference import quantize  # noqa: PLC0415 - torch begins here

        return quantize(self.static, self._work.encodings)

    def layers(self) -> tuple[Layer, ...]:
        from qexport.quantization.inspection import inspect_layers  # noqa: PLC0415 - torch begins here

        return inspect_layers(self.static, keep_float=self._work.settings.keep_float)


def _static(work: Work, number: int) -> StaticDetector:
    """Return the run's static form with another number of proposals."""
    from qexport.detectors.static import make_static  # noqa: PLC0415 - torch begins here

    settings, subject = work.settings, work.subject
    return make_static(
        subject.loaded.module,
        frame_px=subject.frame_px,
        proposals=number,
        detections=settings.detections,
        preprocess=settings.preprocess,
    )


def _subject(target: str, number: int) -> str:
    return f"{target}-{number}-proposals"
