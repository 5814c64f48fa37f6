"""Stages, their records, and what a run's folder allows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from cli_fixtures import copied, place

from qexport import pipeline
from qexport.errors import ArtifactError, QexportError, RunFolderError
from qexport.files import write_json
from qexport.results import Gate
from qexport.run_folder import RunFolder, create_run, open_run
from qexport.settings import RunRecord, Settings

__all__ = ["copied", "place"]

RECORD = RunRecord(
    settings=Settings(model="demo", data="data"),
    weights_sha256="1" * 64,
    dataset_name="data",
    dataset_sha256="2" * 64,
    qexport_version="0",
    versions={},
    command="qexport run",
)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return create_run(tmp_path / "run", RECORD)


def counted(run: RunFolder, calls: list[str]) -> Callable[[], None]:
    def write() -> None:
        calls.append("ran")
        write_json(run.file("out.json"), len(calls))

    return write


def test_stage_given_again_with_equal_inputs_does_not_run(run: RunFolder) -> None:
    calls: list[str] = []
    for _ in range(2):
        run.stage("count", {"a": 1}, ["out.json"], counted(run, calls))
    assert calls == ["ran"]


@pytest.mark.parametrize("change", ["inputs", "output lost", "forgotten", "versions"])
def test_stage_runs_again_where_something_changed(change: str, run: RunFolder) -> None:
    calls: list[str] = []
    run.stage("count", {"a": 1}, ["out.json"], counted(run, calls))
    if change == "output lost":
        run.file("out.json").unlink()
    elif change == "forgotten":
        run.forget("count")
    elif change == "versions":
        run = RunFolder(run.path, msgspec.structs.replace(RECORD, versions={"torch": "9"}))
    assert run.stage("count", {"a": 2 if change == "inputs" else 1}, ["out.json"], counted(run, calls))
    assert len(calls) == 2


def test_stage_whose_output_was_edited_is_refused_and_the_edit_kept(run: RunFolder) -> None:
    calls: list[str] = []
    run.stage("count", {}, ["out.json"], counted(run, calls))
    run.file("out.json").write_text("mine")
    with pytest.raises(RunFolderError, match=r"out\.json was changed after stage count"):
        run.stage("count", {}, ["out.json"], counted(run, calls))
    assert run.file("out.json").read_text() == "mine"


def test_stage_that_fails_leaves_no_record(run: RunFolder) -> None:
    def fail() -> None:
        raise QexportError("no")

    with pytest.raises(QexportError):
        run.stage("count", {}, ["out.json"], fail)
    assert not run.file("stages/count.json").exists()


def test_discard_removes_outputs_and_records_but_not_those_of_calibration(run: RunFolder) -> None:
    for name in ("inspect", "calibrate", "export.onnx", "evaluate"):
        file = run.file(f"{name}.json")
        run.stage(name, {}, [file.name], lambda file=file: write_json(file, 1))  # type: ignore[misc]
    run.discard("evaluate")
    assert not run.file("evaluate.json").exists()
    assert run.file("export.onnx.json").exists()
    run.discard()
    assert sorted(path.name for path in run.path.glob("*.json")) == [
        "calibrate.json",
        "inspect.json",
        "run.json",
    ]
    assert sorted(path.name for path in run.file("stages").iterdir()) == ["calibrate.json", "inspect.json"]


def test_create_run_with_other_data_says_so(run: RunFolder) -> None:
    with pytest.raises(RunFolderError, match="images or annotations changed"):
        create_run(run.path, msgspec.structs.replace(RECORD, dataset_sha256="3" * 64))


def test_open_run_removes_what_a_killed_process_left(run: RunFolder) -> None:
    left = run.file(".encodings.json.abc.part")
    left.write_text("{")
    open_run(run.path)
    assert not left.exists()


def test_require_names_the_command_that_writes_the_file(run: RunFolder) -> None:
    with pytest.raises(RunFolderError, match="run `qexport calibrate x` first"):
        run.require("encodings.json", "qexport calibrate x")


def test_resume_reads_what_the_run_holds(copied: Path) -> None:
    work = pipeline.resume(Path("mine"))
    assert pipeline.exported_targets(work.path) == ["onnx"]
    assert work.artifact("onnx")[0].encodings_sha256
    assert pipeline.compare(work, "onnx").target == "onnx"


def test_artifact_of_other_encodings_is_refused(copied: Path) -> None:
    manifest = Path("mine/onnx/artifact.json")
    value = msgspec.json.decode(manifest.read_bytes())
    write_json(manifest, {**value, "encodings_sha256": "0" * 64})
    with pytest.raises(ArtifactError, match="made of other encodings"):
        pipeline.resume(Path("mine")).artifact("onnx")


def test_resume_with_settings_that_cannot_be_used_keeps_the_old_ones(copied: Path) -> None:
    before = Path("mine/run.json").read_bytes()
    settings = msgspec.structs.replace(open_run(Path("mine")).settings, keep_float=("no.such.layer",))
    with pytest.raises(QexportError, match=r"no\.such\.layer"):
        pipeline.resume(Path("mine"), settings=settings)
    assert Path("mine/run.json").read_bytes() == before


def test_resume_with_other_settings_notes_both_commands(copied: Path) -> None:
    settings = msgspec.structs.replace(open_run(Path("mine")).settings, max_drop=0.5)
    pipeline.resume(Path("mine"), settings=settings, command="qexport evaluate mine --max-drop 0.5")
    assert open_run(Path("mine")).record.command.endswith(" && qexport evaluate mine --max-drop 0.5")


def test_report_without_the_data_set_is_written(copied: Path) -> None:
    Path("data").rename("moved")
    assert "was not at hand" in pipeline.report(Path("mine")).html.read_text()


def test_outcome_failed_holds_the_gates_that_did_not_pass(copied: Path) -> None:
    gates = tuple(Gate(name=name, passed=name == "a", measured="", limit="") for name in ("a", "b"))
    outcome = pipeline.Outcome(gates, pipeline.report(Path("mine")))
    assert [gate.name for gate in outcome.failed] == ["b"]
