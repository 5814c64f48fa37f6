"""`run` and `calibrate` with a QAT checkpoint: from the file to the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_fixtures import DETECTOR, MEASURED, call
from qat_cases import write_modelopt

from qexport.detectors.demo.scenes import write_scenes
from qexport.encodings import load_encodings, origin_of
from qexport.files import sha256_file


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with scenes in `data` and a checkpoint."""
    write_scenes(tmp_path / "data", train=2, val=2, test=2)
    write_modelopt(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # tests share the machine
    return tmp_path


def test_run_from_a_qat_checkpoint_shows_where_the_scales_come_from(place: Path) -> None:
    answer = call("run", *DETECTOR, "--qat", "checkpoint.pt", "--target", "onnx", "--out", "mine", *MEASURED)
    assert answer.code == 0, answer.err
    assert "Scales of NVIDIA ModelOpt" in answer.out
    record = json.loads((place / "mine/run.json").read_bytes())
    assert record["weights_sha256"] == sha256_file(place / "checkpoint.pt")
    assert record["settings"]["qat"] == "checkpoint.pt"
    report = json.loads((place / "mine/report.json").read_bytes())
    assert report["calibration"]["origins"] == {"checkpoint": 53, "shared": 6, "calibrated": 21}
    assert report["calibration"]["calibration"]["qat"] == "NVIDIA ModelOpt"
    page = (place / "mine/report.html").read_text()
    assert "Where the scales come from" in page
    assert "backbone.body.conv1.input_quantizer._amax" in page.replace("<wbr>", "")
    again = call("run", *DETECTOR, "--qat", "checkpoint.pt", "--target", "onnx", "--out", "mine", *MEASURED)
    assert again.code == 0, again.err


def test_calibrate_with_a_qat_checkpoint_changes_weights_and_scales_of_a_run(place: Path) -> None:
    assert call("inspect", *DETECTOR, "--out", "mine").code == 0
    answer = call("calibrate", "mine", "--qat", "checkpoint.pt")
    assert answer.code == 0, answer.err
    assert "Scales of NVIDIA ModelOpt" in answer.out
    rows = load_encodings(place / "mine/encodings.json").rows
    assert sum(origin_of(row) == "checkpoint" for row in rows) == 53
    strict = call("calibrate", "mine", "--strict")
    assert strict.code == 2
    assert "--strict, and the checkpoint does not say 21 scales" in strict.err


def test_qat_options_that_nobody_would_look_at_are_refused(place: Path) -> None:
    for words in (("--strict",), ("--qat-prepare", "model.py:prepare")):
        answer = call("inspect", *DETECTOR, "--out", "mine", *words)
        assert answer.code == 2
        assert f"{words[0]} is for a QAT checkpoint" in answer.err
    assert not (place / "mine").exists()


def test_checkpoint_that_changed_since_the_run_began_is_refused(place: Path) -> None:
    assert call("inspect", *DETECTOR, "--qat", "checkpoint.pt", "--out", "mine").code == 0
    (place / "checkpoint.pt").write_bytes((place / "checkpoint.pt").read_bytes() + b" ")
    answer = call("calibrate", "mine")
    assert answer.code == 2
    assert "checkpoint.pt: the weights changed" in answer.err
