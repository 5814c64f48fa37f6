"""The road through torch2trt: the demo detector converted in the real one, compared, and beside the road of ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from conftest import Frame
from tensorrt_models import needs_builder

from qexport.benchmarks.parity import compare
from qexport.emulation.tensorrt import EvaluatedRunner
from qexport.engines import load_engines
from qexport.quantization.inspection import inspect_layers
from qexport.runtimes.runner import OUTPUTS
from qexport.runtimes.tensorrt_network import load_network
from qexport.target_options import Torch2trtOptions
from qexport.versions import is_importable

if TYPE_CHECKING:
    from qexport.artifact import Artifact
    from qexport.detectors.load import LoadedDetector
    from qexport.detectors.static import StaticDetector
    from qexport.encodings import Encodings
    from qexport.quantization.reference import QuantizedDetector

pytestmark = [
    needs_builder,
    pytest.mark.skipif(
        not is_importable("torch2trt"),
        reason="torch2trt is not here: make torch2trt-check TORCH2TRT=path/to/checkout",
    ),
]
Export = tuple["Artifact", Path]


@pytest.fixture(scope="module")
def converted(
    demo: LoadedDetector,
    demo_quantized: QuantizedDetector,
    demo_encodings: Encodings,
    tmp_path_factory: pytest.TempPathFactory,
) -> Export:
    from qexport.exporters.torch2trt import export  # noqa: PLC0415 - of no use without torch2trt

    folder = tmp_path_factory.mktemp("torch2trt-artifact")
    options = Torch2trtOptions(workspace_mb=1024)
    return export(demo_quantized, demo_encodings, folder, labels=demo.labels, options=options), folder


def test_export_writes_networks_and_engines_and_reads_every_layer_back(
    converted: Export, demo_encodings: Encodings
) -> None:
    artifact, folder = converted
    assert (artifact.target, artifact.rung) == ("torch2trt", "built")
    assert {file.role: file.name for file in artifact.files} == {
        "int8": "detector.int8.network",
        "fp32": "detector.fp32.network",
    }
    weighted = [layer for layer in artifact.layers if layer.op in ("conv2d", "linear")]
    assert {layer.path for layer in weighted} == {
        row.path for row in demo_encodings.rows if row.port == "weight"
    }
    assert all(layer.integer for layer in weighted)
    engines = {engine.role: engine for engine in load_engines(folder).engines}
    assert engines.keys() == {"int8", "fp32"}
    assert engines["int8"].source_sha256 == artifact.file("int8").sha256
    assert engines["int8"].options == {"workspace_mb": "1024"}
    # No layer that the module does not name, and none that was dropped: as many convolutions as calls of them.
    layers = load_network(folder / "detector.int8.network").described.layers
    convolutions = [layer for layer in layers if layer.kind == "CONVOLUTION"]
    assert len(convolutions) == sum(layer.op == "conv2d" for layer in artifact.layers)


def test_export_twice_gives_the_same_bytes_but_for_engines(
    converted: Export,
    demo: LoadedDetector,
    demo_quantized: QuantizedDetector,
    demo_encodings: Encodings,
    tmp_path: Path,
) -> None:
    from qexport.exporters.torch2trt import export  # noqa: PLC0415 - of no use without torch2trt

    again = export(
        demo_quantized,
        demo_encodings,
        tmp_path,
        labels=demo.labels,
        options=Torch2trtOptions(timing_cache=False),
    )
    assert again == converted[0]
    for name in ("detector.int8.network", "detector.fp32.network", "artifact.json"):
        assert (tmp_path / name).read_bytes() == (converted[1] / name).read_bytes()


def test_compare_every_layer_within_a_step(
    converted: Export,
    demo_quantized: QuantizedDetector,
    demo_static: StaticDetector,
    demo_frames: list[Frame],
) -> None:
    with EvaluatedRunner(converted[1]) as runner:
        report = compare(demo_quantized, runner, inspect_layers(demo_static), demo_frames[:2], split="test")
    assert [gate for gate in report.gates if not gate.passed] == []
    assert (report.target, report.rung) == ("torch2trt", "built")
    assert {row.status for row in report.layers} == {"ok", "float", "unquantized"}


def test_both_roads_compute_the_same_integers_everywhere(
    converted: Export, tensorrt_export: Export, demo_frames: list[Frame]
) -> None:
    ours, theirs = (
        {site.key: site.tensor for site in made.sites} for made, _ in (converted, tensorrt_export)
    )
    assert ours.keys() == theirs.keys()
    assert len(ours) > 40
    assert converted[0].unquantized == tensorrt_export[0].unquantized
    with EvaluatedRunner(converted[1]) as one, EvaluatedRunner(tensorrt_export[1]) as other:
        for frame in demo_frames[:2]:
            found, wanted = one.run(frame, list(ours.values())), other.run(frame, list(theirs.values()))
            differing = [
                key
                for key in ours
                if not np.array_equal(found[ours[key]].ravel(), wanted[theirs[key]].ravel())
            ]
            assert differing == []
            for name in OUTPUTS:
                np.testing.assert_array_equal(found[name], wanted[name])


def test_float_network_agrees_with_that_of_the_other_road(
    converted: Export, tensorrt_export: Export, demo_frames: list[Frame]
) -> None:
    with (
        EvaluatedRunner(converted[1], role="fp32") as one,
        EvaluatedRunner(tensorrt_export[1], role="fp32") as other,
    ):
        found, wanted = one.infer(demo_frames[0]), other.infer(demo_frames[0])
    assert len(found) == len(wanted) > 0
    np.testing.assert_allclose(found.boxes, wanted.boxes, atol=1e-3)
    np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-5)
