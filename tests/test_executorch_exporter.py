"""The ExecuTorch artifact of the demo detector: delegated as a whole, read back by layer, equal to its references."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from conftest import KEPT_FLOAT_PATHS, Frame

pytest.importorskip("executorch.version", reason="executorch is not installed (the extra executorch)")

from qexport.artifact import Artifact, load_artifact
from qexport.benchmarks.parity import compare
from qexport.detectors.load import LoadedDetector
from qexport.detectors.static import StaticDetector
from qexport.encodings import Encodings
from qexport.errors import ExportError
from qexport.exporters.executorch import FILE_NAMES, export
from qexport.plugins.executorch.emission import Method, Written, write_program
from qexport.plugins.executorch.held import Held
from qexport.plugins.executorch.lowering import Lowering
from qexport.plugins.executorch.operators import operators
from qexport.plugins.executorch.program_file import ProgramFile
from qexport.plugins.executorch.readback import read_back
from qexport.quantization.graph import constant_of, op_name
from qexport.quantization.inspection import inspect_layers
from qexport.quantization.local import LocalReference, Recorder, proposals_node
from qexport.quantization.reference import QuantizedDetector
from qexport.runtimes.executorch import RUNNER
from qexport.runtimes.executorch_table import FORWARD, PROPOSALS
from qexport.target_options import TargetOptions


@pytest.fixture(scope="module")
def exported(
    demo: LoadedDetector,
    demo_quantized: QuantizedDetector,
    demo_encodings: Encodings,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Artifact, Path]:
    folder = tmp_path_factory.mktemp("executorch")
    return export(demo_quantized, demo_encodings, folder, labels=demo.labels, options=TargetOptions()), folder


def test_export_writes_two_files_and_says_so(exported: tuple[Artifact, Path]) -> None:
    artifact, folder = exported
    assert artifact.target == "executorch"
    assert {file.role: file.name for file in artifact.files} == FILE_NAMES
    assert load_artifact(folder)[0] == artifact
    assert {path.name for path in folder.iterdir()} == {*FILE_NAMES.values(), "artifact.json"}
    assert artifact.versions["executorch"]


def test_export_delegates_every_multiply_accumulate_of_the_layers(exported: tuple[Artifact, Path]) -> None:
    assert exported[0].forms["delegated"].startswith("XNNPACK: 100.0 % of the multiply-accumulates")


def test_export_gives_every_layer_but_roi_align_an_integer_kernel(exported: tuple[Artifact, Path]) -> None:
    floats = [layer.op for layer in exported[0].layers if not layer.integer]
    assert floats == ["multiscale_roi_align"]
    assert len(exported[0].layers) > 40


def test_parity_of_every_layer_is_one_step_at_most(
    exported: tuple[Artifact, Path],
    demo_static: StaticDetector,
    demo_quantized: QuantizedDetector,
    demo_frames: list[Frame],
) -> None:
    with RUNNER(exported[1]) as runner:
        report = compare(
            demo_quantized,
            runner,
            inspect_layers(demo_static),
            demo_frames[:2],
            split="test",
            max_unmatched=0.0,
        )
    assert [gate.name for gate in report.gates if not gate.passed] == []
    compared = [row for row in report.layers if row.values]
    assert sum(row.differing or 0 for row in compared) < 50e-6 * sum(row.values for row in compared)


def test_forced_layers_compute_what_the_reference_does_from_the_same_inputs(
    exported: tuple[Artifact, Path], demo_quantized: QuantizedDetector, demo_frames: list[Frame]
) -> None:
    frame = demo_frames[0]
    boxes = proposals_node(demo_quantized.graph).name
    wanted = {node.name: key for key, node in demo_quantized.quantize_nodes.items()} | {boxes: PROPOSALS}
    recorder = Recorder(demo_quantized.graph, wanted)
    with torch.no_grad():
        recorder.run(torch.from_numpy(frame))
    proposals = recorder.values.pop(PROPOSALS)
    with RUNNER(exported[1]) as runner:
        given = {key: value.numpy() for key, value in recorder.values.items()}
        found = runner.run_forced(frame, given, proposals.numpy())
    local = LocalReference(demo_quantized)
    values = differing = 0
    for key in demo_quantized.quantize_nodes:
        expected = local.expected(key, recorder.values, torch.from_numpy(frame), proposals).numpy()
        steps = np.abs(expected.astype(np.int16) - found[key].reshape(expected.shape))
        assert steps.max() <= 1, key
        values, differing = values + steps.size, differing + int((steps > 0).sum())
    assert differing < 20e-6 * values


def test_fp32_program_detects_what_torch_detects(
    exported: tuple[Artifact, Path], demo_quantized: QuantizedDetector, demo_frames: list[Frame]
) -> None:
    with torch.no_grad():
        boxes, scores, labels, count = demo_quantized.float_graph(torch.from_numpy(demo_frames[0]))
    with RUNNER(exported[1], role="fp32") as runner:
        found = runner.run(demo_frames[0])
    assert int(found["count"]) == int(count) > 0
    np.testing.assert_array_equal(found["labels"], labels)
    np.testing.assert_allclose(found["boxes"], boxes, atol=2e-2, rtol=0)
    np.testing.assert_allclose(found["scores"], scores, atol=1e-4, rtol=0)


def test_profile_matches_every_step_of_both_files(
    exported: tuple[Artifact, Path], demo_frames: list[Frame]
) -> None:
    for role in FILE_NAMES:
        with RUNNER(exported[1], role=role) as runner:
            (run,) = runner.profile(demo_frames[0], warmup=1, runs=1)
            owners = runner.kernel_owners()
        assert {"backbone.body.conv1", "rpn.head.cls_logits", "roi_heads.box_head.fc6"} <= set(
            owners.values()
        )
        assert sum(kernel.duration_ms for kernel in run.kernels) > 0.9 * run.whole_ms


Read = tuple[Written, dict[str, Held]]


@pytest.fixture(scope="module")
def layers_alone(demo_quantized: QuantizedDetector) -> Read:
    """A program of the trunk's first layers: what is read back of it is what is read back of all."""
    lowering = Lowering(demo_quantized.graph, operators())
    lowering.input(next(node for node in demo_quantized.graph.graph.nodes if node.op == "placeholder"))
    held = {key: lowering.codes(node) for key, node in list(demo_quantized.quantize_nodes.items())[:6]}
    outputs = {key: one.value for key, one in held.items()}
    return write_program({FORWARD: Method(lowering.steps, outputs)}), held


def read(read_from: Read, quantized: QuantizedDetector, encodings: Encodings) -> None:
    written, held = read_from
    nodes = {key: quantized.quantize_nodes[key] for key in held}
    read_back(written, held, nodes, encodings, name="demo.pte")


def test_read_back_of_what_the_encodings_say_passes(
    layers_alone: Read, demo_quantized: QuantizedDetector, demo_encodings: Encodings
) -> None:
    read(layers_alone, demo_quantized, demo_encodings)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("backbone.body.conv1@0/output:conv2d", "backbone.body.conv1@0/output:conv2d: qint8 of scale"),
        ("backbone.body.layer1.0.conv1@0/weight", "layer1.0.conv1@0/output:conv2d: weight of type qcint8"),
    ],
)
def test_read_back_of_another_scale_is_refused_by_layer(
    layers_alone: Read, demo_quantized: QuantizedDetector, demo_encodings: Encodings, key: str, message: str
) -> None:
    rows = tuple(
        msgspec.structs.replace(
            row,
            params=msgspec.structs.replace(row.params, scale=tuple(2 * scale for scale in row.params.scale)),
        )
        if row.key == key
        else row
        for row in demo_encodings.rows
    )
    with pytest.raises(ExportError, match=message):
        read(layers_alone, demo_quantized, msgspec.structs.replace(demo_encodings, rows=rows))


def test_read_back_of_a_layer_outside_of_xnnpack_is_refused_by_name(
    layers_alone: Read, demo_quantized: QuantizedDetector, demo_encodings: Encodings
) -> None:
    written, held = layers_alone
    key = "backbone.body.maxpool@0/output:max_pool2d"
    lowering = Lowering(demo_quantized.graph, operators())
    (outside,) = lowering.steps.kernel(torch.clone, lowering.steps.input("x", (1, 64, 80, 24), "int8", 0.1))
    sabotaged = {**held, key: Held.map(outside)}
    with pytest.raises(ExportError, match=f"{key}: ExecuTorch's own kernel is no integer kernel of XNNPACK"):
        read((written, sabotaged), demo_quantized, demo_encodings)


def test_read_back_of_a_layer_that_was_to_stay_in_float_is_refused(
    layers_alone: Read, demo_quantized: QuantizedDetector, kept_float: tuple[Encodings, QuantizedDetector],
    demo_encodings: Encodings,
) -> None:  # fmt: skip
    rows = tuple(
        msgspec.structs.replace(row, path="backbone.body.conv1", call=0, op="conv2d")
        for row in kept_float[0].float_rows[:1]
    )
    with pytest.raises(ExportError, match=r"backbone.body.conv1: was kept in float, Conv2d reads qint8"):
        read(layers_alone, demo_quantized, msgspec.structs.replace(demo_encodings, float_rows=rows))


def test_biases_are_the_references_own(
    exported: tuple[Artifact, Path], demo_quantized: QuantizedDetector
) -> None:
    graph = demo_quantized.graph
    wanted = [
        constant_of(graph, node.args[2]).numpy()
        for node in graph.graph.nodes
        if op_name(node) in ("conv2d", "linear") and node.args[2] is not None
    ]
    found = []
    for call in ProgramFile((exported[1] / FILE_NAMES["int8"]).read_bytes()).calls(FORWARD):
        for node in call.subgraph.nodes if call.subgraph is not None else ():
            if node.kind in ("Conv2d", "DepthwiseConv2d", "FullyConnected"):
                assert call.subgraph is not None
                bias = call.subgraph.values[node.inputs[2]]
                if bias.datatype == "qcint32":
                    codes = call.subgraph.data(bias.buffer, np.int32)
                    found.append(codes.astype(np.float32) * np.asarray(bias.scale, np.float32))
    assert len(found) == len(wanted) > 30
    left = [bias.tobytes() for bias in found]
    for bias in wanted:
        left.remove(bias.astype(np.float32).tobytes())
    assert not left


def test_layers_kept_in_float_stay_in_float(kept_float: tuple[Encodings, QuantizedDetector]) -> None:
    encodings, quantized = kept_float
    lowering = Lowering(quantized.graph, operators())
    lowering.input(next(node for node in quantized.graph.graph.nodes if node.op == "placeholder"))
    held = {
        key: lowering.codes(node)
        for key, node in quantized.quantize_nodes.items()
        if key.startswith(("preprocess", "backbone"))
    }
    written = write_program({FORWARD: Method(lowering.steps, {key: one.value for key, one in held.items()})})
    nodes = {key: quantized.quantize_nodes[key] for key in held}
    found = read_back(written, held, nodes, encodings, name="kept.pte")
    paths = {layer.path for layer in found.layers}
    assert paths
    assert not paths & {path for path in KEPT_FLOAT_PATHS if path.startswith("backbone")}
