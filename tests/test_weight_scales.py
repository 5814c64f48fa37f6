"""One scale for a whole weight: through the command, into every target's file, and named where runs are named."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_fixtures import call, copied, place

from qexport.encodings import PER_TENSOR, load_encodings
from qexport.errors import RunFolderError
from qexport.files import read_json
from qexport.results import ParityReport

__all__ = ["copied", "place"]


@pytest.mark.parametrize(
    ("target", "package"),
    [
        ("onnx", "onnxruntime"),
        ("tflite", "ai_edge_litert"),
        ("qnnpack", "torch"),
        ("executorch", "executorch"),
    ],
)
def test_target_takes_one_scale_for_a_weight_and_keeps_to_the_reference(
    copied: Path, target: str, package: str
) -> None:
    pytest.importorskip(package)
    assert call("calibrate", "mine", "--weight-scales", "per-tensor").code == 0
    table = load_encodings(Path("mine/encodings.json"))
    assert table.scheme == PER_TENSOR
    assert all(len(set(row.params.scale)) == 1 for row in table.rows if row.port == "weight")
    exported = call("export", "mine", "--target", target)
    assert exported.code == 0, exported.err
    compared = call("compare", "mine", "--target", target)
    assert compared.code == 0, compared.err
    parity = read_json(Path(f"mine/{target}/parity.json"), ParityReport, RunFolderError)
    assert max(row.max_step or 0 for row in parity.layers) <= 1
    assert all(gate.passed for gate in parity.gates)


def test_calibrate_per_tensor_then_per_channel_is_the_first_table_again(copied: Path) -> None:
    first = load_encodings(Path("mine/encodings.json"))
    assert call("calibrate", "mine", "--weight-scales", "per-tensor").code == 0
    assert call("calibrate", "mine", "--weight-scales", "per-channel").code == 0
    assert load_encodings(Path("mine/encodings.json")) == first


def test_weight_scales_of_no_such_name_are_refused(copied: Path) -> None:
    answer = call("calibrate", "mine", "--weight-scales", "per-row")
    assert answer.code == 2
    assert "per-tensor" in answer.err
