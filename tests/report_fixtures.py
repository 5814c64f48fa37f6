"""A synthetic run folder with the shape of a real one: resnet18-fpn, about 75 layers, one target or more."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from PIL import Image, ImageDraw
from report_measurements import (
    DATASET_SHA256,
    make_accuracy,
    make_complexity,
    make_latency,
    make_parity,
)

from qexport.artifact import Artifact, ArtifactFile, InputSpec, LayerDecision, TensorSite, save_artifact
from qexport.encodings import EncodingRow, Encodings, FloatRow, QuantParams, digest_of_rows, save_encodings
from qexport.errors import RunFolderError
from qexport.files import read_json, sha256_json, write_json
from qexport.layers import DetectorReport, Kind, Layer, stage_of
from qexport.results import (
    AccuracyReport,
    DetectionsRecord,
    Gate,
    ImageDetections,
    LatencyProfile,
    MemoryUse,
    ParityReport,
)
from qexport.settings import RunRecord, Settings

LABELS = ("__background__", "WBC", "RBC", "Platelets")
DETECTOR_SHA256 = sha256_json("synthetic detector")

Box = tuple[float, float, float, float]
Truth = Mapping[str, Sequence[tuple[Box, int]]]


def make_dataset(root: Path, images: int = 3) -> Truth:
    """Draw a few images of 640 x 480 and return the boxes on them."""
    draw_of = random.Random(7)
    truth: dict[str, list[tuple[Box, int]]] = {}
    for number in range(images):
        name = f"images/cells_{number:02d}.jpg"
        picture = Image.new("RGB", (640, 480), (236, 214, 205))
        pen = ImageDraw.Draw(picture)
        boxes: list[tuple[Box, int]] = []
        for _ in range(6):
            left, top, size = draw_of.randint(0, 540), draw_of.randint(0, 380), draw_of.randint(40, 90)
            pen.ellipse((left, top, left + size, top + size), fill=(200, 120, 130))
            boxes.append(((float(left), float(top), float(left + size), float(top + size)), 2))
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(root / name)
        truth[name] = boxes
    return truth


def make_run(
    folder: Path,
    truth: Truth,
    *,
    targets: Sequence[str] = ("onnx",),
    timing_seed: int = 0,
    labels: tuple[str, ...] = LABELS,
) -> Path:
    """Write a whole run in which every gate is ok; only figures in time follow `timing_seed`."""
    layers = make_layers()
    encodings = make_encodings(layers)
    write_json(folder / "run.json", make_record())
    write_json(folder / "detector.json", make_detector(layers, labels))
    save_encodings(encodings, folder / "encodings.json")
    write_json(folder / "accuracy.json", make_accuracy(targets, labels))
    write_json(folder / "detections.json", make_detections(truth, targets))
    for target in targets:
        artifact = make_artifact(target, layers, encodings, labels)
        save_artifact(artifact, folder / target)
        write_json(folder / target / "parity.json", make_parity(artifact, layers))
        write_json(folder / target / "complexity.json", make_complexity(layers))
        write_json(folder / target / "latency.json", make_latency(artifact, layers, timing_seed))
        peaks = (MemoryUse(subject="artifact", peak_bytes=181_000_000 + timing_seed),)
        write_json(
            folder / target / "memory.json", (*peaks, MemoryUse(subject="eager", peak_bytes=640_000_000))
        )
    return folder


def fail_gate(path: Path, kind: type[ParityReport] | type[AccuracyReport] | type[LatencyProfile]) -> None:
    """Add a failing gate to a result that was written."""
    report = read_json(path, kind, RunFolderError)
    bad = Gate(
        name="made to fail",
        passed=False,
        measured="6 steps",
        limit="at most 1 step",
        culprit="backbone.body.x",
    )
    write_json(path, msgspec.structs.replace(report, gates=(*report.gates, bad)))


def _operators() -> list[tuple[str, int, str, Kind, int, int]]:
    """Path, call, operator, kind, channels and stride of each layer, in the order of execution."""
    rows: list[tuple[str, int, str, Kind, int, int]] = [
        ("preprocess", 0, "interpolate", "resize", 3, 1),
        ("backbone.body.conv1", 0, "conv2d", "convolution", 64, 2),
        ("backbone.body.maxpool", 0, "max_pool2d", "pooling", 64, 4),
    ]
    for stage in range(1, 5):
        channels, stride = 32 << stage, 2 << stage
        for block in range(2):
            path = f"backbone.body.layer{stage}.{block}"
            rows += [(f"{path}.conv{one}", 0, "conv2d", "convolution", channels, stride) for one in (1, 2)]
            if stage > 1 and block == 0:
                rows.append((f"{path}.downsample.0", 0, "conv2d", "convolution", channels, stride))
            rows.append((path, 0, "add", "elementwise", channels, stride))
    for level in (3, 2, 1, 0):
        stride = 4 << level
        rows.append((f"backbone.fpn.inner_blocks.{level}.0", 0, "conv2d", "convolution", 256, stride))
        if level < 3:
            rows.append(("backbone.fpn", 2 - level, "interpolate", "resize", 256, stride))
            rows.append(("backbone.fpn", 2 - level, "add", "elementwise", 256, stride))
        rows.append((f"backbone.fpn.layer_blocks.{level}.0", 0, "conv2d", "convolution", 256, stride))
    rows.append(("backbone.fpn.extra_blocks", 0, "max_pool2d", "pooling", 256, 64))
    for call in range(5):
        for name, channels in (("conv.0.0", 256), ("cls_logits", 3), ("bbox_pred", 12)):
            rows.append((f"rpn.head.{name}", call, "conv2d", "convolution", channels, 4 << call))
    rows += [
        ("rpn", 0, "topk", "other", 1, 480),
        ("rpn", 0, "nms", "nms", 1, 480),
        ("roi_heads.box_roi_pool", 0, "roi_align", "roi_align", 256, 96),
        ("roi_heads.box_head.fc6", 0, "linear", "linear", 1024, 480),
        ("roi_heads.box_head.fc7", 0, "linear", "linear", 1024, 480),
        ("roi_heads.box_predictor.cls_score", 0, "linear", "linear", 4, 480),
        ("roi_heads.box_predictor.bbox_pred", 0, "linear", "linear", 16, 480),
        ("roi_heads", 0, "softmax", "other", 4, 480),
        ("roi_heads", 0, "nms", "nms", 1, 480),
    ]
    return rows


_FLOAT_REASON = {
    "topk": "box arithmetic stays float",
    "nms": "box arithmetic stays float",
    "softmax": "scores stay float",
    "roi_align": "interpolation weights stay float",
    "interpolate": "preprocessing stays float",
}


def make_layers() -> tuple[Layer, ...]:
    layers = []
    for order, (path, call, op, kind, channels, stride) in enumerate(_operators()):
        shape = (1, channels, max(1, 480 // stride), max(1, 640 // stride))
        weights = (
            channels * channels * 9 if kind == "convolution" else 256 * channels if kind == "linear" else 0
        )
        quantized = path == "backbone.fpn" or op not in _FLOAT_REASON
        layers.append(
            Layer(
                order=order,
                path=path,
                call=call,
                op=op,
                kind=kind,
                stage=stage_of(path),
                shape=shape,
                parameters=weights if call == 0 else 0,
                macs=weights * shape[2] * shape[3],
                quantized=quantized,
                reason="" if quantized else _FLOAT_REASON[op],
            )
        )
    return tuple(layers)


def make_record() -> RunRecord:
    settings = Settings(
        model="model.py:build", weights="weights.pt", data="cells", split="test", observer="percentile"
    )
    return RunRecord(
        settings=settings,
        weights_sha256=sha256_json("weights"),
        dataset_name="cells",
        dataset_sha256=DATASET_SHA256,
        qexport_version="0.1.0",
        versions={"python": "3.11.2", "torch": "2.14.0", "platform": "Linux x86_64"},
        command="qexport run --model model.py:build --weights weights.pt --data cells --out run",
    )


def make_detector(layers: Sequence[Layer], labels: tuple[str, ...]) -> DetectorReport:
    return DetectorReport(
        source="model.py:build",
        detector_sha256=DETECTOR_SHA256,
        backbone="resnet18-fpn",
        labels=labels,
        frame_px=(480, 640),
        resized_px=(480, 640),
        padded_px=(480, 640),
        proposals=300,
        detections=100,
        parameters=sum(layer.parameters for layer in layers),
        macs=sum(layer.macs for layer in layers),
        average_sparsity=0.0003,
        layers=tuple(layers),
    )


def make_encodings(layers: Sequence[Layer]) -> Encodings:
    rows = tuple(
        EncodingRow(
            path=layer.path,
            call=layer.call,
            port=f"output:{layer.op}",
            params=QuantParams(scale=(0.03125,)),
            source="percentile 99.99",
        )
        for layer in layers
        if layer.quantized
    )
    float_rows = tuple(
        FloatRow(path=layer.path, call=layer.call, op=layer.op, reason=layer.reason)
        for layer in layers
        if not layer.quantized
    )
    return Encodings(
        detector_sha256=DETECTOR_SHA256,
        scheme="int8-symmetric-per-channel",
        calibration={"observer": "percentile", "images": 64, "seed": 0, "dataset_sha256": DATASET_SHA256},
        keep_float=(),
        rows=rows,
        float_rows=float_rows,
        rows_sha256=digest_of_rows(rows, float_rows),
    )


def make_detections(truth: Truth, targets: Sequence[str]) -> DetectionsRecord:
    def seen_by(subject: str, jitter_px: float, lost: float) -> tuple[ImageDetections, ...]:
        dice = random.Random(len(subject))
        images = []
        for image, boxes in truth.items():
            kept = [one for one in boxes if dice.random() >= lost]
            rows = sorted(
                (
                    (
                        0.99 - 0.3 * dice.random(),
                        (*(edge + dice.uniform(-jitter_px, jitter_px) for edge in box),),
                        label,
                    )
                    for box, label in kept
                ),
                reverse=True,
            )
            images.append(
                ImageDetections(
                    image=image,
                    boxes=tuple((box[0], box[1], box[2], box[3]) for _, box, _ in rows),
                    scores=tuple(score for score, _, _ in rows),
                    labels=tuple(label for _, _, label in rows),
                )
            )
        return tuple(images)

    subjects = {target: seen_by(target, 1.5, 0.08) for target in targets}
    return DetectionsRecord(subjects={"eager": seen_by("eager", 0.0, 0.0), **subjects})


def make_artifact(
    target: str, layers: Sequence[Layer], encodings: Encodings, labels: tuple[str, ...]
) -> Artifact:
    return Artifact(
        target=target,
        qexport_version="0.1.0",
        versions={"onnx": "1.23.0", "torch": "2.14.0"},
        detector_sha256=DETECTOR_SHA256,
        encodings_sha256=encodings.rows_sha256,
        labels=labels,
        input=InputSpec(
            frame_height_px=480,
            frame_width_px=640,
            preprocess="inside",
            resized_height_px=480,
            resized_width_px=640,
            padded_height_px=480,
            padded_width_px=640,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        ),
        proposals=300,
        detections=100,
        forms={"nms": "NonMaxSuppression", "roi_align": "int8 gather"},
        files=(
            ArtifactFile(role="int8", name="int8.onnx", sha256=sha256_json("int8"), size_bytes=28_600_000),
            ArtifactFile(role="fp32", name="fp32.onnx", sha256=sha256_json("fp32"), size_bytes=113_400_000),
        ),
        sites=tuple(
            TensorSite(key=row.key, tensor=row.key, zero_point=0, shape=()) for row in encodings.rows
        ),
        float_sites={"proposals": "proposals"},
        layers=tuple(
            LayerDecision(
                path=layer.path,
                call=layer.call,
                op=layer.op,
                kernels=("QLinearConv",) if layer.quantized else ("Float",),
                integer=layer.quantized and layer.op != "interpolate",
                reason="" if layer.quantized and layer.op != "interpolate" else "no integer kernel",
            )
            for layer in layers
        ),
    )
