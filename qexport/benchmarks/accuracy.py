"""Accuracy before and after: VOC and COCO mAP of every subject on one split, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qexport.benchmarks import coco, voc
from qexport.benchmarks.matches import Matches, draw_images, labels_of, mean_over_classes
from qexport.dataset import require_boxes
from qexport.detections import Detections
from qexport.errors import DatasetError, ParityError
from qexport.results import Accuracy, AccuracyReport, ClassAccuracy, Gate, Interval
from qexport.samples import Dataset

BASELINE = "eager"
_LEVEL = 0.95
# A fall of exactly the limit passes, whatever the last bit of a float says.
_ROUNDING = 1e-9


def evaluate(
    dataset: Dataset,
    detections: Mapping[str, Sequence[Detections]],
    *,
    bootstrap: int = 200,
    seed: int = 0,
    max_drop: float,
    baseline: str = BASELINE,
    ungated: Collection[str] = (),
) -> AccuracyReport:
    """Measure every subject on one split.

    The intervals are percentile bootstraps over images. All subjects see the same resamples, so the interval
    of a difference is paired: what is hard about an image cancels out.

    Args:
        dataset: the annotated images.
        detections: per subject, the baseline first, one per sample in the dataset's order; boxes in pixels of
            the sample's image.
        bootstrap: resamples.
        seed: of the resampling.
        max_drop: largest fall of either mAP from the baseline that passes, as a fraction.
        baseline: the subject that the others are compared with.
        ungated: subjects that are measured beside the others, and held to nothing.

    Raises:
        DatasetError: no annotated boxes, or a label that the dataset does not have.
        ParityError: the baseline is not first, a subject has not one result per image, or a box or score is not
            finite.
        TargetUnavailable: pycocotools is not installed.
    """
    require_boxes(dataset)
    _check(dataset, detections, bootstrap, baseline)
    weights = draw_images(len(dataset.samples), bootstrap, seed)
    measured = [_measure(dataset, subject, found, weights) for subject, found in detections.items()]
    subjects = tuple(_accuracy(dataset, item, measured[0]) for item in measured)
    held = [subject for subject in subjects[1:] if subject.subject not in ungated]
    gates = [gate for subject in held for gate in _gates(subjects[0], subject, max_drop)]
    return AccuracyReport(
        dataset=dataset.name,
        dataset_sha256=dataset.sha256,
        split=dataset.split,
        images=len(dataset.samples),
        objects=sum(not box.ignored for sample in dataset.samples for box in sample.boxes),
        dropped_boxes=len(dataset.dropped),
        subjects=subjects,
        gates=tuple(gates),
    )


def mean_average_precisions(dataset: Dataset, found: Sequence[Detections]) -> tuple[float, float]:
    """Return VOC mAP at 0.5 (all points) and COCO mAP of one subject, without intervals.

    Args:
        dataset: the annotated images.
        found: one per sample, boxes in pixels of the sample's image.

    Raises:
        DatasetError: no annotated boxes.
        TargetUnavailable: pycocotools is not installed.
    """
    require_boxes(dataset)
    matches = [voc.match_voc(dataset, found, label) for label in labels_of(dataset)]
    whole = matches[0].whole
    by_class = np.stack([voc.ap_all_points(item, whole)[0] for item in matches])
    _, by_threshold = coco.mean_average_precision(coco.match_coco(dataset, found).everything, whole)
    return float(mean_over_classes(by_class)), float(by_threshold[:, 0].mean())


@dataclass(frozen=True, slots=True, eq=False)
class _Measured:
    """One subject: matches per class, and mAP over the B resamples."""

    subject: str
    voc: tuple[Matches, ...]
    coco: coco.CocoMatches
    voc_resampled: NDArray[np.float64]
    coco_resampled: NDArray[np.float64]


def _measure(
    dataset: Dataset, subject: str, found: Sequence[Detections], weights: NDArray[np.int64]
) -> _Measured:
    voc_matches = tuple(voc.match_voc(dataset, found, label) for label in labels_of(dataset))
    coco_matches = coco.match_coco(dataset, found)
    by_class = np.stack([voc.ap_all_points(matches, weights) for matches in voc_matches])
    _, by_threshold = coco.mean_average_precision(coco_matches.everything, weights)
    return _Measured(
        subject, voc_matches, coco_matches, mean_over_classes(by_class), by_threshold.mean(axis=0)
    )


def _accuracy(dataset: Dataset, item: _Measured, baseline: _Measured) -> Accuracy:
    whole = item.voc[0].whole
    all_points = np.stack([voc.ap_all_points(matches, whole)[0] for matches in item.voc])
    eleven = np.stack([voc.ap_11_points(matches, whole)[0] for matches in item.voc])
    by_class, by_threshold = coco.mean_average_precision(item.coco.everything, whole)
    drops = item is not baseline
    return Accuracy(
        subject=item.subject,
        voc_map50=float(mean_over_classes(all_points)),
        voc_map50_11point=float(mean_over_classes(eleven)),
        coco_map=float(by_threshold[:, 0].mean()),
        coco_map50=float(by_threshold[coco.IOU_50, 0]),
        coco_map75=float(by_threshold[coco.IOU_75, 0]),
        coco_map_small=_coco_map(item.coco.small),
        coco_map_medium=_coco_map(item.coco.medium),
        coco_map_large=_coco_map(item.coco.large),
        voc_map50_interval=_interval(item.voc_resampled),
        coco_map_interval=_interval(item.coco_resampled),
        voc_drop_interval=_interval(item.voc_resampled - baseline.voc_resampled) if drops else None,
        coco_drop_interval=_interval(item.coco_resampled - baseline.coco_resampled) if drops else None,
        classes=tuple(
            _class(dataset.classes[label], item.voc[k], all_points[k], eleven[k], by_class[k, :, 0])
            for k, label in enumerate(labels_of(dataset))
        ),
    )


def _class(
    label: str, matches: Matches, all_points: float, eleven: float, coco_ap: NDArray[np.float64]
) -> ClassAccuracy:
    precision, recall = voc.curve(matches)
    return ClassAccuracy(
        label=label,
        objects=int(matches.objects.sum()),
        voc_ap50=_known(all_points),
        voc_ap50_11point=_known(eleven),
        coco_ap=_known(coco_ap.mean()),
        coco_ap50=_known(coco_ap[coco.IOU_50]),
        precision=precision,
        recall=recall,
    )


def _coco_map(matches: tuple[Matches, ...]) -> float | None:
    _, by_threshold = coco.mean_average_precision(matches, matches[0].whole)
    return _known(by_threshold[:, 0].mean())


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _interval(values: NDArray[np.float64]) -> Interval:
    # A resample may by chance hold no object at all; it says nothing and is left out.
    known = values[~np.isnan(values)]
    if not len(known):
        raise DatasetError(
            f"accuracy: none of {len(values)} bootstrap resamples holds an annotated object. Ask for more "
            "resamples, or measure on a split with more annotated images."
        )
    tail = (1.0 - _LEVEL) / 2
    low, high = np.quantile(known, [tail, 1.0 - tail])
    return Interval(low=float(low), high=float(high), level=_LEVEL)


def _gates(eager: Accuracy, subject: Accuracy, max_drop: float) -> tuple[Gate, Gate]:
    def gate(name: str, before: float, after: float) -> Gate:
        drop = before - after
        return Gate(
            name=name,
            passed=drop <= max_drop + _ROUNDING,
            measured=f"{drop:.4f} ({before:.4f} -> {after:.4f}), {subject.subject}",
            limit=f"at most {max_drop:g}",
            subject=subject.subject,
        )

    return (
        gate("VOC mAP drop", eager.voc_map50, subject.voc_map50),
        gate("COCO mAP drop", eager.coco_map, subject.coco_map),
    )


def _check(
    dataset: Dataset, detections: Mapping[str, Sequence[Detections]], bootstrap: int, baseline: str
) -> None:
    if next(iter(detections), None) != baseline:
        raise ParityError(
            f"accuracy: subjects are {list(detections)}; expected {baseline!r} first, what the others are "
            "compared with. Run that one as well."
        )
    if bootstrap < 1:
        raise ParityError(f"accuracy: {bootstrap} bootstrap resamples; expected at least 1.")
    for subject, found in detections.items():
        if len(found) != len(dataset.samples):
            raise ParityError(
                f"accuracy: {subject} has results for {len(found)} images, split {dataset.split!r} has "
                f"{len(dataset.samples)}. Run it on every image of the split."
            )
        for sample, item in zip(dataset.samples, found, strict=True):
            _check_image(dataset, subject, sample.path.name, item)


def _check_image(dataset: Dataset, subject: str, image: str, found: Detections) -> None:
    if not (np.isfinite(found.boxes).all() and np.isfinite(found.scores).all()):
        raise ParityError(
            f"accuracy: {subject} gives a box or a score that is not finite on {image}; expected numbers. "
            "Compare its layers with the reference to find where it begins."
        )
    strange = sorted({int(label) for label in found.labels} - set(range(1, len(dataset.classes))))
    if strange:
        raise DatasetError(
            f"accuracy: {subject} gives label {strange[0]} on {image}; {dataset.root} has labels 1 to "
            f"{len(dataset.classes) - 1}. Use the dataset that the detector was trained on."
        )
