"""The number of proposals as a knob: what fewer of them cost in mAP, and what they save in time.

The box head runs once for each proposal, so their number is what latency depends on most after the size of the
frame. Everything else is kept: weights, encodings, images, and the order in which the RPN ranks its boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from qexport.artifact import Artifact
from qexport.benchmarks.accuracy import evaluate
from qexport.benchmarks.latency import SETTLE_S, interleave, summarise
from qexport.benchmarks.machine import describe_machine
from qexport.detections import Detections
from qexport.errors import QexportError
from qexport.results import (
    Accuracy,
    ParityReport,
    ProposalCurve,
    ProposalLatency,
    ProposalPoint,
    ProposalTime,
)
from qexport.runtimes.runner import Runner
from qexport.samples import Dataset

INT8 = "int8"


@dataclass(frozen=True, slots=True)
class Variant:
    """The detector with one number of proposals, exported to a target."""

    artifact: Artifact
    folder: Path
    macs: int
    parity: ParityReport

    @property
    def proposals(self) -> int:
        """How many proposals its box head sees."""
        return self.artifact.proposals


def require_numbers(numbers: Sequence[int]) -> None:
    """Refuse numbers of proposals that make no curve.

    Raises:
        QexportError: there is none, one is below 1, or one is given twice.
    """
    if not numbers:
        raise QexportError("no number of proposals to measure with; expected some, as in 300,200,100.")
    small = [number for number in numbers if number < 1]
    if small:
        raise QexportError(
            f"{small[0]} proposals: a detector without proposals finds nothing; expected 1 or more."
        )
    twice = sorted({number for number in numbers if numbers.count(number) > 1}, reverse=True)
    if twice:
        raise QexportError(f"{twice[0]} proposals are asked for more than once; give each number once.")


def draw_curve(
    variants: Sequence[Variant],
    detections: Mapping[int, Sequence[Detections]],
    dataset: Dataset,
    *,
    own: Variant,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> ProposalCurve:
    """Measure mAP of every variant, and its change from the run's own number of proposals.

    Args:
        variants: most proposals first, `own` among them.
        detections: of each, by its number of proposals: one per sample, boxes in pixels of the sample's image.
        dataset: the split that they were made on.
        own: the run's own artifact.
        seed: of the bootstrap over images.
        on_step: called once, when all is measured.

    Raises:
        DatasetError: no annotated boxes, or a label that the dataset does not have.
        ParityError: a variant has not one result per image.
        TargetUnavailable: pycocotools is not installed.
    """
    baseline = str(own.proposals)
    others = [str(variant.proposals) for variant in variants if variant is not own]
    found = {name: detections[int(name)] for name in (baseline, *others)}
    # The curve shows a price and sets none: nothing falls by more than everything.
    report = evaluate(dataset, found, seed=seed, max_drop=1.0, baseline=baseline)
    measured = {subject.subject: subject for subject in report.subjects}
    on_step()
    return ProposalCurve(
        target=own.artifact.target,
        artifact_sha256=own.artifact.sha256,
        encodings_sha256=own.artifact.encodings_sha256,
        own_proposals=own.proposals,
        dataset=report.dataset,
        dataset_sha256=report.dataset_sha256,
        split=report.split,
        images=report.images,
        points=tuple(_point(variant, measured[str(variant.proposals)]) for variant in variants),
        rung=own.parity.rung,
    )


def time_curve(
    variants: Sequence[Variant],
    runner: type[Runner],
    frame: NDArray[np.uint8],
    *,
    warmup: int,
    runs: int,
    threads: int,
    on_run: Callable[[], None] = lambda: None,
) -> ProposalLatency:
    """Time every variant in turns on one frame, so that a busy or throttled machine hits all alike.

    Args:
        variants: most proposals first.
        runner: the class that runs them.
        frame: (H, W, 3) uint8 RGB, of the size that the artifacts declare.
        warmup: rounds that are not counted.
        runs: rounds that are.
        threads: of the runtime.
        on_run: called after each round.

    Raises:
        QexportError: nothing would be measured with these numbers.
        TargetUnavailable: the runtime or its device is missing.
    """
    if warmup < 0 or runs < 1 or threads < 1:
        raise QexportError(
            f"latency: {runs} runs after {warmup} for warm-up with {threads} threads; expected at least 1 run, "
            "0 for warm-up and 1 thread."
        )
    with ExitStack() as stack:
        contenders: dict[str, Callable[[], object]] = {}
        for variant in variants:
            running = stack.enter_context(runner(variant.folder, role=INT8, threads=threads))
            contenders[str(variant.proposals)] = partial(running.infer, frame)
        settle_s = SETTLE_S if threads > 1 else 0.0
        times = interleave(contenders, warmup=warmup, runs=runs, settle_s=settle_s, on_run=on_run)
    return ProposalLatency(
        target=variants[0].artifact.target,
        machine=describe_machine(),
        threads=threads,
        warmup=warmup,
        measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        points=tuple(
            ProposalTime(
                proposals=variant.proposals,
                artifact_sha256=variant.artifact.sha256,
                stats=summarise(times[str(variant.proposals)]),
            )
            for variant in variants
        ),
    )


def _point(variant: Variant, accuracy: Accuracy) -> ProposalPoint:
    subject = f"{variant.artifact.target}, {variant.proposals} proposals"
    return ProposalPoint(
        proposals=variant.proposals,
        artifact_sha256=variant.artifact.sha256,
        int8_bytes=variant.artifact.file(INT8).size_bytes,
        macs=variant.macs,
        voc_map50=accuracy.voc_map50,
        coco_map=accuracy.coco_map,
        voc_map50_interval=accuracy.voc_map50_interval,
        coco_map_interval=accuracy.coco_map_interval,
        voc_change_interval=accuracy.voc_drop_interval,
        coco_change_interval=accuracy.coco_drop_interval,
        gates=tuple(msgspec.structs.replace(gate, subject=subject) for gate in variant.parity.gates),
    )
