"""Files of a run, its weights or its images that were changed from outside: refused, never overwritten."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from cli_fixtures import DETECTOR, RUN, call, copied, edit_json, place, touched

from qexport.detectors.demo import demo_weights
from qexport.encodings import EncodingRow, FloatRow, digest_of_rows

__all__ = ["copied", "place"]

Words = tuple[str, ...]


def other_detector(table: Any) -> None:
    table["detector_sha256"] = "0" * 64


def remove_row(table: Any) -> None:
    del table["rows"][3]


def remove_row_and_sign(table: Any) -> None:
    del table["rows"][3]
    rows = [msgspec.convert(row, EncodingRow) for row in table["rows"]]
    floats = [FloatRow(**row) for row in table["float_rows"]]
    table["rows_sha256"] = digest_of_rows(tuple(rows), tuple(floats))


def double_scale(table: Any) -> None:
    table["rows"][0]["params"]["scale"][0] *= 2


def zero_scale(table: Any) -> None:
    table["rows"][0]["params"]["scale"][0] = 0.0


def nan_scale(table: Any) -> None:
    table["rows"][0]["params"]["scale"][0] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (other_detector, "another detector"),
        (remove_row, "edited"),
        (remove_row_and_sign, "no row for"),
        (double_scale, "edited"),
        (zero_scale, "scale 0.0"),
        (nan_scale, "JSON"),
    ],
)
def test_edited_encodings_are_refused_and_nothing_else_changes(
    spoil: Callable[[Any], None], said: str, copied: Path
) -> None:
    edit_json(copied / "mine/encodings.json", spoil)
    before = touched(copied / "mine")
    answer = call("export", "mine", "--target", "onnx")
    assert answer.code == 2, answer.err
    assert said in answer.err
    after = touched(copied / "mine")
    assert after == {name: before[name] for name in after}
    assert before.keys() - after.keys() <= {"stages/export.onnx.json"}  # a stage that began is not complete


def test_run_on_edited_encodings_does_not_overwrite_them(copied: Path) -> None:
    edit_json(copied / "mine/encodings.json", double_scale)
    before = touched(copied / "mine")
    answer = call(*RUN)
    assert answer.code == 2
    assert "encodings.json was changed after stage calibrate wrote it" in answer.err
    assert touched(copied / "mine") == before


@pytest.mark.parametrize(
    "words",
    [
        ("compare", "mine", "--target", "onnx"),
        ("evaluate", "mine"),
        ("detect", "mine/onnx", "data/images/test_0000.png"),
    ],
)
def test_artifact_edited_after_export_is_refused(words: Words, copied: Path) -> None:
    with (copied / "mine/onnx/detector.int8.onnx").open("ab") as stream:
        stream.write(b"\0")
    answer = call(*words)
    assert answer.code == 2
    assert "detector.int8.onnx: changed after export" in answer.err


def test_weights_changed_since_the_run_began_are_noticed(copied: Path) -> None:
    shutil.copy(demo_weights(), "weights.pt")
    assert call("inspect", *DETECTOR, "--weights", "weights.pt", "--out", "other").code == 0
    state = torch.load("weights.pt", weights_only=True)
    name = next(iter(state))
    state[name] = state[name] * 2
    torch.save(state, "weights.pt")
    answer = call("calibrate", "other")
    assert answer.code == 2
    assert "weights changed" in answer.err
    answer = call("inspect", *DETECTOR, "--weights", "weights.pt", "--out", "other")
    assert answer.code == 2
    assert "the file changed" in answer.err


def test_images_changed_since_the_run_began_are_noticed(copied: Path) -> None:
    shutil.copy("data/images/test_0001.png", "data/images/test_0000.png")
    answer = call("compare", "mine", "--target", "onnx")
    assert answer.code == 2
    assert "images or annotations changed" in answer.err


def test_run_record_of_another_version_is_refused(copied: Path) -> None:
    edit_json(copied / "mine/run.json", lambda record: record.update(colour="red"))
    answer = call("report", "mine")
    assert answer.code == 2
    assert "colour" in answer.err
