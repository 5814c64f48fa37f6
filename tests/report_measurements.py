"""Synthetic measurements for the report's tests: parity, latency, accuracy, complexity."""

from __future__ import annotations

import random
from collections.abc import Sequence

from qexport.artifact import Artifact
from qexport.files import sha256_json
from qexport.layers import Layer
from qexport.results import (
    Accuracy,
    AccuracyReport,
    ClassAccuracy,
    Complexity,
    Gate,
    Interval,
    LatencyProfile,
    LatencyStats,
    LayerLatency,
    LayerParity,
    Machine,
    ParityReport,
    StageRecall,
)

DATASET_SHA256 = sha256_json("synthetic dataset")


def _interval(middle: float, half: float) -> Interval:
    return Interval(low=middle - half, high=middle + half, level=0.95)


def _accuracy(subject: str, drop: float, labels: tuple[str, ...]) -> Accuracy:
    recall = tuple(step / 50 for step in range(51))
    classes = tuple(
        ClassAccuracy(
            label=label,
            objects=70 * (number + 1),
            voc_ap50=0.95 - 0.06 * number - drop,
            voc_ap50_11point=0.94 - 0.06 * number - drop,
            coco_ap=0.7 - 0.1 * number - drop,
            coco_ap50=0.95 - 0.06 * number - drop,
            precision=tuple(max(0.0, 1 - drop - (0.3 + 0.1 * number) * value**5) for value in recall),
            recall=recall,
        )
        for number, label in enumerate(labels[1:])
    )
    voc = sum(one.voc_ap50 or 0.0 for one in classes) / len(classes)
    coco = sum(one.coco_ap or 0.0 for one in classes) / len(classes)
    is_eager = subject == "eager"
    return Accuracy(
        subject=subject,
        voc_map50=voc,
        voc_map50_11point=voc - 0.01,
        coco_map=coco,
        coco_map50=voc,
        coco_map75=coco - 0.05,
        coco_map_small=None,
        coco_map_medium=coco - 0.04,
        coco_map_large=coco + 0.03,
        voc_map50_interval=_interval(voc, 0.021),
        coco_map_interval=_interval(coco, 0.018),
        voc_drop_interval=None if is_eager else _interval(-drop, 0.004),
        coco_drop_interval=None if is_eager else _interval(-drop - 0.003, 0.002),
        classes=classes,
    )


def make_accuracy(targets: Sequence[str], labels: tuple[str, ...]) -> AccuracyReport:
    return AccuracyReport(
        dataset="cells",
        dataset_sha256=DATASET_SHA256,
        split="test",
        images=72,
        objects=959,
        dropped_boxes=2,
        subjects=(
            _accuracy("eager", 0.0, labels),
            _accuracy("reference", 0.002, labels),
            *(_accuracy(target, 0.003, labels) for target in targets),
        ),
        gates=tuple(
            Gate(
                name=f"{metric} drop of {target}",
                passed=True,
                measured="0.3 points",
                limit="at most 1.0 points",
            )
            for target in targets
            for metric in ("VOC mAP", "COCO mAP")
        ),
    )


def make_parity(artifact: Artifact, layers: Sequence[Layer]) -> ParityReport:
    dice = random.Random(1)
    rows = []
    for layer in layers:
        values = 8 * layer.shape[1] * layer.shape[2] * layer.shape[3]
        level = 39.0 - 0.22 * layer.order + dice.uniform(-2.5, 2.5)
        rows.append(
            LayerParity(
                order=layer.order,
                path=layer.path,
                call=layer.call,
                port=f"output:{layer.op}" if layer.quantized else "",
                stage=layer.stage,
                kind=layer.kind,
                shape=layer.shape,
                status="ok" if layer.quantized else "float",
                reason=layer.reason,
                values=values if layer.quantized else 0,
                max_step=dice.choice((0, 1)) if layer.quantized else None,
                differing=int(values * dice.random() * 2e-5) if layer.quantized else None,
                sqnr_fp32_db=level if layer.quantized else None,
                sqnr_reference_db=level + 22 if layer.quantized and layer.order > 8 else None,
                cosine_fp32=1 - 10 ** (-level / 10) / 2 if layer.quantized else None,
                cosine_reference=1.0 if layer.quantized else None,
            )
        )
    return ParityReport(
        target=artifact.target,
        artifact_sha256=artifact.sha256,
        images=8,
        split="test",
        tolerance_steps=1,
        layers=tuple(rows),
        recalls=(
            StageRecall(stage="proposals", against="fp32", boxes=2400, matched=2371, iou=0.9),
            StageRecall(
                stage="detections",
                against="fp32",
                boxes=118,
                matched=117,
                iou=0.9,
                max_score_difference=0.021,
            ),
        ),
        gates=(
            Gate(name="layer parity", passed=True, measured="1 step", limit="at most 1 step"),
            Gate(name="unmatched layers", passed=True, measured="0 of 66", limit="at most 0 %"),
        ),
    )


def make_complexity(layers: Sequence[Layer]) -> Complexity:
    return Complexity(
        parameters=sum(layer.parameters for layer in layers),
        macs=sum(layer.macs for layer in layers),
        average_sparsity=0.0003,
        average_sparsity_quantized=0.0412,
        float_bytes=113_400_000,
        artifact_bytes=28_600_000,
    )


def make_latency(artifact: Artifact, layers: Sequence[Layer], timing_seed: int) -> LatencyProfile:
    dice = random.Random(100 + timing_seed)
    merged: dict[str, list[Layer]] = {}
    for layer in layers:
        merged.setdefault(layer.path, []).append(layer)
    rows = []
    for order, (path, group) in enumerate(merged.items()):
        eager = sum(layer.macs for layer in group) / 6e7 + dice.uniform(0.05, 0.3)
        artifact_ms = eager * dice.uniform(0.3, 0.6)
        fused = path == "backbone.body.maxpool"
        rows.append(
            LayerLatency(
                order=order,
                path=path,
                stage=group[0].stage,
                kind=group[0].kind,
                kernels=("QLinearConv",) if group[0].quantized else ("NonMaxSuppression",),
                artifact_ms=artifact_ms,
                eager_ms=None if fused else eager,
                fp32_ms=eager * 0.8,
                reduction_percent=None if fused else 100 * (1 - artifact_ms / eager),
            )
        )
    total = sum(row.artifact_ms for row in rows)
    whole = {"artifact": total * 1.02, "eager": total * 2.4, "fp32": total * 1.7}
    return LatencyProfile(
        target=artifact.target,
        artifact_sha256=artifact.sha256,
        machine=Machine(
            measured_on="host",
            system="Linux 6.1",
            processor="Example CPU",
            cores=2,
            versions={"onnxruntime": "1.31.0"},
            clock_mhz=2400.0 + timing_seed,
        ),
        threads=1,
        warmup=5,
        measured_at=f"2026-01-0{1 + timing_seed}T00:00:00Z",
        whole={
            name: LatencyStats(
                runs=50,
                mean_ms=value * 1.01,
                std_ms=value * 0.02,
                min_ms=value * 0.97,
                p50_ms=value,
                p90_ms=value * 1.04,
                p99_ms=value * 1.1,
            )
            for name, value in whole.items()
        },
        fps=1000 / whole["artifact"],
        layers=tuple(rows),
        profiled_whole_ms=total / 0.957,
        accounted_share=0.957,
        gates=(Gate(name="layers add up", passed=True, measured="95.7 %", limit="at least 90.0 %"),),
    )
