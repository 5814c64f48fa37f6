"""`qexport qat`: trained, killed, diverged, and given what it cannot train on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_fixtures import Answer, call, command, environment, partial_files

from qexport.benchmarks.report import build_report
from qexport.detectors.demo.scenes import write_scenes
from qexport.detectors.fingerprint import fingerprint
from qexport.detectors.load import load_detector
from qexport.detectors.static import make_static
from qexport.encodings import Encodings, load_encodings
from qexport.errors import TargetUnavailable
from qexport.fine_tuning import FineTuning
from qexport.quantization.reference import quantize
from qexport.settings import Settings
from qexport.training.settings import TrainingSettings

SHORT = ("--model", "demo", "--data", "data", "--calibration-images", "2", "--val-images", "2")
QAT = ("qat", *SHORT, "--epochs", "2", "--images", "8", "--distill", "--lr", "0.0005", "--out", "mine")
WRITTEN = ("checkpoint.pt", "history.json", "history.png", "qat.pt", "settings.json", "start.json")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with scenes in `data` and a finished training in `mine`; not to be changed."""
    folder = tmp_path_factory.mktemp("training")
    write_scenes(folder / "data", train=12, val=3, test=2)
    answer = in_folder(folder, *QAT)
    assert answer.code == 0, answer.err
    (folder / "answer.txt").write_text(answer.out)
    return folder


@pytest.fixture
def data(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the scenes, without a training, in the current folder."""
    shutil.copytree(made / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


def in_folder(folder: Path, *words: str) -> Answer:
    before = Path.cwd()
    os.chdir(folder)
    try:
        torch.set_num_threads(1)
        return call(*words)
    finally:
        os.chdir(before)


def without_boxes(folder: Path, split: str) -> None:
    for file in folder.rglob("*.json"):
        if split in file.name:
            content = json.loads(file.read_text())
            content["annotations"] = []
            file.write_text(json.dumps(content))


def test_run_from_a_training_reports_its_history(made: Path, tmp_path: Path) -> None:
    words = ("--qat", str(made / "mine" / "qat.pt"), "--model", "demo", "--data", str(made / "data"))
    run = tmp_path / "run"
    answer = call("inspect", *words, "--out", str(run))
    assert answer.code == 0, answer.err
    assert call("calibrate", str(run)).code == 0
    history = json.loads((made / "mine" / "history.json").read_text())
    assert json.loads((run / "training.json").read_text()) == history
    page = build_report(run, dataset_root=None).html.read_text()
    section = page[page.index('id="origin"') : page.index('id="calibration"')]
    assert "Losses, mean of an epoch" in section
    assert f"{sum(history['epochs'][1]['losses'].values()):.4f}" in section
    assert f"{100 * history['epochs'][2]['measured']['coco_map']:.1f}" in section
    assert call("calibrate", str(run), "--seed", "1").code == 0
    assert (run / "training.json").is_file()


def test_qat_finished_says_what_it_found_and_what_comes_next(made: Path) -> None:
    said = (made / "answer.txt").read_text()
    assert "float:      COCO mAP" in said
    assert "calibrated: COCO mAP" in said
    assert "epoch 2:" in said
    assert "training and export: 0 of 3311980 int8 values differ" in said
    assert "next: qexport run --qat mine/qat.pt --model demo --data data --frame 240x320" in said
    assert sorted(path.name for path in (made / "mine").iterdir()) == sorted(WRITTEN)
    history = json.loads((made / "mine" / "history.json").read_text())
    assert history["status"] == "complete"
    assert [record["epoch"] for record in history["epochs"]] == [0, 1, 2]
    assert set(history["epochs"][1]["losses"]) == {
        "objectness", "rpn box", "class", "box",
        "features from float", "proposals from float", "boxes from float",
    }  # fmt: skip


def test_qat_result_loads_strictly_and_its_encodings_are_of_it(made: Path) -> None:
    kept = torch.load(made / "mine" / "qat.pt", weights_only=True)
    assert kept["format"] == "qexport qat 1"
    assert kept["notes"]["frame"] == "240x320"
    detector = load_detector("demo", None).module
    detector.load_state_dict(kept["state"], strict=True)
    table = made / "encodings.json"
    table.write_text(kept["encodings"])
    encodings: Encodings = load_encodings(table)
    static = make_static(detector, frame_px=(240, 320))
    assert encodings.detector_sha256 == fingerprint(static)
    assert quantize(static, encodings).quantize_nodes
    begun = load_encodings(made / "mine" / "start.json")
    assert [row.key for row in encodings.rows] == [row.key for row in begun.rows]
    assert load_detector("demo", made / "mine" / "qat.pt").weights_sha256


def test_qat_given_again_changes_nothing(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "data", tmp_path / "data")
    shutil.copytree(made / "mine", tmp_path / "mine")
    assert in_folder(tmp_path, *QAT).code == 0
    for name in WRITTEN:
        assert (tmp_path / "mine" / name).read_bytes() == (made / "mine" / name).read_bytes(), name


def _exists(name: str) -> Callable[[Path], bool]:
    return lambda folder: (folder / name).is_file()


def _epochs(number: int) -> Callable[[Path], bool]:
    def reached(folder: Path) -> bool:
        file = folder / "history.json"
        return file.is_file() and len(json.loads(file.read_text())["epochs"]) > number

    return reached


@pytest.mark.parametrize(
    ("moment", "delay_s"),
    [
        pytest.param(_exists("start.json"), 0.5, marks=pytest.mark.slow, id="before the first epoch"),
        pytest.param(_epochs(0), 1.0, id="in the first epoch"),
        pytest.param(_epochs(1), 0.0, marks=pytest.mark.slow, id="after the first epoch"),
    ],
)
def test_qat_killed_goes_on_to_the_same_bytes(
    made: Path, data: Path, moment: Callable[[Path], bool], delay_s: float
) -> None:
    mine = data.parent / "mine"
    process = subprocess.Popen(
        command(*QAT), cwd=data.parent, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    until = time.monotonic() + 240
    while not moment(mine) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not (mine / "qat.pt").exists()
    assert in_folder(data.parent, *QAT).code == 0
    for name in ("qat.pt", "history.json", "start.json"):
        assert (mine / name).read_bytes() == (made / "mine" / name).read_bytes(), name
    assert partial_files(mine) == []


def test_qat_of_images_alone_distils(data: Path) -> None:
    pictures = data.parent / "pictures"
    pictures.mkdir()
    for file in sorted(data.rglob("*.png"))[:8] or sorted(data.rglob("*.jpg"))[:8]:
        shutil.copy(file, pictures / file.name)
    words = ("qat", "--model", "demo", "--data", "pictures", "--calibration-images", "2", "--epochs", "1")
    answer = call(*words, "--distill-only", "--lr", "0.0001", "--out", "mine")
    assert answer.code == 0, answer.err
    assert "float:      distance to float 0.00000" in answer.out
    history = json.loads(Path("mine/history.json").read_text())
    distances = [record["measured"]["distance"] for record in history["epochs"]]
    assert len(distances) == 2
    assert 0 < distances[0] < 1


def test_qat_with_a_learning_rate_too_high_stops_and_keeps_the_best(data: Path) -> None:
    answer = call("qat", *SHORT, "--epochs", "3", "--images", "4", "--lr", "1000", "--out", "mine")
    assert answer.code == 1
    assert "training diverged" in answer.err
    assert "best epoch, number 0" in answer.err
    assert "smaller --lr (it was 1000)" in answer.err
    history = json.loads(Path("mine/history.json").read_text())
    assert history["status"] == "diverged"
    assert len(history["epochs"]) <= 2
    begun = json.loads(Path("mine/start.json").read_text())["rows"]
    kept = json.loads(torch.load("mine/qat.pt", weights_only=True)["encodings"])["rows"]
    assert [row["params"] for row in kept] == [row["params"] for row in begun]
    again = call("qat", *SHORT, "--epochs", "3", "--images", "4", "--lr", "1000", "--out", "mine")
    assert (again.code, again.err) == (1, answer.err)


def test_qat_that_gets_no_better_stops_early(data: Path) -> None:
    words = ("--epochs", "9", "--images", "4", "--lr", "1e-9", "--freeze-observers-after", "0")
    answer = call("qat", *SHORT, *words, "--patience", "1", "--out", "mine")
    assert answer.code == 0, answer.err
    assert "stopped early: 1 epochs brought nothing better; kept: epoch 0" in answer.out
    assert "Training brought nothing over the calibrated detector" in answer.out


def test_qat_without_boxes_names_distillation(data: Path) -> None:
    without_boxes(data, "train")
    answer = call("qat", *SHORT, "--out", "mine")
    assert answer.code == 2
    assert "no annotated boxes in its 12 images" in answer.err
    assert "--distill-only" in answer.err
    assert not Path("mine").exists()


def test_qat_with_too_few_images_says_how_many(data: Path) -> None:
    answer = call("qat", *SHORT, "--batch", "16", "--out", "mine")
    assert answer.code == 2
    assert "12 images to train on; expected at least 16" in answer.err
    assert not Path("mine").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--val-split", "test"), "'test' is for the figure at the end"),
        (("--train-split", "test"), "'test' is for the figure at the end"),
        (("--val-split", "train"), "cannot be trained on and validated on"),
        (("--val-split", "none"), "no split 'none'"),
        (("--freeze", "backbone.bdy"), "--freeze backbone.bdy: no layer"),
        (("--freeze", "backbone", "--freeze", "rpn", "--freeze", "roi_heads"), "leaves no layer"),
        (("--distill-features", "2"), "weights of --distill"),
        (("--distill", "--distill-features", "0", "--distill-outputs", "0"), "nothing to distill"),
    ],
)
def test_qat_with_options_that_do_not_fit_is_refused(data: Path, words: tuple[str, ...], said: str) -> None:
    answer = call("qat", *SHORT, *words, "--out", "mine")
    assert answer.code == 2
    assert said in answer.err


@pytest.mark.parametrize(("words", "said"), [(("--lr", "0.01"), "learning_rate"), (("--seed", "1"), "seed")])
def test_qat_into_another_training_names_what_differs(
    made: Path, data: Path, words: tuple[str, ...], said: str
) -> None:
    shutil.copytree(made / "mine", "mine")
    answer = call(*QAT, *words)
    assert answer.code == 2
    assert f"mine holds another training; it differs in {said}" in answer.err


def test_qat_with_changed_images_is_refused(made: Path, data: Path) -> None:
    shutil.copytree(made / "mine", "mine")
    file = next(path for path in data.rglob("*.json") if "train" in path.name)
    content = json.loads(file.read_text())
    content["annotations"].pop()
    file.write_text(json.dumps(content))
    answer = call(*QAT)
    assert answer.code == 2
    assert "mine holds another training; it differs in images_sha256" in answer.err


def test_qat_into_a_folder_of_something_else_is_refused(data: Path) -> None:
    answer = call("qat", *SHORT, "--out", "data")
    assert answer.code == 2
    assert "holds something that is not a training of qexport" in answer.err
    Path("file").write_text("")
    assert "is a file" in call("qat", *SHORT, "--out", "file").err


def test_qat_with_a_damaged_checkpoint_names_the_file(made: Path, data: Path) -> None:
    shutil.copytree(made / "mine", "mine")
    file = Path("mine/checkpoint.pt")
    file.write_bytes(file.read_bytes()[:1000])
    answer = call(*QAT)
    assert answer.code == 2
    assert "mine/checkpoint.pt: damaged or cut short" in answer.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_qat_on_a_device_that_is_missing_leaves_with_3(data: Path) -> None:
    answer = call("qat", *SHORT, "--device", "cuda", "--out", "mine")
    assert answer.code == TargetUnavailable.exit_code == 3
    assert "sees no CUDA device here" in answer.err
    assert not Path("mine").exists()


def test_images_held_out_are_not_trained_on(data: Path) -> None:
    for file in data.rglob("*val*.json"):
        file.unlink()
    training = TrainingSettings(held_out=0.25)
    tuning = FineTuning(Settings(model="demo", data=str(data)), training)
    held = {sample.path for sample in tuning.data.validation.samples}
    trained = {sample.path for sample in tuning.data.samples}
    assert (len(held), len(trained)) == (3, 9)
    assert not held & trained
    assert all("train" in path.name for path in held | trained)
    again = FineTuning(Settings(model="demo", data=str(data)), training)
    assert again.data.sha256 == tuning.data.sha256
