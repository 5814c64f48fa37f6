"""A `.tflite` with the ports of a detector and two quantized convolutions, and the artifact around it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from plain_artifact import write_artifact

from qexport.plugins.tflite.builder import TfliteBuilder
from qexport.plugins.tflite.writer import ModelWriter, Value

SIDE, CHANNELS, DETECTIONS = 16, 8, 4
STEM, FIRST, BLOCK = "backbone.body.conv1", "backbone.body.layer1.0.conv1", "backbone.body.layer1.0"
PROPOSALS, HEAD, DETECTED = "rpn.proposals", "roi_heads.box_head.fc6", "roi_heads.detections"
CODES = f"{STEM}/output:conv2d"
FILE_NAMES = {"int8": "detector.int8.tflite", "fp32": "detector.fp32.tflite"}


def make_network(
    *, seed: int = 0, side: int = SIDE, detections: int = DETECTIONS, quantized: bool = True
) -> bytes:
    """Return the network: (side, side, 3) uint8 in; boxes, scores and labels, and their count out.

    A top-k, which XNNPACK does not run, stands between two pieces that it does.
    """
    random = np.random.default_rng(seed)
    writer = ModelWriter()
    build = TfliteBuilder(writer)
    frame = writer.tensor((side, side, 3), "uint8", name="frame")
    writer.place = "preprocess"
    image = build.reshape(build.cast(frame, np.float32), (1, side, side, 3))
    image = build.mul(image, build.scalar(1 / 255, image))
    if quantized:
        image = build.quantize(image, 1 / 127)
    writer.place = STEM
    stem = _convolution(build, random, image, quantized=quantized, name=CODES)
    writer.place = FIRST
    padded = build.pad(stem, [0, 1, 1, 0, 0, 1, 1, 0])
    inner = _convolution(build, random, padded, quantized=quantized, padding=schema.Padding.VALID)
    writer.place = BLOCK
    settings: dict[str, object] = {"fusedActivationFunction": schema.ActivationFunctionType.RELU}
    scale = 0.1 if quantized else None
    block = build.op(
        "ADD", [stem, inner], stem.shape, stem.dtype, scale=scale, options="AddOptions", settings=settings
    )
    writer.place = PROPOSALS
    rows = build.dequantize(block) if quantized else block
    best, index = _topk(
        build, build.reduce_mean(build.reshape(rows, (side * side, CHANNELS)), [1]), detections
    )
    writer.place = HEAD
    features = build.sqrt(build.absolute(build.add(best, build.scalar(0.5, best))))
    writer.place = DETECTED
    boxes = build.mul(build.reshape(features, (detections, 1)), build.constant(np.ones((1, 4)), np.float32))
    labels = build.add(build.remainder(index, build.scalar(3, index)), build.scalar(1, index))
    found = build.cast(build.greater(best, build.scalar(0.0, best)), np.int32)
    count = build.reduce("SUM", found, [0], keep=False)
    outputs = {
        "boxes": boxes,
        "scores": build.minimum(best, build.scalar(1.0, best)),
        "labels": labels,
        "count": count,
    }
    for name, value in outputs.items():
        writer.rename(value, name)
    return writer.finish([frame], list(outputs.values()), description="test")


def make_artifact(folder: Path, **files: bytes) -> Path:
    """Write an artifact with these files by role; return its folder."""
    for role, data in files.items():
        (folder / FILE_NAMES[role]).write_bytes(data)
    write_artifact(
        folder,
        target="tflite",
        files={role: FILE_NAMES[role] for role in files},
        frame_px=(SIDE, SIDE),
        detections=DETECTIONS,
    )
    return folder


def _convolution(
    build: TfliteBuilder,
    random: np.random.Generator,
    source: Value,
    *,
    quantized: bool,
    padding: int = schema.Padding.SAME,
    name: str = "",
) -> Value:
    shape = (CHANNELS, 3, 3, source.shape[3])
    batch, height, width = source.shape[:3]
    if padding == schema.Padding.VALID:
        height, width = height - 2, width - 2
    if quantized:
        scales = [1 / 64] * CHANNELS
        assert source.scale is not None
        filters = build.weights(random.integers(-127, 128, shape).astype(np.int8), scales, 0)
        bias = build.weights(np.zeros(CHANNELS, np.int32), [scale * source.scale for scale in scales], 0)
    else:
        filters = build.constant(random.normal(size=shape), np.float32)
        bias = build.constant(np.zeros(CHANNELS), np.float32)
    return build.op(
        "CONV_2D",
        [source, filters, bias],
        (batch, height, width, CHANNELS),
        "int8" if quantized else "float32",
        scale=0.1 if quantized else None,
        options="Conv2DOptions",
        version=3 if quantized else 1,
        name=name,
        settings={
            "padding": padding,
            "strideH": 1,
            "strideW": 1,
            "dilationHFactor": 1,
            "dilationWFactor": 1,
            "fusedActivationFunction": schema.ActivationFunctionType.RELU,
        },
    )


def _topk(build: TfliteBuilder, values: Value, most: int) -> tuple[Value, Value]:
    flat = build.reshape(values, (values.shape[0],))
    place = build.writer.place
    best = build.writer.tensor((most,), "float32", name=f"{place}/TOPK_V2")
    index = build.writer.tensor((most,), "int32", name=f"{place}/TOPK_V2/index")
    taken = build.constant(most, np.int32)
    build.writer.operator("TOPK_V2", [flat, taken], [best, index], options="TopKV2Options")
    return best, index
