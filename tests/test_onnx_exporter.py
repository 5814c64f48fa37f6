"""The ONNX artifact of the demo detector: kernels read back, names kept, bytes repeated."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxsim
import pytest
import torch
from conftest import KEPT_FLOAT, KEPT_FLOAT_PATHS, Frame
from onnx import helper, numpy_helper
from torchvision_detectors import FRAME_PX, build_single_level, build_torchvision, texture

from qexport.artifact import Artifact, load_artifact
from qexport.benchmarks.parity import compare
from qexport.calibration.calibrator import calibrate
from qexport.detectors.load import LoadedDetector
from qexport.detectors.static import StaticDetector, make_static
from qexport.encodings import Encodings
from qexport.errors import ArtifactError, ExportError
from qexport.exporters.onnx import FILE_NAMES, export
from qexport.plugins.onnx.base_graph import quantizers_in_order
from qexport.plugins.onnx.readback import read_back
from qexport.quantization.inspection import inspect_layers
from qexport.quantization.reference import QuantizedDetector, quantize
from qexport.runtimes.onnx import OnnxRunner
from qexport.runtimes.onnx_session import make_session
from qexport.runtimes.preprocess import normalised_image
from qexport.sites import codes_of
from qexport.target_options import TargetOptions

WEIGHTED = ("conv2d", "linear", "add")
LABELS = ("__background__", "a", "b", "c")


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
    again = export(
        demo_quantized, demo_encodings, tmp_path / "again", labels=demo.labels, options=TargetOptions()
    )
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
    after = {node.name for node in simplified.graph.node}
    # It drops operators that move nothing, a reshape to the same shape or a padding by zero, and no others.
    idle = ("Pad", "Reshape", "Unsqueeze", "DequantizeLinear", "Mul")
    lost = [node for node in model.graph.node if node.name not in after]
    assert {node.op_type for node in lost} <= set(idle)
    assert len(lost) < 20
    outputs = {output for node in simplified.graph.node for output in node.output}
    assert {site.tensor for site in load_artifact(demo_artifact)[0].sites} <= outputs


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


def test_export_form_with_zero_point_0_computes_the_same_codes_up_to_roi_align(
    demo_export: tuple[Artifact, Path], demo_quantized: QuantizedDetector, demo_frames: list[Frame]
) -> None:
    artifact, folder = demo_export
    sites = {site.key: site for site in artifact.sites}
    # The form for other runtimes has names of its own: its quantizers stand in the order of the graph.
    model = onnx.load(folder / FILE_NAMES["int8-zero-point-0"])
    outputs = [node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    keys = [key for key, _ in quantizers_in_order(demo_quantized.graph, dict(demo_quantized.quantize_nodes))]
    names = dict(zip(reversed(keys), reversed(outputs), strict=True))
    before = [key for key in names if not key.startswith("roi_heads.")]
    assert len(before) > 40
    with (
        OnnxRunner(folder) as shifted,
        OnnxRunner(folder, role="int8-zero-point-0") as plain,
    ):
        wanted = shifted.run(demo_frames[0], [sites[key].tensor for key in before])
        found = plain.run(demo_frames[0], [names[key] for key in before])
    for key in before:
        codes = found[names[key]]
        assert codes.dtype == np.int8
        steps = np.abs(codes_of(sites[key], wanted[sites[key].tensor]).astype(np.int16) - codes)
        assert int(steps.max()) <= 1, key
        assert float((steps > 0).mean()) < 1e-3, key


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
    with pytest.raises(ExportError, match=rf"(?s)as the encodings say.*{node.name.partition('/')[0]}"):
        read_back(tmp_path / "broken.onnx", demo_quantized.quantize_nodes, demo_encodings)


def test_read_back_of_a_float_layer_that_the_runtime_quantized_names_it(
    kept_float: tuple[Encodings, QuantizedDetector], kept_float_artifact: Path, tmp_path: Path
) -> None:
    encodings, quantized = kept_float
    model = onnx.load(kept_float_artifact / FILE_NAMES["int8"])
    site = "backbone.body.layer2.0.downsample.0"
    shield = next(node for node in model.graph.node if node.name == f"{site}/Sum")
    conv = next(node for node in model.graph.node if node.name == f"{site}/Conv")
    conv.input[0] = shield.input[0]
    model.graph.node.remove(shield)
    onnx.save(model, tmp_path / "broken.onnx")
    with pytest.raises(ExportError, match=rf"(?s)  {site}/Conv\w*: was kept in float, runs with int8"):
        read_back(tmp_path / "broken.onnx", quantized.quantize_nodes, encodings)


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
    small_static: StaticDetector, small_frames: list[Frame], tmp_path: Path
) -> None:
    detector = build_single_level()
    frames = [np.ascontiguousarray(frame[:120, :168]) for frame in small_frames]
    found = {}
    for place in ("inside", "outside"):
        static = make_static(detector, frame_px=(120, 168), preprocess=place)
        assert static.spec.resized_height_px == small_static.spec.resized_height_px
        inputs = [normalised_image(frame, static.spec) if place == "outside" else frame for frame in frames]
        encodings = calibrate(static, inputs)
        artifact = export(
            quantize(static, encodings), encodings, tmp_path / place, labels=LABELS, options=TargetOptions()
        )
        assert artifact.input.preprocess == place
        with OnnxRunner(tmp_path / place) as runner:
            found[place] = [runner.infer(frame) for frame in frames]
    for inside, outside in zip(found["inside"], found["outside"], strict=True):
        sure = [one.scores > 0.5 for one in (inside, outside)]
        assert sure[0].sum() == sure[1].sum() > 5
        np.testing.assert_allclose(inside.boxes[sure[0]], outside.boxes[sure[1]], atol=1.0)


@pytest.fixture(scope="module")
def kept_float_artifact(
    kept_float: tuple[Encodings, QuantizedDetector],
    demo: LoadedDetector,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    encodings, quantized = kept_float
    folder = tmp_path_factory.mktemp("kept-float")
    export(quantized, encodings, folder, labels=demo.labels, options=TargetOptions())
    return folder


def test_export_leaves_the_layers_that_are_kept_float_in_float(
    kept_float: tuple[Encodings, QuantizedDetector],
    kept_float_artifact: Path,
    demo_frames: list[Frame],
    demo_static: StaticDetector,
    tmp_path: Path,
) -> None:
    artifact, _ = load_artifact(kept_float_artifact)
    assert {layer.path for layer in artifact.layers}.isdisjoint(KEPT_FLOAT_PATHS)
    make_session(kept_float_artifact / FILE_NAMES["int8"], optimized=tmp_path / "optimized.onnx")
    kernels = onnx.load(tmp_path / "optimized.onnx").graph.node
    integer = {
        node.name.partition("/")[0].partition("@")[0]
        for node in kernels
        if node.op_type in ("QLinearConv", "QGemm")
    }
    assert len(integer) > 10
    assert integer.isdisjoint(KEPT_FLOAT_PATHS)
    floats = [node for node in kernels if node.op_type in ("Conv", "FusedConv", "Gemm", "FusedGemm")]
    assert len(floats) == len(KEPT_FLOAT_PATHS) + 3  # bbox_pred is called four times
    layers = inspect_layers(demo_static, keep_float=KEPT_FLOAT)
    with OnnxRunner(kept_float_artifact) as runner:
        report = compare(kept_float[1], runner, layers, demo_frames[:1], split="test")
    assert all(gate.passed for gate in report.gates)


def test_export_of_a_channel_with_huge_bias_stores_it_in_int32_and_keeps_parity(
    small_static: StaticDetector, small_frames: list[Frame], tmp_path: Path
) -> None:
    static = copy.deepcopy(small_static)
    with torch.no_grad():
        layer = static.get_submodule("backbone.3")
        layer.weight[0] *= 1e-9  # type: ignore[index, operator]
        layer.bias[0] = 900.0  # type: ignore[index, operator]
    encodings = calibrate(static, small_frames[:2])
    quantized = quantize(static, encodings)
    export(quantized, encodings, tmp_path, labels=LABELS, options=TargetOptions())
    model = onnx.load(tmp_path / FILE_NAMES["int8"])
    stored = [numpy_helper.to_array(item) for item in model.graph.initializer]
    largest = max(
        int(np.abs(array).max()) for array in stored if array.dtype == np.int32 and array.shape == (24,)
    )
    assert 2**29 < largest <= 2**30
    with OnnxRunner(tmp_path) as runner:
        report = compare(quantized, runner, inspect_layers(static), small_frames[2:], split="test")
    assert all(gate.passed for gate in report.gates)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "floats"),
    [
        ("fasterrcnn_mobilenet_v3_large_320_fpn", {"hardswish", "hardsigmoid"}),
        ("fasterrcnn_mobilenet_v3_large_fpn", {"hardswish", "hardsigmoid"}),
        ("fasterrcnn_resnet50_fpn", set()),
        ("fasterrcnn_resnet50_fpn_v2", set()),
    ],
)
def test_torchvision_detector_is_exported_and_keeps_parity(
    name: str, floats: set[str], tmp_path: Path
) -> None:
    static = make_static(build_torchvision(name), frame_px=FRAME_PX)
    frames = [texture(seed).numpy() for seed in range(4)]
    encodings = calibrate(static, frames[:3])
    quantized = quantize(static, encodings)
    artifact = export(quantized, encodings, tmp_path, labels=LABELS, options=TargetOptions())
    assert {layer.op for layer in artifact.layers if not layer.integer} == floats
    assert {layer.reason != "" for layer in artifact.layers if not layer.integer} <= {True}
    with OnnxRunner(tmp_path) as runner:
        report = compare(quantized, runner, inspect_layers(static), frames[3:], split="textures")
    assert all(gate.passed for gate in report.gates), [
        row for row in report.layers if row.status == "over_tolerance"
    ]
