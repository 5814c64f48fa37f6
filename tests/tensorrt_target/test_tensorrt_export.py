"""The TensorRT artifact of the demo detector: what NVIDIA's builder made of it, read back; the same bytes twice."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from conftest import Frame
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from tensorrt_models import needs_builder

from qexport.artifact import load_artifact
from qexport.benchmarks.parity import compare
from qexport.emulation.tensorrt import EvaluatedRunner
from qexport.engines import FOLDER, load_engines
from qexport.exporters.tensorrt import FILE_NAMES, choose_forms, export
from qexport.files import sha256_file
from qexport.plugins.tensorrt.readback import reformats_in
from qexport.plugins.tensorrt.residual_fusion import FUSED
from qexport.quantization.inspection import inspect_layers
from qexport.quantization.reference import quantize
from qexport.runtimes.onnx_session import make_session
from qexport.runtimes.runner import OUTPUTS
from qexport.runtimes.tensorrt_builder import EngineBuilder, build_from_file
from qexport.runtimes.tensorrt_library import load_library
from qexport.target_options import BuildOptions, TensorrtOptions

if TYPE_CHECKING:
    from qexport.artifact import Artifact
    from qexport.detectors.load import LoadedDetector
    from qexport.detectors.static import StaticDetector
    from qexport.encodings import Encodings
    from qexport.quantization.reference import QuantizedDetector

pytestmark = needs_builder
Export = tuple["Artifact", Path]
NETWORKS = ("int8", "fp16", "fp32")
LABELS = ("__background__", "a", "b", "c")


def load(folder: Path, role: str) -> onnx.ModelProto:
    return onnx.load(folder / FILE_NAMES[role])


def stored(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    return {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}


def test_export_writes_every_file_with_its_role_and_says_what_it_stands_on(tensorrt_export: Export) -> None:
    artifact, folder = tensorrt_export
    assert load_artifact(folder)[0] == artifact
    assert {file.role: file.name for file in artifact.files} == {
        "int8": "detector.int8.onnx",
        "fp16": "detector.fp16.onnx",
        "fp32": "detector.fp32.onnx",
        "calibration-cache": "calibration.cache",
    }
    assert (artifact.target, artifact.rung) == ("tensorrt", "built")
    assert artifact.forms == {"roi_align": "grid", "nms": "loop"}  # this library has neither plugin nor NMS
    assert artifact.versions["tensorrt_rtx"] == load_library().version


@pytest.mark.parametrize("role", NETWORKS)
def test_export_is_of_operator_set_17_which_tensorrt_8_5_reads(tensorrt_export: Export, role: str) -> None:
    model = load(tensorrt_export[1], role)
    assert [(one.domain, one.version) for one in model.opset_import] == [("", 17)]
    assert model.ir_version == 8
    assert [tensor.name for tensor in model.graph.output] == list(OUTPUTS)
    assert [tensor.type.tensor_type.elem_type for tensor in model.graph.input] == [TensorProto.UINT8]


def test_export_every_convolution_and_linear_reads_int8_in_the_built_engine(
    tensorrt_export: Export, demo_encodings: Encodings
) -> None:
    artifact, _ = tensorrt_export
    weighted = [layer for layer in artifact.layers if layer.op in ("conv2d", "linear")]
    assert {layer.path for layer in weighted} == {
        row.path for row in demo_encodings.rows if row.port == "weight"
    }
    assert all(layer.integer and not layer.reason for layer in weighted)
    assert {kernel for layer in weighted for kernel in layer.kernels} == {"correlation", "gemm"}
    assert all(layer.reason for layer in artifact.layers if not layer.integer)


def test_export_engine_moves_no_layout_in_trunk_and_pyramid(tensorrt_export: Export) -> None:
    artifact, folder = tensorrt_export
    assert [layer for layer in artifact.layers if layer.reformats] == []
    builder = EngineBuilder(load_library())
    builder.parse(folder / FILE_NAMES["int8"])
    layers = builder.build(BuildOptions()).layers
    assert sum(layer.kind == "convolution" for layer in layers) >= 25
    assert reformats_in(layers, ("backbone.",)) == []


def test_export_every_row_has_a_place_or_is_declared_unquantized(
    tensorrt_export: Export, demo_encodings: Encodings
) -> None:
    artifact, folder = tensorrt_export
    activations = {row.key for row in demo_encodings.rows if row.port != "weight"}
    placed, declared = {site.key for site in artifact.sites}, {row.key for row in artifact.unquantized}
    assert placed | declared == activations
    assert placed & declared == set()
    assert {row.reason for row in artifact.unquantized} == {FUSED}
    made = {output for node in load(folder, "int8").graph.node for output in node.output}
    assert {site.tensor for site in artifact.sites} <= made
    assert artifact.float_sites["proposals"] in made


@pytest.mark.parametrize("role", NETWORKS)
def test_export_names_are_module_paths_each_once(
    tensorrt_export: Export, demo: LoadedDetector, role: str
) -> None:
    paths = {path for path, _ in demo.module.named_modules()}
    names = [node.name for node in load(tensorrt_export[1], role).graph.node]
    assert len(set(names)) == len(names)
    ours = {"preprocess", "rpn.proposals", "roi_heads.detections"}
    assert {name.partition("/")[0].partition("@")[0] for name in names} <= paths | ours


def test_export_builds_three_engines_and_records_what_each_is_bound_to(tensorrt_export: Export) -> None:
    artifact, folder = tensorrt_export
    engines = load_engines(folder).engines
    assert {engine.role for engine in engines} == set(NETWORKS)
    for engine in engines:
        path = folder / FOLDER / engine.name
        assert (engine.size_bytes, engine.sha256) == (path.stat().st_size, sha256_file(path))
        assert engine.size_bytes > 1_000_000
        assert engine.source == engine.role
        assert engine.source_sha256 == artifact.file(engine.role).sha256
        assert engine.built_for.library == load_library().name
        assert (engine.built_for.gpu, engine.built_for.driver, engine.options) == ("", "", {})
        assert engine.build_s > 0


def test_export_twice_gives_the_same_bytes_but_for_engines(
    demo: LoadedDetector,
    demo_quantized: QuantizedDetector,
    demo_encodings: Encodings,
    tensorrt_export: Export,
    tmp_path: Path,
) -> None:
    again = export(demo_quantized, demo_encodings, tmp_path, labels=demo.labels, options=TensorrtOptions())
    assert again == tensorrt_export[0]
    for name in (*FILE_NAMES.values(), "artifact.json"):
        assert (tmp_path / name).read_bytes() == (tensorrt_export[1] / name).read_bytes(), name


def test_export_with_int8_weights_stores_a_byte_each_and_keeps_parity(
    small_static: StaticDetector, small_encodings: Encodings, small_frames: list[Frame], tmp_path: Path
) -> None:
    quantized = quantize(small_static, small_encodings)
    options = TensorrtOptions(weights="int8", timing_cache=False)
    artifact = export(quantized, small_encodings, tmp_path, labels=LABELS, options=options)
    assert all(layer.integer for layer in artifact.layers if layer.op in ("conv2d", "linear"))
    assert artifact.file("int8").size_bytes < artifact.file("fp32").size_bytes / 3
    model = load(tmp_path, "int8")
    arrays = stored(model)
    quantized_weights = [node for node in model.graph.node if node.input and node.input[0] in arrays]
    assert {node.op_type for node in quantized_weights if arrays[node.input[0]].size > 1000} == {
        "DequantizeLinear"
    }
    assert max(arrays.values(), key=lambda array: array.size).dtype == np.int8
    with EvaluatedRunner(tmp_path) as runner:
        report = compare(quantized, runner, inspect_layers(small_static), small_frames[2:3], split="test")
    assert [gate for gate in report.gates if not gate.passed] == []


def test_fp16_file_holds_weights_in_float16_and_gives_boxes_in_float32(tensorrt_export: Export) -> None:
    model = load(tensorrt_export[1], "fp16")
    arrays = stored(model)
    weighted = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(weighted) > 20
    assert {arrays[name].dtype for node in weighted for name in node.input[1:]} == {np.dtype(np.float16)}
    outputs = {tensor.name: tensor.type.tensor_type.elem_type for tensor in model.graph.output}
    assert outputs["boxes"] == outputs["scores"] == TensorProto.FLOAT
    half, whole = (tensorrt_export[0].file(role).size_bytes for role in ("fp16", "fp32"))
    assert half < 0.6 * whole


@pytest.mark.parametrize(("role", "atol_px", "atol_score"), [("fp32", 1e-3, 1e-5), ("fp16", 0.1, 5e-3)])
def test_network_evaluated_agrees_with_onnx_runtime_on_the_same_file(
    tensorrt_export: Export, demo_frames: list[Frame], role: str, atol_px: float, atol_score: float
) -> None:
    session = make_session(tensorrt_export[1] / FILE_NAMES[role])
    with EvaluatedRunner(tensorrt_export[1], role=role) as runner:
        for frame in demo_frames:
            found = runner.run(frame)
            names = [output.name for output in session.get_outputs()]
            given = {session.get_inputs()[0].name: frame}
            wanted = dict(zip(names, session.run(names, given), strict=True))
            count = int(wanted["count"])
            assert int(found["count"]) == count
            np.testing.assert_allclose(found["boxes"][:count], wanted["boxes"][:count], atol=atol_px)
            np.testing.assert_allclose(found["scores"][:count], wanted["scores"][:count], atol=atol_score)
            np.testing.assert_array_equal(found["labels"][:count], wanted["labels"][:count])


def test_fp32_network_evaluated_agrees_with_the_static_detector(
    tensorrt_export: Export, demo_static: StaticDetector, demo_frames: list[Frame]
) -> None:
    with EvaluatedRunner(tensorrt_export[1], role="fp32") as runner:
        for frame in demo_frames:
            found = runner.infer(frame)
            with torch.no_grad():
                wanted = demo_static(torch.from_numpy(frame))
            assert len(found) == int(wanted.count)
            np.testing.assert_allclose(found.boxes, wanted.boxes[: len(found)].numpy(), atol=2e-3)
            np.testing.assert_allclose(found.scores, wanted.scores[: len(found)].numpy(), atol=1e-4)


def test_forms_that_are_asked_for_are_taken_and_the_others_are_the_librarys() -> None:
    library = load_library()
    assert choose_forms(library, TensorrtOptions(nms="layer")) == {"roi_align": "grid", "nms": "layer"}
    assert choose_forms(library, TensorrtOptions(roi_align="plugin"))["roi_align"] == "plugin"


def test_build_of_one_file_again_replaces_its_engine_alone(tensorrt_export: Export, tmp_path: Path) -> None:
    artifact, folder = tensorrt_export
    for name in FILE_NAMES.values():
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    files = {file.role: file.name for file in artifact.files}
    options = BuildOptions(workspace_mb=512, timing_cache=False)
    for given in (BuildOptions(), options):
        build_from_file(load_library(), tmp_path, files, "fp32", given)
    (engine,) = load_engines(tmp_path).engines
    assert engine.options == {"workspace_mb": "512", "timing_cache": "False"}
    assert [path.name for path in (tmp_path / FOLDER).glob("*.engine")] == ["detector.fp32.engine"]
