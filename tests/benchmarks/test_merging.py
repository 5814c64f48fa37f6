"""What a board measured, merged into the run that it is of: beside the parity verdict, and nowhere else.

The layers are those that NVIDIA's builder made of the run's own artifact; the times are invented.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_fixtures import call, edit_json, touched
from test_trtexec_builder import STEP_MS, write_files

from qexport.artifact import load_artifact
from qexport.runtimes.tensorrt_builder import EngineBuilder
from qexport.runtimes.tensorrt_layers import EngineLayer
from qexport.runtimes.tensorrt_library import load_library
from qexport.target_options import BuildOptions

BOARD = "nvidia-jetson-orin-nano-developer-kit"
NAMES = ("layers.json", "profile.json", "board.json", "times.json")


@pytest.fixture(scope="module")
def layers(tensorrt_run: Path) -> tuple[EngineLayer, ...]:
    builder = EngineBuilder(load_library())
    builder.parse(tensorrt_run / "mine/tensorrt/detector.int8.onnx")
    return builder.build(BuildOptions()).layers


@pytest.fixture
def desk(
    tensorrt_run: Path, layers: tuple[EngineLayer, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Return the current folder: a copy of the finished run in `mine`, a board's files in `results`."""
    shutil.copytree(tensorrt_run, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.engine"))
    (tmp_path / "results").mkdir()
    sha256 = load_artifact(tmp_path / "mine/tensorrt")[0].file("int8").sha256
    write_files(tmp_path / "results", layers, sha256)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def results(*names: str) -> list[str]:
    return [f"results/{name}" for name in names or NAMES]


def refused(*files: str) -> str:
    """Merge what cannot be merged; return the message, when nothing was changed."""
    when = touched(Path("mine"))
    answer = call("report", "mine", "--merge", *files)
    assert answer.code == 2, answer.err + answer.out
    assert "Traceback" not in answer.err
    assert touched(Path("mine")) == when
    return " ".join(answer.err.split())


def test_merged_measurement_stands_in_the_report_beside_the_parity_verdict(desk: Path) -> None:
    answer = call("report", "mine", "--merge", *results())
    assert answer.code == 0, answer.err
    merged = desk / f"mine/tensorrt/measurements/{BOARD}.json"
    assert str(merged.relative_to(desk)) in answer.out
    page = (desk / "mine/report.html").read_text()
    section = page[page.index('id="t0-latency"') :]
    assert "NVIDIA Jetson Orin Nano Developer Kit" in section
    assert "device" in section
    assert "parity ok" in page
    (target,) = json.loads((desk / "mine/timings.json").read_bytes())["targets"]
    assert target["parity"]["state"] == "ok"
    (measurement,) = target["measurements"]
    assert measurement["machine"]["measured_on"] == "device"
    assert target["latency"] is None
    assert json.loads((desk / "mine/report.json").read_bytes())["missing"] == []


def test_merged_measurement_has_every_weighted_layer_under_its_module_path(desk: Path) -> None:
    call("report", "mine", "--merge", *results())
    with (desk / "mine/latency.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {(row["measured_on"], row["machine"]) for row in rows} == {
        ("device", "NVIDIA Jetson Orin Nano Developer Kit")
    }
    assert {row["parity"] for row in rows} == {"parity ok"}
    paths = {row["path"] for row in rows}
    artifact, _ = load_artifact(desk / "mine/tensorrt")
    assert {layer.path for layer in artifact.layers if layer.op in ("conv2d", "linear")} <= paths
    spent = {row["path"]: float(row["artifact_ms"]) for row in rows}
    assert spent["backbone.body.layer1.0.conv1"] >= STEP_MS


def test_measurement_merged_again_takes_the_place_of_the_first(desk: Path) -> None:
    call("report", "mine", "--merge", *results())
    before = (desk / f"mine/tensorrt/measurements/{BOARD}.json").read_bytes()
    answer = call("report", "mine", "--merge", *reversed(results()))
    assert answer.code == 0, answer.err
    assert [path.name for path in (desk / "mine/tensorrt/measurements").iterdir()] == [f"{BOARD}.json"]
    assert (desk / f"mine/tensorrt/measurements/{BOARD}.json").read_bytes() == before


def cut_in_half(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("name", NAMES)
def test_file_that_was_cut_off_is_named(name: str, desk: Path) -> None:
    cut_in_half(desk / "results" / name)
    assert f"results/{name}" in refused(*results())


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (results(*NAMES[:3]), "times"),
        ([*results(), "results/times.json"], "both times files"),
        (results(*NAMES[1:], "absent.json"), "absent.json"),
        ([*results(*NAMES[1:]), "mine/report.json"], "mine/report.json: not a file that can be merged"),
        (
            ["results"],
            "results: is a folder. Give the files of one measurement that lie in it: qexport report mine --merge",
        ),
    ],
    ids=["one missing", "one twice", "one not there", "one of another kind", "a folder"],
)
def test_files_that_are_not_those_of_one_measurement_are_refused(
    files: list[str], said: str, desk: Path
) -> None:
    assert said in refused(*files)


def other_onnx(board: dict[str, dict[str, str]]) -> None:
    board["engine"]["onnx_sha256"] = "0" * 64


def other_precision(board: dict[str, dict[str, str]]) -> None:
    board["engine"]["precision"] = "fp16"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_onnx, "the engine was built from a file of SHA-256 000000000000..."),
        (other_precision, "the fp16 engine was measured"),
    ],
    ids=["of another artifact", "of another precision"],
)
def test_measurement_of_another_engine_is_refused(
    change: Callable[[dict[str, dict[str, str]]], None], said: str, desk: Path
) -> None:
    edit_json(desk / "results/board.json", change)
    assert said in refused(*results())


def test_layers_of_another_detector_are_refused(desk: Path) -> None:
    for name in ("layers.json", "profile.json"):
        path = desk / "results" / name
        path.write_text(path.read_text().replace("backbone.body.layer3", "backbone.body.block3"))
    edit_json(desk / "results/board.json", lambda board: board.update(engine=None))
    assert "backbone.body.block3" in refused(*results())


def test_measurement_of_an_artifact_that_was_exported_anew_is_named_and_not_shown(desk: Path) -> None:
    call("report", "mine", "--merge", *results())
    edit_json(
        desk / f"mine/tensorrt/measurements/{BOARD}.json",
        lambda profile: profile.update(artifact_sha256="0" * 64),
    )
    answer = call("report", "mine")
    assert answer.code == 0, answer.err
    missing = json.loads((desk / "mine/report.json").read_bytes())["missing"]
    assert any(f"({BOARD}.json)" in one["why"] and "of another artifact" in one["why"] for one in missing)
    assert json.loads((desk / "mine/timings.json").read_bytes())["targets"][0]["measurements"] == []


def test_measurement_merged_into_a_run_without_tensorrt_names_the_export(desk: Path) -> None:
    (desk / "mine/tensorrt/artifact.json").unlink()
    assert "Run `qexport export mine --target tensorrt` first" in refused(*results())


def test_measurement_merged_into_what_is_no_run_is_refused(desk: Path) -> None:
    answer = call("report", "data", "--merge", *results())
    assert answer.code == 2
    assert "holds no run" in answer.err
