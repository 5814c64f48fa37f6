"""A run that is interrupted goes on, and comes to the same bytes as one that was not."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from cli_fixtures import RUN, STAGES, contents, partial_files, place, spawn, stop_after

__all__ = ["place"]

INTO_THE_STAGE_S = 0.3
"""After the record of the stage before: the next one is at work."""


def assert_completes_like(place: Path, folder: Path) -> None:
    answer = spawn(*RUN, cwd=folder)
    assert answer.code == 0, answer.err
    expected, found = contents(place / "mine"), contents(folder / "mine")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert partial_files(folder) == []


def stages_done(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "mine/stages").glob("*.json")}


def test_run_interrupted_then_killed_completes_like_one_that_was_not(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "data", tmp_path / "data")
    answer = stop_after("inspect", signal.SIGINT, *RUN, cwd=tmp_path, delay_s=INTO_THE_STAGE_S)
    assert answer.code == 130, answer.err
    assert "The same command goes on where it stopped" in answer.err
    assert "Traceback" not in answer.err
    assert stages_done(tmp_path) == {"inspect"}
    assert partial_files(tmp_path) == []
    answer = stop_after("calibrate", signal.SIGKILL, *RUN, cwd=tmp_path, delay_s=INTO_THE_STAGE_S)
    assert answer.code == -signal.SIGKILL
    assert stages_done(tmp_path) == {"inspect", "calibrate"}
    assert_completes_like(place, tmp_path)


def test_run_whose_record_is_cut_off_starts_again(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "mine"
    (run / "stages/evaluate.json").unlink()  # as if killed between the stage's last file and its record
    (run / ".accuracy.json.x1y2.part").write_text("{")
    (run / "onnx/.detector.int8.onnx.x1y2.part").write_bytes(b"half")
    assert_completes_like(place, tmp_path)


def test_folder_of_a_run_killed_at_its_first_file_is_taken(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "data", tmp_path / "data")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/.run.json.x1y2.part").write_text("{")
    answer = spawn("inspect", "--model", "demo", "--data", "data", "--out", "mine", cwd=tmp_path)
    assert answer.code == 0, answer.err
    assert partial_files(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_run_stopped_in_every_stage_completes_like_one_that_was_not(
    kind: signal.Signals, place: Path, tmp_path: Path
) -> None:
    shutil.copytree(place / "data", tmp_path / "data")
    for stage in STAGES:
        answer = stop_after(stage, kind, *RUN, cwd=tmp_path, delay_s=0.02)
        assert answer.code in (130, -signal.SIGKILL, 0), answer.err
        assert stage in stages_done(tmp_path)
    assert_completes_like(place, tmp_path)
