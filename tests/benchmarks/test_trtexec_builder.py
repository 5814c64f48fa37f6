"""The layers that NVIDIA's builder made of the demo detector, in the form of trtexec's files, with invented times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from trtexec_samples import board, write_times

from qexport.benchmarks.trtexec_profile import MATCH_GATE, latency_profile, read_measurement
from qexport.runtimes.tensorrt_layers import EngineLayer
from qexport.runtimes.tensorrt_library import RTX, installed_flavour

if TYPE_CHECKING:
    from qexport.detectors.load import LoadedDetector
    from qexport.detectors.static import StaticDetector
    from qexport.encodings import Encodings
    from qexport.quantization.reference import QuantizedDetector

STEP_MS = 0.01


def write_files(folder: Path, layers: tuple[EngineLayer, ...], onnx_sha256: str) -> list[Path]:
    info = [
        {
            "Name": layer.name,
            "LayerType": layer.kernel,
            "Inputs": [],
            "Outputs": [],
            "Metadata": "\u001e".join(f"[ONNX Layer: {node}]" for node in layer.nodes),
        }
        for layer in layers
    ]
    timed = [layer.name for layer in layers if layer.kernel not in {"signal", "wait"}]
    rows = [
        {"name": name, "timeMs": 10 * STEP_MS, "averageMs": STEP_MS, "medianMs": STEP_MS} for name in timed
    ]
    contents = {
        "layers.json": {"Layers": info, "Bindings": []},
        "profile.json": [{"count": 10}, *rows],
        "board.json": board(engine={**board()["engine"], "onnx_sha256": onnx_sha256}),  # type: ignore[dict-item]
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    return [
        *(folder / name for name in contents),
        write_times(folder / "times.json", [STEP_MS * len(timed)] * 3),
    ]


@pytest.mark.slow
@pytest.mark.skipif(
    installed_flavour() != RTX, reason="no builder that works without a GPU: qexport[tensorrt-cpu]"
)
def test_every_weighted_layer_of_a_real_build_is_found_again(
    demo: LoadedDetector,
    demo_static: StaticDetector,
    demo_quantized: QuantizedDetector,
    demo_encodings: Encodings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qexport.exporters import tensorrt as exporter  # noqa: PLC0415 - brings torch
    from qexport.quantization.inspection import inspect_layers  # noqa: PLC0415
    from qexport.runtimes import tensorrt_builder  # noqa: PLC0415
    from qexport.target_options import TensorrtOptions  # noqa: PLC0415

    listed: list[tuple[EngineLayer, ...]] = []
    parse = tensorrt_builder.parse_listing

    def overheard(messages: list[str]) -> tuple[EngineLayer, ...]:
        listed.append(parse(messages))
        return listed[-1]

    monkeypatch.setattr(tensorrt_builder, "parse_listing", overheard)
    artifact = exporter.export(
        demo_quantized,
        demo_encodings,
        tmp_path / "artifact",
        labels=demo.labels,
        options=TensorrtOptions(timing_cache=False),
    )
    int8 = next(layers for layers in listed if any("Int8" in layer.inputs for layer in layers))
    files = write_files(tmp_path, int8, artifact.file("int8").sha256)
    profile = latency_profile(
        read_measurement(files),
        artifact=artifact,
        detector_layers=inspect_layers(demo_static),
        min_accounted=0.5,
    )
    found = next(gate for gate in profile.gates if gate.name == MATCH_GATE)
    assert found.passed, found
    assert found.measured == "28 of 28"
    assert {row.stage for row in profile.layers} == {
        "preprocess", "trunk", "fpn", "rpn_head", "proposals", "roi_align", "box_head", "detections",
    }  # fmt: skip
    assert all(row.artifact_ms > 0 for row in profile.layers if row.kind in {"convolution", "linear"})
