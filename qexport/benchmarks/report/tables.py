"""Rows and sums of the report's tables: what was measured, put together and never guessed.

A sum over layers of which some were not measured keeps the sum of those that were, says how many they
are, and gives no reduction: it would compare different things.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from qexport.artifact import Artifact, Rung
from qexport.benchmarks.report import formats
from qexport.encodings import EncodingRow, Encodings, Origin, origin_of
from qexport.observer_results import ObserverReport
from qexport.results import (
    Accuracy,
    AccuracyReport,
    ClassAccuracy,
    Interval,
    LatencyProfile,
    LayerLatency,
    LayerParity,
    ParityReport,
)

BASELINES = {"eager": "PyTorch eager fp32", "fp32": "same runtime, fp32"}
"""Names of `LatencyProfile.whole` beside `artifact`."""


@dataclass(frozen=True, slots=True)
class LatencySum:
    """Layers summed under one name; times in milliseconds."""

    name: str
    paths: int
    artifact_ms: float
    eager_ms: float | None
    eager_paths: int
    """How many of the paths `eager_ms` covers."""
    fp32_ms: float | None
    fp32_paths: int
    reduction_percent: float | None
    """Against eager; None where eager does not cover every path."""
    share: float | None
    """Of the sum of all layers of the artifact."""


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """The sum of the layers against the whole run that was profiled; milliseconds."""

    layers_ms: float
    whole_ms: float
    rest_ms: float
    """What no layer explains; negative where the layers add up to more than the whole."""
    accounted_share: float


@dataclass(frozen=True, slots=True)
class FloatDecision:
    """A layer that is not quantized, and who says so."""

    path: str
    call: int
    op: str
    decided_by: str
    kernels: str
    reason: str


@dataclass(frozen=True, slots=True)
class ScaleOrigin:
    """The scales of a QAT run that came from one place."""

    name: Origin
    meaning: str
    rows: tuple[EncodingRow, ...]


_ORIGINS: dict[Origin, str] = {
    "checkpoint": "the checkpoint's own, bit for bit",
    "shared": "of the tensor that the operator moves or selects from",
    "requantized": "not as in training: the row says what was given away",
    "calibrated": "not in the checkpoint: decided on images, or from the weights",
}


def scale_origins(encodings: Encodings | None) -> tuple[ScaleOrigin, ...]:
    """Return where the scales came from; nothing where they were all calibrated."""
    if encodings is None or "qat" not in encodings.calibration:
        return ()
    found = {origin: tuple(row for row in encodings.rows if origin_of(row) == origin) for origin in _ORIGINS}
    return tuple(ScaleOrigin(origin, _ORIGINS[origin], rows) for origin, rows in found.items() if rows)


def observer_names(report: ObserverReport) -> tuple[str, ...]:
    """Return the observers that were compared, min-max first."""
    return tuple(dict.fromkeys(name for tensor in report.tensors for name in tensor.sqnr_db))


def differing_per_million(layer: LayerParity) -> float | None:
    """Return how many of a million values differ from the integer reference; None where not compared."""
    if layer.differing is None or layer.values == 0:
        return None
    return 1e6 * layer.differing / layer.values


def worst_layer(parity: ParityReport) -> LayerParity | None:
    """Return a layer that fails, else the one with the lowest SQNR against fp32; None where none has one."""
    failing = [layer for layer in parity.layers if layer.failed]
    if failing:
        return max(failing, key=lambda layer: (layer.max_step or 0, -layer.order))
    measured = [layer for layer in parity.layers if layer.sqnr_fp32_db is not None]
    return min(measured, key=lambda layer: (layer.sqnr_fp32_db or 0.0, layer.order)) if measured else None


def largest_step(parity: ParityReport) -> int | None:
    """Return the largest local difference of any layer; None where none was compared."""
    return max((layer.max_step for layer in parity.layers if layer.max_step is not None), default=None)


def main_kernels(artifact: Artifact, most: int = 3) -> str:
    """Return the runtime's kernels that compute the most layers, `QLinearConv 43, QLinearAdd 12, QGemm 4`."""
    found = Counter(kernel for layer in artifact.layers for kernel in layer.kernels)
    return ", ".join(f"{kernel} {layers}" for kernel, layers in found.most_common(most))


def status_counts(parity: ParityReport) -> dict[str, int]:
    """Return how many layers have each status that occurs, failures first."""
    found = [layer.status for layer in parity.layers]
    statuses = ("over_tolerance", "shape_mismatch", "unmatched", "ok", "unquantized", "float")
    return {status: found.count(status) for status in statuses if status in found}


def sum_layers(
    layers: Sequence[LayerLatency], name_of: Callable[[LayerLatency], str]
) -> tuple[LatencySum, ...]:
    """Return one sum per name, slowest first."""
    groups: dict[str, list[LayerLatency]] = {}
    for layer in layers:
        groups.setdefault(name_of(layer), []).append(layer)
    whole = sum(layer.artifact_ms for layer in layers)
    sums = [_sum_group(name, group, whole) for name, group in groups.items()]
    return tuple(sorted(sums, key=lambda row: (-row.artifact_ms, row.name)))


def _sum_group(name: str, group: Sequence[LayerLatency], whole_ms: float) -> LatencySum:
    artifact_ms = sum(layer.artifact_ms for layer in group)
    eager = _measured(layer.eager_ms for layer in group)
    fp32 = _measured(layer.fp32_ms for layer in group)
    eager_ms = sum(eager) if eager else None
    complete = len(eager) == len(group)
    return LatencySum(
        name=name,
        paths=len(group),
        artifact_ms=artifact_ms,
        eager_ms=eager_ms,
        eager_paths=len(eager),
        fp32_ms=sum(fp32) if fp32 else None,
        fp32_paths=len(fp32),
        reduction_percent=100 * (1 - artifact_ms / eager_ms) if complete and eager_ms else None,
        share=artifact_ms / whole_ms if whole_ms > 0 else None,
    )


def _measured(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def reconcile(profile: LatencyProfile) -> Reconciliation:
    """Return the sum of the layers against the profiled whole, with the unexplained rest.

    The share is taken run by run and its median shown: medians of layers do not add up on a busy machine.
    """
    layers_ms = profile.accounted_share * profile.profiled_whole_ms
    return Reconciliation(
        layers_ms=layers_ms,
        whole_ms=profile.profiled_whole_ms,
        rest_ms=profile.profiled_whole_ms - layers_ms,
        accounted_share=profile.accounted_share,
    )


def speedup(profile: LatencyProfile, baseline: str) -> float | None:
    """Return median of the baseline over median of the artifact; None where either was not measured."""
    artifact, other = profile.whole.get("artifact"), profile.whole.get(baseline)
    if artifact is None or other is None or artifact.p50_ms <= 0:
        return None
    return other.p50_ms / artifact.p50_ms


def float_decisions(encodings: Encodings | None, artifact: Artifact | None) -> tuple[FloatDecision, ...]:
    """Return what stays float: by the encodings first, then what the target could not run in integers."""
    rows: list[FloatDecision] = []
    kernels: dict[tuple[str, int, str], str] = {}
    if artifact is not None:
        kernels = {(row.path, row.call, row.op): ", ".join(row.kernels) for row in artifact.layers}
    if encodings is not None:
        rows += [
            FloatDecision(
                path=row.path,
                call=row.call,
                op=row.op,
                decided_by="encodings",
                kernels=kernels.get((row.path, row.call, row.op), ""),
                reason=row.reason,
            )
            for row in encodings.float_rows
        ]
    known = {(row.path, row.call, row.op) for row in rows}
    for layer in artifact.layers if artifact is not None else ():
        if not layer.integer and (layer.path, layer.call, layer.op) not in known:
            rows.append(
                FloatDecision(
                    path=layer.path,
                    call=layer.call,
                    op=layer.op,
                    decided_by="target",
                    kernels=", ".join(layer.kernels),
                    reason=layer.reason,
                )
            )
    for declared in artifact.unquantized if artifact is not None else ():
        site, _, port = declared.key.partition("/")
        path, _, call = site.partition("@")
        rows.append(
            FloatDecision(
                path=path,
                call=int(call),
                op=port.partition(":")[2] or port,
                decided_by="target",
                kernels="",
                reason=declared.reason,
            )
        )
    return tuple(rows)


RUNGS: dict[Rung, str] = {
    "structure": "structure: the file was read back, nothing was built or run",
    "built": "built without a GPU: NVIDIA's own builder made the engine and listed its layers; the network that it "
    "was given was evaluated in torch, layer by layer, and not timed",
    "run": "run: the target's own runtime computed every value",
}
"""What a target's figures stand on, in words."""


def class_rows(report: AccuracyReport) -> tuple[tuple[Accuracy, ClassAccuracy], ...]:
    """Return every class of every subject, the subjects of one class side by side."""
    labels = dict.fromkeys(row.label for one in report.subjects for row in one.classes)
    place = {label: number for number, label in enumerate(labels)}
    rows = [(one, row) for one in report.subjects for row in one.classes]
    return tuple(sorted(rows, key=lambda pair: place[pair[1].label]))


def noise_sentences(report: AccuracyReport) -> tuple[str, ...]:
    """Return, per subject and metric, whether the difference from eager is inside the noise of the split."""
    return tuple(
        _noise(f"{metric} of {one.subject}", interval, report.images)
        for one in report.subjects
        for metric, interval in (("VOC mAP", one.voc_drop_interval), ("COCO mAP", one.coco_drop_interval))
        if interval is not None
    )


def _noise(what: str, interval: Interval, images: int) -> str:
    low, high = formats.signed(100 * interval.low), formats.signed(100 * interval.high)
    level = formats.decimals(100 * interval.level, 0)
    span = f"the {level} % interval of the paired difference is {low} to {high} points"
    if interval.low <= 0 <= interval.high:
        return f"{what}: inside the noise of {images} images; {span} and holds zero."
    side = "above" if interval.low > 0 else "below"
    return f"{what}: {side} eager by more than the noise of {images} images; {span}."
