"""The ONNX artifact of the demo detector: kernels read back, names kept, bytes repeated."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxsim
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper

from qexport.artifact import Artifact, load_artifact
from qexport.benchmarks.parity import compare
from qexport.calibration.calibrator import calibrate
from qexport.detectors.load import LoadedDetector, load_detector
from qexport.detectors.static import StaticDetector, make_static
from qexport.encodings import Encodings
from qexport.errors import ArtifactError, ExportError
from qexport.exporters.onnx import FILE_NAMES, export
from qexport.plugins.onnx.readback import read_back
from qexport.quantization.inspection import inspect_layers
from qexport.quantization.reference import QuantizedDetector, quantize
from qexport.runtimes.onnx import OnnxRunner
from qexport.runtimes.preprocess import normalised_image

Frame = NDArray[np.uint8]
WEIGHTED = ("conv2d", "linear", "add")


def test_export_every_quantized_layer_runs_on_an_integer_kernel(
    demo_export: tuple[Artifact, Path], demo_encodings: Encodings
) -> None:
    artifact, _ = demo_export
    weights = {row.path for row in demo_encodings.rows if row.port == "weight"}
    found = {layer.path for layer in artifact.layers if layer.op in ("conv2d", "linear")}
    assert found == weights
    assert all(layer.integer for layer in artifact.layers)
    kernels = {kernel for layer in artifact.layers if layer.op in WEIGHTED for kernel in layer.kernels}
    assert kernels == {"QLinearConv", "QGemm", "QLinearAdd"}


def test_export_every_row_of_the_encodings_has_its_place(
    demo_export: tuple[Artifact, Path], demo_encodings: Encodings
) -> None:
    activations = {row.key for row in demo_encodings.rows if row.port != "weight"}
    assert {site.key for site in demo_export[0].sites} == activations


def test_export_twice_gives_the_same_bytes(
    demo: LoadedDetector,
    demo_quantized: QuantizedDetector,
    demo_encodings: Encodings,
    demo_export: tuple[Artifact, Path],
    tmp_path: Path,
) -> None:
    again = export(demo_quantized, demo_encodings, tmp_path / "again", labels=demo.labels)
    assert again == demo_export[0]
    for name in FILE_NAMES.values():
        assert (tmp_path / "again" / name).read_bytes() == (demo_export[1] / name).read_bytes()


def test_export_names_are_module_paths_and_survive_onnx_simplifier(
    demo: LoadedDetector, demo_artifact: Path
) -> None:
    paths = {path for path, _ in demo.module.named_modules()}
    ours = {"preprocess", "rpn.proposals", "roi_heads.detections"}
    model = onnx.load(demo_artifact / FILE_NAMES["int8"])
    names = {node.name for node in model.graph.node}
    assert len(names) == len(model.graph.node)
    assert {name.partition("/")[0].partition("@")[0] for name in names} <= paths | ours
    simplified, same = onnxsim.simplify(model)
    assert same
    integer = ("Conv", "Gemm", "QuantizeLinear", "QLinearMatMul", "Add")
    before = {node.name for node in model.graph.node if node.op_type in integer and "/" in node.name}
    after = {node.name for node in simplified.graph.node}
    quantized = {
        name for name in before if "rpn.proposals" not in name and "roi_heads.detections" not in name
    }
    assert {name for name in quantized if name.startswith("backbone")} <= after
    outputs = {output for node in simplified.graph.node for output in node.output}
    artifact, _ = load_artifact(demo_artifact)
    trunk = {site.tensor for site in artifact.sites if site.key.startswith("backbone")}
    assert trunk <= outputs


def test_export_float_file_agrees_with_the_static_detector(
    demo_static: StaticDetector, demo_artifact: Path, demo_frames: list[Frame]
) -> None:
    with OnnxRunner(demo_artifact, role="fp32") as runner:
        for frame in demo_frames:
            found = runner.infer(frame)
            with torch.no_grad():
                wanted = demo_static(torch.from_numpy(frame))
            count = int(wanted.count)
            assert len(found) == count
            np.testing.assert_allclose(found.boxes, wanted.boxes[:count].numpy(), atol=2e-3)
            np.testing.assert_allclose(found.scores, wanted.scores[:count].numpy(), atol=1e-4)
            np.testing.assert_array_equal(found.labels, wanted.labels[:count].numpy())


def test_export_form_with_zero_point_0_has_the_same_scales_and_finds_the_same_boxes(
    demo_artifact: Path, demo_frames: list[Frame]
) -> None:
    model = onnx.load(demo_artifact / FILE_NAMES["int8-zero-point-0"])
    points = {
        initializer.name: onnx.numpy_helper.to_array(initializer) for initializer in model.graph.initializer
    }
    quantizers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert quantizers
    assert all(
        points[node.input[2]].dtype == np.int8 and not points[node.input[2]].any() for node in quantizers
    )
    int32 = [name for name, value in points.items() if value.dtype == np.int32]
    assert not [
        node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in int32
    ]
    with (
        OnnxRunner(demo_artifact) as uint8,
        OnnxRunner(demo_artifact, role="int8-zero-point-0") as int8,
    ):
        one, other = uint8.infer(demo_frames[0]), int8.infer(demo_frames[0])
    sure = [found.scores > 0.5 for found in (one, other)]
    assert sorted(one.labels[sure[0]]) == sorted(other.labels[sure[1]])


@pytest.mark.parametrize("operator", ["Conv", "Add"])
def test_read_back_of_a_layer_that_cannot_be_fused_names_it(
    demo_artifact: Path,
    demo_quantized: QuantizedDetector,
    demo_encodings: Encodings,
    tmp_path: Path,
    operator: str,
) -> None:
    model = onnx.load(demo_artifact / FILE_NAMES["int8"])
    node = next(node for node in model.graph.node if node.op_type == operator and "layer2" in node.name)
    # An operator between the layer and its quantizer, as a careless exporter leaves it.
    between = helper.make_node("Sin", [f"{node.output[0]}/raw"], [node.output[0]], name=f"{node.name}/Sin")
    node.output[0] = between.input[0]
    index = list(model.graph.node).index(node)
    model.graph.node.insert(index + 1, between)
    onnx.save(model, tmp_path / "broken.onnx")
    with pytest.raises(ExportError, match=rf"(?s)integer kernel.*{node.name.partition('/')[0]}"):
        read_back(tmp_path / "broken.onnx", demo_quantized.quantize_nodes, demo_encodings)


def test_artifact_edited_after_export_is_refused(demo_artifact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(demo_artifact, tmp_path / "copy")
    path = copy / FILE_NAMES["int8"]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="changed after export"):
        load_artifact(copy)
    path.unlink()
    with pytest.raises(ArtifactError, match="file is missing"):
        load_artifact(copy)


def test_preprocessing_outside_the_artifact_finds_what_inside_finds(
    demo: LoadedDetector, calibration_frames: list[Frame], demo_frames: list[Frame], tmp_path: Path
) -> None:
    found = {}
    for place in ("inside", "outside"):
        static = make_static(demo.module, frame_px=(200, 260), preprocess=place)
        frames = [np.ascontiguousarray(frame[:200, :260]) for frame in calibration_frames[:2]]
        inputs = [normalised_image(frame, static.spec) if place == "outside" else frame for frame in frames]
        encodings = calibrate(static, inputs)
        artifact = export(quantize(static, encodings), encodings, tmp_path / place, labels=demo.labels)
        assert artifact.input.preprocess == place
        with OnnxRunner(tmp_path / place) as runner:
            found[place] = runner.infer(np.ascontiguousarray(demo_frames[0][:200, :260]))
    sure = {place: one.scores > 0.5 for place, one in found.items()}
    assert sure["inside"].sum() == sure["outside"].sum() > 0
    inside, outside = (found[place].boxes[sure[place]] for place in ("inside", "outside"))
    np.testing.assert_allclose(inside, outside, atol=3.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "frame_px", "floats"),
    [
        ("fasterrcnn_mobilenet_v3_large_320_fpn", (240, 320), {"hardswish", "hardsigmoid"}),
        ("fasterrcnn_resnet50_fpn_v2", (96, 128), set()),
    ],
)
def test_torchvision_detector_is_exported_and_keeps_parity(
    name: str, frame_px: tuple[int, int], floats: set[str], tmp_path: Path
) -> None:
    loaded = load_detector(f"torchvision:{name}", None)
    loaded.module.transform.min_size, loaded.module.transform.max_size = (min(frame_px),), max(frame_px)
    static = make_static(loaded.module, frame_px=frame_px, proposals=50)
    rng = np.random.Generator(np.random.PCG64(0))
    frames = [rng.integers(0, 256, (*frame_px, 3), np.uint8) for _ in range(3)]
    encodings = calibrate(static, frames[:2])
    quantized = quantize(static, encodings)
    artifact = export(quantized, encodings, tmp_path, labels=loaded.labels)
    declared = {layer.op for layer in artifact.layers if not layer.integer}
    assert declared == floats
    with OnnxRunner(tmp_path) as runner:
        report = compare(quantized, runner, inspect_layers(static), frames[2:], split="noise")
    assert all(gate.passed for gate in report.gates), [
        row for row in report.layers if row.status == "over_tolerance"
    ]
