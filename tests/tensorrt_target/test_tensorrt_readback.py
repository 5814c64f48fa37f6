"""What the engine's own list of layers says of the encodings: a layer that lost its integers is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import pytest
from conftest import KEPT_FLOAT, KEPT_FLOAT_PATHS, Frame
from tensorrt_models import build, maker_of, needs_builder, node_named

from qexport.benchmarks.parity import compare
from qexport.emulation.tensorrt import EvaluatedRunner
from qexport.errors import ExportError
from qexport.exporters.tensorrt import FILE_NAMES, export
from qexport.plugins.tensorrt.readback import read_back, reformats_in
from qexport.quantization.inspection import inspect_layers
from qexport.runtimes.tensorrt_layers import EngineLayer
from qexport.target_options import TensorrtOptions

if TYPE_CHECKING:
    from qexport.artifact import Artifact
    from qexport.detectors.load import LoadedDetector
    from qexport.detectors.static import StaticDetector
    from qexport.encodings import Encodings
    from qexport.quantization.reference import QuantizedDetector

pytestmark = needs_builder
CONV, FC = "backbone.body.layer2.0.conv1", "roi_heads.box_head.fc6"


@pytest.fixture(scope="module")
def engine_layers(tensorrt_export: tuple[Artifact, Path]) -> tuple[EngineLayer, ...]:
    return build(tensorrt_export[1] / FILE_NAMES["int8"]).layers


def bypass(model: onnx.ModelProto, layer: onnx.NodeProto, index: int) -> None:
    """Give a layer the real values that stand before quantizer and dequantizer."""
    dequantizer = maker_of(model, layer.input[index])
    quantizer = maker_of(model, dequantizer.input[0])
    assert (quantizer.op_type, dequantizer.op_type) == ("QuantizeLinear", "DequantizeLinear")
    layer.input[index] = quantizer.input[0]


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [(f"{CONV}/Conv", (0, 1)), (f"{CONV}/Conv", (1,)), (f"{FC}/Gemm", (0, 1)), (f"{FC}/Gemm", (1,))],
    ids=["conv", "weights of conv", "linear", "weights of linear"],
)
def test_read_back_of_a_layer_that_lost_its_quantizers_names_layer_and_cause(
    layer: str,
    inputs: tuple[int, ...],
    tensorrt_export: tuple[Artifact, Path],
    demo_quantized: QuantizedDetector,
    demo_encodings: Encodings,
    tmp_path: Path,
) -> None:
    model = onnx.load(tensorrt_export[1] / FILE_NAMES["int8"])
    for index in inputs:
        bypass(model, node_named(model, layer), index)
    onnx.save(model, tmp_path / "edited.onnx")
    layers = build(tmp_path / "edited.onnx").layers
    with pytest.raises(ExportError) as caught:
        read_back(layers, demo_quantized.quantize_nodes, demo_encodings, library="tensorrt 9.9")
    first, *rows, advice = str(caught.value).splitlines()
    path, operator = layer.split("/")
    assert first == "tensorrt 9.9 does not run every layer as the encodings say:"
    (row,) = rows
    # With float weights beside int8 activations, a fusion casts in front of a product in float.
    assert row.startswith(f"  {path} ({'conv2d' if operator == 'Conv' else 'linear'}): reads Float")
    assert "--keep-float PATH" in advice


def test_read_back_of_a_layer_that_is_not_in_the_engine_says_so(
    engine_layers: tuple[EngineLayer, ...], demo_quantized: QuantizedDetector, demo_encodings: Encodings
) -> None:
    left = [layer for layer in engine_layers if f"{CONV}/Conv" not in layer.nodes]
    assert len(left) < len(engine_layers)
    with pytest.raises(ExportError, match=rf"{CONV} \(conv2d\): no layer of that name in the engine"):
        read_back(left, demo_quantized.quantize_nodes, demo_encodings, library="")


def test_read_back_of_a_layer_that_was_kept_float_and_reads_int8_names_it(
    engine_layers: tuple[EngineLayer, ...], kept_float: tuple[Encodings, QuantizedDetector]
) -> None:
    encodings, quantized = kept_float
    with pytest.raises(ExportError) as caught:
        read_back(engine_layers, quantized.quantize_nodes, encodings, library="")
    rows = [line.strip() for line in str(caught.value).splitlines()[1:-1]]
    assert all(row.endswith(": was kept in float, reads int8") for row in rows)
    assert {row.partition("/")[0].partition("@")[0] for row in rows} == KEPT_FLOAT_PATHS


def test_read_back_counts_the_reformats_beside_a_layer(
    engine_layers: tuple[EngineLayer, ...], demo_quantized: QuantizedDetector, demo_encodings: Encodings
) -> None:
    moved = EngineLayer(
        f"Reformatting CopyNode for Input Tensor 0 to {CONV}/Conv",
        "Reformat",
        ("Int8",),
        ("Int8",),
        (f"{CONV}/Conv",),
    )
    decisions = read_back(
        [*engine_layers, moved, moved], demo_quantized.quantize_nodes, demo_encodings, library=""
    )
    assert {decision.path: decision.reformats for decision in decisions if decision.reformats} == {CONV: 2}
    assert reformats_in([*engine_layers, moved], ("backbone.",)) == [moved]
    assert reformats_in([moved], ("rpn.",)) == []


def test_read_back_tells_the_calls_of_one_module_apart(
    engine_layers: tuple[EngineLayer, ...], demo_quantized: QuantizedDetector, demo_encodings: Encodings
) -> None:
    head = "rpn.head.cls_logits"

    def in_float(layer: EngineLayer) -> EngineLayer:
        if f"{head}@2/Conv" in layer.nodes and layer.kind == "convolution":
            return dataclasses.replace(layer, inputs=("Float",))
        return layer

    with pytest.raises(ExportError) as caught:
        read_back(map(in_float, engine_layers), demo_quantized.quantize_nodes, demo_encodings, library="")
    assert str(caught.value).splitlines()[1:-1] == [f"  {head}@2 (conv2d): reads Float"]


@pytest.fixture(scope="module")
def kept_float_export(
    kept_float: tuple[Encodings, QuantizedDetector],
    demo: LoadedDetector,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Artifact, Path]:
    encodings, quantized = kept_float
    folder = tmp_path_factory.mktemp("tensorrt-kept-float")
    return export(quantized, encodings, folder, labels=demo.labels, options=TensorrtOptions()), folder


def test_export_leaves_the_layers_that_are_kept_float_in_float(
    kept_float_export: tuple[Artifact, Path],
) -> None:
    artifact, folder = kept_float_export
    weighted = [layer for layer in artifact.layers if layer.op in ("conv2d", "linear")]
    assert len({layer.path for layer in weighted}) > 10
    assert all(layer.integer for layer in weighted)
    assert {layer.path for layer in weighted}.isdisjoint(KEPT_FLOAT_PATHS)
    kernels = [layer for layer in build(folder / FILE_NAMES["int8"]).layers if layer.kind == "convolution"]
    floats = {
        layer.nodes[0].partition("/")[0].partition("@")[0] for layer in kernels if "Int8" not in layer.inputs
    }
    assert floats == {path for path in KEPT_FLOAT_PATHS if "box_head" not in path}


def test_residual_of_a_convolution_that_is_kept_float_goes_into_the_other(
    kept_float_export: tuple[Artifact, Path],
) -> None:
    fused = {row.key.partition("@")[0] for row in kept_float_export[0].unquantized}
    assert {"backbone.body.layer1.0.conv2", "backbone.body.layer2.0.conv2"} <= fused
    assert fused.isdisjoint(KEPT_FLOAT_PATHS)


def test_compare_with_layers_kept_float_every_other_within_a_step(
    kept_float: tuple[Encodings, QuantizedDetector],
    kept_float_export: tuple[Artifact, Path],
    demo_static: StaticDetector,
    demo_frames: list[Frame],
) -> None:
    layers = inspect_layers(demo_static, keep_float=KEPT_FLOAT)
    with EvaluatedRunner(kept_float_export[1]) as runner:
        report = compare(kept_float[1], runner, layers, demo_frames[:1], split="test")
    assert [gate for gate in report.gates if not gate.passed] == []
    compared = {row.path for row in report.layers if row.values}
    assert {"backbone.body.layer1.0.downsample.0", "backbone.body.layer2.0.conv1"} <= compared
