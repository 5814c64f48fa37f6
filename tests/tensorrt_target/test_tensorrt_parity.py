"""Parity of the TensorRT network with the reference: at most one step, and what is off has a name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import onnx
import pytest
from conftest import Frame
from numpy.typing import NDArray
from tensorrt_models import (
    change_constant,
    edited_manifest,
    edited_model,
    maker_of,
    needs_builder,
    node_named,
)

from qexport.benchmarks.parity import compare
from qexport.emulation.tensorrt import EvaluatedRunner
from qexport.errors import ArtifactError
from qexport.quantization.inspection import inspect_layers
from qexport.results import ParityReport
from qexport.runtimes.runner import OUTPUTS

if TYPE_CHECKING:
    from qexport.artifact import Artifact
    from qexport.detectors.static import StaticDetector
    from qexport.layers import Layer
    from qexport.quantization.reference import QuantizedDetector

pytestmark = needs_builder
VICTIM = "backbone.body.layer2.0.conv1"


@pytest.fixture(scope="module")
def layers(demo_static: StaticDetector) -> tuple[Layer, ...]:
    return inspect_layers(demo_static)


@pytest.fixture(scope="module")
def report(
    demo_quantized: QuantizedDetector,
    tensorrt_export: tuple[Artifact, Path],
    layers: tuple[Layer, ...],
    demo_frames: list[Frame],
) -> ParityReport:
    with EvaluatedRunner(tensorrt_export[1]) as runner:
        return compare(demo_quantized, runner, layers, demo_frames, split="test")


def over_tolerance(report: ParityReport) -> list[str]:
    return [row.path for row in report.layers if row.status == "over_tolerance"]


def test_compare_network_that_was_built_every_layer_within_a_step(
    report: ParityReport, layers: tuple[Layer, ...]
) -> None:
    assert [gate.name for gate in report.gates if not gate.passed] == []
    assert report.rung == "built"
    assert report.target == "tensorrt"
    compared = [row for row in report.layers if row.values]
    assert len(compared) >= 40
    assert all(row.max_step is not None and row.max_step <= 1 for row in compared)
    assert {row.status for row in report.layers} == {"ok", "float", "unquantized"}
    assert [(row.path, row.call) for row in report.layers] == [(one.path, one.call) for one in layers]
    for recall in report.recalls:
        assert 0.7 * recall.boxes <= recall.matched <= recall.boxes


def test_compare_declared_rows_are_shown_with_their_reason_and_not_counted(
    report: ParityReport, tensorrt_export: tuple[Artifact, Path], layers: tuple[Layer, ...]
) -> None:
    declared = {row.key for row in tensorrt_export[0].unquantized}
    rows = {
        f"{row.path}@{row.call}/output:conv2d": row for row in report.layers if row.status == "unquantized"
    }
    assert rows.keys() == declared
    assert all("inside the convolution's kernel" in row.reason for row in rows.values())
    assert not any(row.failed for row in rows.values())
    gate = report.gates[1]
    quantized = sum(layer.quantized for layer in layers)
    image = 1
    assert (gate.name, gate.measured) == (
        "unmatched layers",
        f"0 of {quantized + image - len(declared)}",
    )


def test_compare_row_that_is_declared_no_more_is_unmatched_and_fails(
    demo_quantized: QuantizedDetector,
    tensorrt_export: tuple[Artifact, Path],
    layers: tuple[Layer, ...],
    demo_frames: list[Frame],
    tmp_path: Path,
) -> None:
    copy = shutil.copytree(tensorrt_export[1], tmp_path / "copy", ignore=shutil.ignore_patterns("engines"))
    dropped, *kept = tensorrt_export[0].unquantized
    edited_manifest(copy, lambda made: msgspec.structs.replace(made, unquantized=tuple(kept)))
    with EvaluatedRunner(copy) as runner:
        found = compare(demo_quantized, runner, layers, demo_frames[:1], split="test")
    unmatched = [row for row in found.layers if row.status == "unmatched"]
    assert [f"{row.path}@{row.call}/output:conv2d" for row in unmatched] == [dropped.key]
    gate = next(gate for gate in found.gates if gate.name == "unmatched layers")
    assert (gate.passed, gate.culprit) == (False, unmatched[0].path)


def test_compare_sabotaged_weight_is_named(
    demo_quantized: QuantizedDetector,
    tensorrt_export: tuple[Artifact, Path],
    layers: tuple[Layer, ...],
    demo_frames: list[Frame],
    tmp_path: Path,
) -> None:
    def negate_a_channel(model: onnx.ModelProto) -> None:
        weights = maker_of(model, maker_of(model, node_named(model, f"{VICTIM}/Conv").input[1]).input[0])
        assert weights.op_type == "QuantizeLinear"

        change_constant(model, weights.input[0], negated)

    found = compared_after(
        negate_a_channel, demo_quantized, tensorrt_export[1], layers, demo_frames, tmp_path
    )
    assert over_tolerance(found) == [VICTIM]
    assert (found.gates[0].passed, found.gates[0].culprit) == (False, VICTIM)


def test_compare_sabotaged_scale_is_named_first(
    demo_quantized: QuantizedDetector,
    tensorrt_export: tuple[Artifact, Path],
    layers: tuple[Layer, ...],
    demo_frames: list[Frame],
    tmp_path: Path,
) -> None:
    def enlarge(model: onnx.ModelProto) -> None:
        quantizer = maker_of(model, f"{VICTIM}/output:conv2d")
        change_constant(model, quantizer.input[1], lambda scale: scale * 1.25)

    found = compared_after(enlarge, demo_quantized, tensorrt_export[1], layers, demo_frames, tmp_path)
    # Who reads the tensor sees other real values than the encodings say, and is off with it.
    wrong = over_tolerance(found)
    assert wrong[0] == found.gates[0].culprit == VICTIM
    assert len(wrong) <= 3
    assert not found.gates[0].passed


def negated(values: NDArray[Any]) -> NDArray[Any]:
    values[3] = -values[3]
    return values


def compared_after(
    change: Callable[[onnx.ModelProto], None],
    quantized: QuantizedDetector,
    folder: Path,
    layers: tuple[Layer, ...],
    frames: list[Frame],
    tmp_path: Path,
) -> ParityReport:
    with EvaluatedRunner(edited_model(folder, tmp_path / "edited", change)) as runner:
        return compare(quantized, runner, layers, frames[:1], split="test")


def test_evaluated_runner_gives_inner_tensors_and_the_same_outputs_with_them(
    tensorrt_export: tuple[Artifact, Path], demo_frames: list[Frame]
) -> None:
    artifact, folder = tensorrt_export
    site = next(site for site in artifact.sites if site.key.startswith(VICTIM))
    with EvaluatedRunner(folder) as runner:
        plain, probed = runner.run(demo_frames[0]), runner.run(demo_frames[0], [site.tensor])
        assert probed[site.tensor].shape == site.shape
        assert probed[site.tensor].dtype.name == "int8"
        assert all((plain[name] == probed[name]).all() for name in OUTPUTS)
        with pytest.raises(ArtifactError, match="no tensor 'nowhere'"):
            runner.run(demo_frames[0], ["nowhere"])
