"""The CSV files: one table each, a header row, units in the names, empty cells where nothing was measured."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from qexport.benchmarks.report.stages import RunResults
from qexport.benchmarks.report.tables import LatencySum, differing_per_million, sum_layers
from qexport.benchmarks.report.verdict import parity_verdict
from qexport.results import AccuracyReport, LatencyProfile

Cell = str | int | float | None

LAYER_COLUMNS = (
    "target",
    "order",
    "path",
    "call",
    "port",
    "stage",
    "kind",
    "shape",
    "status",
    "reason",
    "values",
    "max_step",
    "differing",
    "differing_per_million",
    "sqnr_fp32_db",
    "sqnr_reference_db",
    "cosine_fp32",
    "cosine_reference",
)
LATENCY_COLUMNS = (
    "target",
    "parity",
    "order",
    "path",
    "stage",
    "kind",
    "kernels",
    "artifact_ms",
    "eager_ms",
    "fp32_ms",
    "reduction_percent",
    "measured_on",
    "machine",
)
KIND_COLUMNS = (
    "target",
    "parity",
    "by",
    "name",
    "paths",
    "artifact_ms",
    "share",
    "eager_ms",
    "eager_paths",
    "fp32_ms",
    "fp32_paths",
    "reduction_percent",
    "measured_on",
    "machine",
)
ACCURACY_COLUMNS = (
    "subject",
    "metric",
    "label",
    "objects",
    "value",
    "low",
    "high",
    "drop_low",
    "drop_high",
)


def csv_bytes(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> bytes:
    """Return a CSV file: UTF-8, lines end in a newline, None is an empty cell."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return stream.getvalue().encode()


def layers_csv(run: RunResults) -> bytes:
    """Return the parity of every layer of every target."""
    return csv_bytes(LAYER_COLUMNS, _layer_rows(run))


def latency_csv(run: RunResults) -> bytes:
    """Return the latency of every layer of every target, with the parity verdict beside it."""
    return csv_bytes(LATENCY_COLUMNS, _latency_rows(run))


def kinds_csv(run: RunResults) -> bytes:
    """Return the latency of every target, summed by kind of layer and by stage."""
    return csv_bytes(KIND_COLUMNS, _kind_rows(run))


def accuracy_csv(run: RunResults) -> bytes:
    """Return mAP and per-class AP of every subject; values in 0..1."""
    rows = () if run.accuracy is None else _accuracy_rows(run.accuracy)
    return csv_bytes(ACCURACY_COLUMNS, rows)


def _layer_rows(run: RunResults) -> Iterable[Sequence[Cell]]:
    for target in run.targets:
        for layer in target.parity.layers if target.parity else ():
            yield (
                target.target,
                layer.order,
                layer.path,
                layer.call,
                layer.port,
                layer.stage,
                layer.kind,
                "x".join(str(size) for size in layer.shape),
                layer.status,
                layer.reason,
                layer.values,
                layer.max_step,
                layer.differing,
                differing_per_million(layer),
                layer.sqnr_fp32_db,
                layer.sqnr_reference_db,
                layer.cosine_fp32,
                layer.cosine_reference,
            )


def _latency_rows(run: RunResults) -> Iterable[Sequence[Cell]]:
    for target in run.targets:
        verdict = parity_verdict(target.parity).text
        for profile, layer in ((one, layer) for one in target.profiles for layer in one.layers):
            yield (
                target.target,
                verdict,
                layer.order,
                layer.path,
                layer.stage,
                layer.kind,
                " ".join(layer.kernels),
                layer.artifact_ms,
                layer.eager_ms,
                layer.fp32_ms,
                layer.reduction_percent,
                profile.machine.measured_on,
                profile.machine.processor,
            )


def _kind_rows(run: RunResults) -> Iterable[Sequence[Cell]]:
    for target in run.targets:
        verdict = parity_verdict(target.parity).text
        for profile in target.profiles:
            for by, row in ((by, row) for by, rows in latency_sums(profile).items() for row in rows):
                yield (
                    target.target,
                    verdict,
                    by,
                    row.name,
                    row.paths,
                    row.artifact_ms,
                    row.share,
                    row.eager_ms,
                    row.eager_paths,
                    row.fp32_ms,
                    row.fp32_paths,
                    row.reduction_percent,
                    profile.machine.measured_on,
                    profile.machine.processor,
                )


def latency_sums(profile: LatencyProfile) -> dict[str, tuple[LatencySum, ...]]:
    """Return the layers summed by `kind` and by `stage`."""
    return {
        "kind": sum_layers(profile.layers, lambda layer: layer.kind),
        "stage": sum_layers(profile.layers, lambda layer: layer.stage),
    }


def _accuracy_rows(report: AccuracyReport) -> Iterable[Sequence[Cell]]:
    for one in report.subjects:
        voc, coco = one.voc_map50_interval, one.coco_map_interval
        voc_drop, coco_drop = one.voc_drop_interval, one.coco_drop_interval
        for metric, value, interval, drop in (
            ("voc_map50", one.voc_map50, voc, voc_drop),
            ("voc_map50_11point", one.voc_map50_11point, None, None),
            ("coco_map", one.coco_map, coco, coco_drop),
            ("coco_map50", one.coco_map50, None, None),
            ("coco_map75", one.coco_map75, None, None),
            ("coco_map_small", one.coco_map_small, None, None),
            ("coco_map_medium", one.coco_map_medium, None, None),
            ("coco_map_large", one.coco_map_large, None, None),
        ):
            low, high = (interval.low, interval.high) if interval else (None, None)
            drop_low, drop_high = (drop.low, drop.high) if drop else (None, None)
            yield one.subject, metric, "", report.objects, value, low, high, drop_low, drop_high
        for row in one.classes:
            for metric, value in (
                ("voc_ap50", row.voc_ap50),
                ("voc_ap50_11point", row.voc_ap50_11point),
                ("coco_ap", row.coco_ap),
                ("coco_ap50", row.coco_ap50),
            ):
                yield one.subject, metric, row.label, row.objects, value, None, None, None, None
