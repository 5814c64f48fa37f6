"""Files as trtexec and deploy/jetson/board.sh write them, of a made-up detector of four modules.

There is no trtexec here. The layouts follow NVIDIA/TensorRT's samples/common/sampleReporting.cpp (`exportJSONTrace`,
`Profiler::exportJSONProfile`), line breaks and blanks included, and the layer information that a real builder
listed for an engine of this kind.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from qexport.artifact import Artifact, ArtifactFile, InputSpec, LayerDecision
from qexport.layers import Kind, Layer, stage_of

ONNX_SHA256 = "ab" * 32
CONV1, CONV2, ADD, CLS = (
    "backbone.body.conv1",
    "backbone.body.layer1.0.conv2",
    "backbone.body.layer1.0",
    "roi_heads.box_predictor.cls_score",
)
BOX = "roi_heads.box_predictor.bbox_pred"
ENGINE: tuple[tuple[str, str, tuple[str, ...], float | None], ...] = (
    # name, LayerType, nodes, median ms; None for what is in the layer information alone
    ("entry^bb^signal^4_myl0_0", "signal", (), None),
    ("__mye39605_hc_init_myl0_2", "memset", (), 0.01),
    ("__myl_CastMulAdd_myl0_9", "kgen", ("preprocess/Mul", f"{CONV1}/Conv"), 0.2),
    (f"{CONV1}/Conv_myl0_10", "correlation", (f"{CONV1}/Conv", "preprocess/DequantizeLinear"), 1.0),
    (f"{CONV2}/Conv_myl0_15", "correlation", (f"{CONV2}/Conv", f"{CONV1}/DequantizeLinear_1"), 0.6),
    ("__myl_AddRelu_myl0_16", "kgen", (f"{CONV2}/Conv", f"{ADD}/Add", f"{CONV1}/DequantizeLinear"), 0.1),
    (f"{BOX}/Gemm+{CLS}/Gemm_myl0_195", "gemm", (f"{BOX}/Gemm", f"{CLS}/Gemm"), 0.09),
)
MACS = {CONV1: 1000, CONV2: 400, BOX: 20, CLS: 10}
NAMED_MS = 1.99
UNNAMED_MS = 0.01


def write_times(path: Path, latencies_ms: Sequence[float], *, release_8_2: bool = False) -> Path:
    lines, separator, start = ["["], "  ", 0.0
    for latency in latencies_ms:
        row = (
            f'{separator}{{ "startEnqMs" : {start:g}, "endEnqMs" : {start + 0.1:g}'
            f', "startH2dMs" : {start:g}, "endH2dMs" : {start:g}'
            f', "startComputeMs" : {start:g}, "endComputeMs" : {start + latency:g}'
            f', "startD2hMs" : {start + latency:g}, "endD2hMs" : {start + latency:g}'
            f', "h2dMs" : 0, "computeMs" : {latency:g}, "d2hMs" : 0, "latencyMs" : {latency:g}'
        )
        lines.append(row + (f', "endToEndMs" : {latency:g} }}' if release_8_2 else " }"))
        separator = ", "
        start += latency
    path.write_text("\n".join([*lines, "]", ""]))
    return path


def write_profile(path: Path, *, count: int = 200, release_8_2: bool = False, first_name: str = "") -> Path:
    timed = [(name, ms) for name, _, _, ms in ENGINE if ms is not None]
    if first_name:
        timed[0] = (first_name, timed[0][1])
    total = sum(ms for _, ms in timed) * count
    lines = ["[", f'  {{ "count" : {count} }}']
    for name, ms in timed:
        median = "" if release_8_2 else f', "medianMs" : {ms:g}'
        # TensorRT 8.2 gives the mean alone; the samples keep it apart from the median.
        mean = ms if release_8_2 else 1.1 * ms
        lines.append(
            f', {{ "name" : "{name}", "timeMs" : {mean * count:g}, "averageMs" : {mean:g}{median}'
            f', "percentage" : {100 * ms * count / total:g} }}'
        )
    path.write_text("\n".join([*lines, "]", ""]))
    return path


def write_layers(path: Path, *, rename: tuple[str, str] = ("", ""), without_metadata: bool = False) -> Path:
    layers = []
    for name, kind, nodes, _ in ENGINE:
        shown = name.replace(*rename)
        metadata = "" if without_metadata else "\u001e".join(f"[ONNX Layer: {node}]" for node in nodes)
        tensor = {
            "Name": f"{shown} out",
            "Dimensions": [1, 8, 4, 4],
            "Format/Datatype": "Row major Int8 format",
        }
        layers.append(
            {
                "Name": shown,
                "LayerType": kind,
                "Inputs": [tensor],
                "Outputs": [tensor],
                "TacticName": "sm80_xmma_fprop_implicit_gemm_i8i8_i8i32_f32",
                "StreamId": 0,
                "Metadata": metadata.replace(*rename),
            }
        )
    path.write_text(json.dumps({"Layers": layers, "Bindings": ["frame", "boxes"]}, indent=2))
    return path


def board(**changes: object) -> dict[str, object]:
    """Return what board.json holds; the values of `changes` replace those of the same name."""
    snapshot: dict[str, object] = {
        "at": "2026-05-04T10:00:00+00:00",
        "power_mode": "15W (0)",
        "clocks_mhz": {"cpu0": 729.6, "gpu": 306.0, "gpu limit": 624.75},
        "temperatures_c": {"cpu-thermal": 48.2, "gpu-thermal": 47.0},
        "cooling": {"cooling_device0 gpu-throttle-alert": 0},
        "power_events": {"oc1": 0, "oc3": 27},
        "memory_available_kib": 5000000,
    }
    whole: dict[str, object] = {
        "kind": "qexport-board",
        "format_version": 1,
        "model": "NVIDIA Jetson Orin Nano Developer Kit",
        "kernel": "Linux 5.15.148-tegra aarch64",
        "l4t": "36.4.3",
        "jetpack": "6.2",
        "tensorrt": "10.3.0.30",
        "cuda": "12.6.68",
        "cores": 6,
        "memory_kib": 7800000,
        "engine": {
            "precision": "int8",
            "onnx_sha256": ONNX_SHA256,
            "engine_sha256": "cd" * 32,
            "warmup_ms": 10,
            "flags": "--useCudaGraph",
        },
        "watched": {
            "samples": 4,
            "gpu_lowest_mhz": 306.0,
            "gpu_highest_mhz": 624.75,
            "hottest_c": 55.5,
            "throttled_samples": 0,
        },
        "before": snapshot,
        "after": snapshot | {"at": "2026-05-04T10:00:09+00:00"},
    }
    return whole | changes


def write_measurement(folder: Path, **board_changes: object) -> list[Path]:
    """Write the four files of one measurement; the median run takes 2.2 ms."""
    (folder / "board.json").write_text(json.dumps(board(**board_changes)))
    return [
        folder / "board.json",
        write_layers(folder / "layers.json"),
        write_profile(folder / "profile.json"),
        write_times(folder / "times.json", [2.1, 2.2, 2.2, 2.3, 2.6]),
    ]


def artifact(paths: Sequence[str] = (CONV1, CONV2, BOX, CLS), *, sha256: str = ONNX_SHA256) -> Artifact:
    return Artifact(
        target="tensorrt",
        qexport_version="0.2.0",
        versions={},
        detector_sha256="0",
        encodings_sha256="0",
        labels=("background", "nut"),
        input=InputSpec(
            frame_height_px=8,
            frame_width_px=8,
            preprocess="inside",
            resized_height_px=8,
            resized_width_px=8,
            padded_height_px=32,
            padded_width_px=32,
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
        ),
        proposals=4,
        detections=2,
        forms={},
        files=(ArtifactFile(role="int8", name="int8.onnx", sha256=sha256, size_bytes=1),),
        sites=(),
        float_sites={},
        layers=tuple(
            LayerDecision(path=path, call=0, op="conv2d", kernels=("correlation",), integer=True)
            for path in paths
        ),
    )


def detector_layers() -> tuple[Layer, ...]:
    kinds: dict[str, Kind] = {CONV1: "convolution", CONV2: "convolution", BOX: "linear", CLS: "linear"}
    return tuple(
        Layer(
            order=order,
            path=path,
            call=0,
            op="conv2d",
            kind=kind,
            stage=stage_of(path),
            shape=(1, 8, 4, 4),
            parameters=1,
            macs=MACS[path],
            quantized=True,
            reason="",
        )
        for order, (path, kind) in enumerate(kinds.items())
    )
