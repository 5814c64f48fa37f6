"""Commands: what they print, what they write, and the exit code."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import msgspec
import pytest
from cli_fixtures import (
    DETECTOR,
    RUN,
    STAGES,
    call,
    command,
    contents,
    copied,
    environment,
    partial_files,
    place,
    spawn,
    touched,
)

import qexport
from qexport import pipeline
from qexport.cli.options import exact_command, parse_classes, parse_frame

__all__ = ["copied", "place"]

SHARED = Path(__file__).parents[2] / "shared"
COMMANDS = (
    *("run", "demo", "inspect", "calibrate", "export", "compare"),
    *("bench", "evaluate", "report", "build", "detect", "targets", "doctor"),
)


def test_version_asked_prints_it() -> None:
    assert call("--version").out == f"qexport {qexport.__version__}\n"


def test_no_command_shows_the_help() -> None:
    assert "Usage: qexport" in call().out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_teaches_by_example(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    text = call(name, "--help").out
    assert f"qexport {name}" in text.partition("Usage")[2].partition("\n")[2]


@pytest.mark.parametrize("name", ["run", "inspect"])
def test_help_says_that_a_model_file_is_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    words = " ".join(call(name, "--help").out.replace("│", " ").split())
    assert "Your file is run, with your rights" in words


def test_unknown_command_leaves_with_2_and_suggests_one() -> None:
    answer = call("exprot")
    assert answer.code == 2
    assert "export" in answer.err


def test_run_writes_every_stage_and_prints_one_row_with_parity_beside_latency(place: Path) -> None:
    out, _, err = (place / "answer.txt").read_text().partition("\0")
    row = next(line for line in out.splitlines() if line.startswith(" onnx"))
    assert "faster than eager" in row or "slower than eager" in row
    assert "smaller" in row
    assert "ok" in row.split("smaller")[1].split()[0]
    assert str(Path("mine/report.html")) in out
    assert err == ""  # no warning, no progress where no terminal is
    assert sorted(path.stem for path in (place / "mine/stages").iterdir()) == sorted(STAGES)
    assert partial_files(place) == []


def test_run_record_holds_the_exact_command(place: Path) -> None:
    record = msgspec.json.decode((place / "mine/run.json").read_bytes())
    assert record["command"] == "qexport " + " ".join(RUN)


def test_run_given_again_runs_no_stage_and_changes_no_byte(copied: Path) -> None:
    run = copied / "mine"
    before, when = contents(run), touched(run)
    answer = call(*RUN)
    assert answer.code == 0, answer.err
    assert contents(run) == before
    rewritten = {name for name, mark in touched(run).items() if mark != when[name]}
    reports = {
        name for name in rewritten if "/" not in name and name.split(".")[0] not in ("run", "encodings")
    }
    assert rewritten == reports  # the report is written anew, of the same figures


def test_run_in_another_place_gives_the_same_bytes(place: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(place / "data")
    answer = spawn(*RUN, cwd=tmp_path)
    assert answer.code == 0, answer.err
    expected, found = contents(place / "mine"), contents(tmp_path / "mine")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def test_inspect_lists_every_layer_and_the_sums_of_stages(place: Path, tmp_path: Path) -> None:
    answer = call("inspect", "--model", "demo", "--data", place / "data", "--out", tmp_path / "mine")
    assert answer.code == 0, answer.err
    assert "backbone.body.stem.0" in answer.out or "backbone.body" in answer.out
    assert "float: " in answer.out
    assert "box_head" in answer.out
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [
        "detector.json",
        "run.json",
        "stages",
    ]


def test_stage_commands_on_a_finished_run_only_read(copied: Path) -> None:
    when = touched(copied / "mine")
    timing = ("--runs", "2", "--warmup", "1")
    for words in (
        ("calibrate", "mine"),
        ("export", "mine", "--target", "onnx"),
        ("compare", "mine", "--target", "onnx"),
        ("evaluate", "mine"),
        ("bench", "mine", "--target", "onnx", *timing),
    ):
        answer = call(*words)
        assert answer.code == 0, answer.err
        assert answer.out
    assert touched(copied / "mine") == when


def test_bench_again_measures_anew_with_the_parity_verdict_in_each_row(copied: Path) -> None:
    latency = copied / "mine/onnx/latency.json"
    before = latency.stat().st_mtime_ns
    answer = call("bench", "mine", "--target", "onnx", "--runs", "2", "--warmup", "1", "--again")
    assert answer.code == 0, answer.err
    assert latency.stat().st_mtime_ns > before
    rows = [line for line in answer.out.splitlines() if line.startswith((" artifact", " eager", " fp32"))]
    assert len(rows) == 3
    assert all("ok" in row for row in rows)


def test_calibrate_with_another_observer_changes_the_run_and_drops_what_was_measured(copied: Path) -> None:
    answer = call("calibrate", "mine", "--observer", "percentile", "--percentile", "99.9", "--images", "2")
    assert answer.code == 0, answer.err
    assert "percentile 99.9 on 2 images" in answer.out
    record = msgspec.json.decode((copied / "mine/run.json").read_bytes())
    assert record["settings"]["observer"] == "percentile"
    assert not (copied / "mine/accuracy.json").exists()
    assert not (copied / "mine/onnx/artifact.json").exists()
    answer = call("compare", "mine", "--target", "onnx")
    assert answer.code == 2
    assert "qexport export mine --target onnx" in answer.err


def test_compare_with_tolerance_0_fails_the_gate_and_names_the_layer(copied: Path) -> None:
    answer = call("compare", "mine", "--target", "onnx", "--tolerance", "0", "--parity-images", "1")
    assert answer.code == 1
    assert "layer parity: 1 step, asked at most 0 steps" in answer.err
    parity = msgspec.json.decode((copied / "mine/onnx/parity.json").read_bytes())
    culprit = next(gate["culprit"] for gate in parity["gates"] if gate["name"] == "layer parity")
    assert f"({culprit})" in answer.err
    assert culprit in {layer["path"] for layer in parity["layers"]}
    assert "Traceback" not in answer.err


def test_report_of_one_run_names_the_page(copied: Path) -> None:
    (copied / "mine/report.html").unlink()
    answer = call("report", "mine")
    assert answer.code == 0, answer.err
    assert (copied / "mine/report.html").is_file()


def test_report_of_two_runs_writes_one_table(copied: Path) -> None:
    answer = call("report", "mine", "mine", "--out", "both")
    assert answer.code == 0, answer.err
    assert (copied / "both/experiments.html").is_file()
    assert len((copied / "both/experiments.csv").read_text().splitlines()) == 3


def test_report_of_one_run_with_out_is_refused(copied: Path) -> None:
    assert call("report", "mine", "--out", "elsewhere").code == 2


def test_targets_say_what_can_be_done_here() -> None:
    row = next(line for line in call("targets").out.splitlines() if line.startswith(" onnx"))
    assert row.split()[1:4] == ["yes", "yes", "yes"]


def test_demo_draws_images_beside_the_run_and_names_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[object] = []
    # The run itself is tested above; this one would take as long.
    monkeypatch.setattr(pipeline, "start", lambda _path, settings, **_: seen.append(settings) or exit_early())

    def exit_early() -> None:
        raise KeyboardInterrupt

    answer = call("demo", "--out", "runs/demo", "--scenes", "2")
    assert answer.code == 130
    assert "goes on where it stopped" in answer.err
    assert sorted(path.name for path in Path("runs/demo-data").iterdir()) == [
        "images",
        "test.coco.json",
        "train.coco.json",
        "val.coco.json",
    ]
    assert str(Path("runs/demo-data")) in str(seen[0])


@pytest.mark.slow
def test_demo_succeeds_and_names_the_report(tmp_path: Path) -> None:
    answer = spawn("demo", "--out", "runs/demo", "--min-accounted", "0.01", cwd=tmp_path)
    assert answer.code == 0, answer.err
    assert answer.out.splitlines()[-1].endswith(str(Path("runs/demo/report.html")))


def test_fault_of_qexport_shows_the_traceback_and_leaves_with_70(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr("qexport.cli.reporting.tables.target_table", broken)
    answer = call("targets")
    assert answer.code == 70
    assert "ZeroDivisionError: a fault" in answer.err
    assert "Please report it" in answer.err


def test_interrupt_that_an_import_turns_into_another_error_is_still_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def importing(*_: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:  # as NumPy's C API does it
            raise ImportError("numpy.core.multiarray failed to import") from error

    monkeypatch.setattr("qexport.cli.reporting.tables.target_table", importing)
    answer = call("targets")
    assert answer.code == 130
    assert "Traceback" not in answer.err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_reader_of_a_pipe_leaving_early_is_not_an_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as stream:
        done = subprocess.run(
            command("targets"),
            stdout=stream,
            stderr=subprocess.PIPE,
            env=environment(),
            timeout=60,
            check=False,
        )
    assert done.returncode == 141
    assert done.stderr == b""


def test_completion_is_offered_to_the_shell() -> None:
    answer = spawn(cwd=Path.cwd(), _QEXPORT_COMPLETE="complete_bash", COMP_WORDS="qexport ca", COMP_CWORD="1")
    assert "calibrate" in answer.out


def test_exact_command_is_quoted_for_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/qexport", "run", "--keep-float", "a b*"])
    assert exact_command() == "qexport run --keep-float 'a b*'"


def test_frame_and_classes_given_as_text_are_parsed() -> None:
    assert parse_frame("480x640") == (480, 640)
    assert parse_classes("bolt, nut,washer") == ("bolt", "nut", "washer")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--frame", "480"), "HEIGHTxWIDTH"),
        (("--frame", "0x640"), "HEIGHTxWIDTH"),
        (("--classes", "bolt,,nut"), "empty name"),
        (("--percentile", "99.9"), "--observer percentile"),
        (("--observer", "mean"), "min-max"),
        (("--images", "0"), "--images"),
    ],
)
def test_option_that_makes_no_sense_is_refused_by_name(
    options: tuple[str, str], said: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(place)
    answer = call("inspect", *DETECTOR, "--out", tmp_path / "mine", *options)
    assert answer.code == 2
    assert said in answer.err
    assert not (tmp_path / "mine").exists()


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="no data set and trained detector beside the repository")
def test_run_on_blood_cells_keeps_every_gate(tmp_path: Path) -> None:
    model = SHARED / "models/bccd_resnet18_fpn"
    answer = spawn(
        *("run", "--model", f"{model / 'model.py'}:build", "--weights", model / "weights_fp16.pt"),
        *("--data", SHARED / "data/bccd", "--target", "onnx", "--out", "cells", "--runs", "10"),
        cwd=tmp_path,
        timeout=590,
    )
    assert answer.code == 0, answer.err
