"""`--scheme activations`: feature maps in int8, weights in float, through calibration, reference and accuracy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_fixtures import DETECTOR, call, copied, place
from conftest import Frame

from qexport.benchmarks.report.document import ReportDocument
from qexport.calibration.calibrator import calibrate
from qexport.detectors.static import StaticDetector
from qexport.encodings import ACTIVATIONS, Encodings, load_encodings, without_weights
from qexport.errors import RunFolderError
from qexport.files import read_json
from qexport.quantization.graph import constant_of, op_name
from qexport.quantization.partial import PartlyQuantized
from qexport.quantization.quantizer import WEIGHTED
from qexport.quantization.reference import quantize
from qexport.results import AccuracyReport

__all__ = ["copied", "place"]


def test_table_has_the_feature_maps_of_int8_and_no_weights(
    small_static: StaticDetector, small_frames: list[Frame], small_encodings: Encodings
) -> None:
    table = calibrate(small_static, small_frames[:2], scheme="activations")
    assert table.scheme == ACTIVATIONS
    assert table.rows == tuple(row for row in small_encodings.rows if row.port != "weight")
    assert table == without_weights(small_encodings)


def test_reference_computes_with_the_weights_of_the_float_detector(
    small_static: StaticDetector, small_encodings: Encodings
) -> None:
    table = without_weights(small_encodings)
    quantized = quantize(small_static, table)
    assert set(quantized.quantize_nodes) == {row.key for row in table.rows}
    assert not list(quantized.weight_codes())
    floats = {node.name: node for node in quantized.float_graph.graph.nodes}
    compared = 0
    for node in quantized.graph.graph.nodes:
        if op_name(node) in WEIGHTED:
            for own, other in zip(node.args[1:3], floats[node.name].args[1:3], strict=True):
                assert torch.equal(
                    constant_of(quantized.graph, own), constant_of(quantized.float_graph, other)
                )
                compared += 1
    assert compared > 8
    assert PartlyQuantized(quantized).keys_with(())[0] == set(quantized.quantize_nodes)


def test_run_without_a_target_measures_the_reference_and_reports_it(copied: Path) -> None:
    answer = call("run", *DETECTOR, "--scheme", "activations", "--out", "maps", "--max-drop", "0.3")
    assert answer.code == 0, answer.err
    accuracy = read_json(copied / "maps/accuracy.json", AccuracyReport, RunFolderError)
    assert [one.subject for one in accuracy.subjects] == ["eager", "reference"]
    assert " reference " in answer.out
    assert load_encodings(copied / "maps/encodings.json").scheme == ACTIVATIONS
    document = read_json(copied / "maps/report.json", ReportDocument, RunFolderError)
    assert (document.verdict.state, document.missing) == ("ok", ())
    assert ACTIVATIONS in (copied / "maps/report.html").read_text()
    answer = call("run", *DETECTOR, "--scheme", "activations", "--out", "maps", "--max-drop", "0.3")
    assert answer.code == 0, answer.err


@pytest.mark.parametrize("target", ["onnx", "tflite"])
def test_target_that_is_given_is_refused_by_name_before_anything_is_written(
    copied: Path, target: str
) -> None:
    answer = call("run", *DETECTOR, "--scheme", "activations", "--target", target, "--out", "other")
    assert answer.code == 2
    assert f"target {target} cannot run --scheme activations" in " ".join(answer.err.split())
    assert not (copied / "other").exists()


def test_run_without_a_target_is_refused_where_weights_are_int8(copied: Path) -> None:
    answer = call("run", *DETECTOR, "--out", "other")
    assert answer.code == 2
    assert "--target is missing: which runtime?" in " ".join(answer.err.split())
    assert not (copied / "other").exists()


def test_stages_of_a_run_that_changes_its_scheme(copied: Path) -> None:
    answer = call("calibrate", "mine", "--scheme", "activations")
    assert answer.code == 0, answer.err
    assert "next: qexport evaluate mine" in answer.out
    for words in (("export", "mine", "--target", "onnx"), ("evaluate", "mine", "--target", "onnx")):
        refused = call(*words)
        assert refused.code == 2
        assert "target onnx cannot run --scheme activations" in " ".join(refused.err.split())
    refused = call("mend", "mine")
    assert refused.code == 2
    assert "qexport calibrate mine --scheme int8" in " ".join(refused.err.split())
    answer = call("evaluate", "mine", "--method", "activations")
    assert answer.code == 0, answer.err
    rows = [
        line.split() for line in answer.out.splitlines() if line.startswith((" reference", " activations"))
    ]
    reference, method = rows
    assert reference[1:3] == [method[3], method[5]]
    assert call("calibrate", "mine", "--scheme", "int8").code == 0
    assert call("export", "mine", "--target", "onnx").code == 0
