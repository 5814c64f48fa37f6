"""docs/accuracy.md: its commands bring a detector back that collapsed, in the order in which they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from cli_fixtures import MEASURED, Answer, call
from torch import nn

from qexport.detectors.demo import demo_weights
from qexport.detectors.demo.model import build
from qexport.detectors.demo.scenes import write_scenes
from qexport.diagnosis_results import Diagnosis
from qexport.errors import RunFolderError
from qexport.files import read_json
from qexport.mend_results import MendReport
from qexport.results import AccuracyReport
from qexport.sensitivity_results import SensitivityReport

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "accuracy.md"
HURT = "backbone.body.layer2.0"
SHORTER = {
    "run": MEASURED,
    "sensitivity": ("--below-noise",),  # four images tell no half point from noise
    "mend": ("--images", "2"),
    "qat": ("--epochs", "1", "--images", "4", "--calibration-images", "4"),
}
"""What is added to the page's commands, so that they take seconds."""


def commands() -> list[list[str]]:
    """Return the commands of the section that leads through a collapse, as words."""
    section = GUIDE.read_text("utf-8").partition("## Five commands\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^    qexport ((?:.*\\\n)*.*)$", section, re.MULTILINE)
    return [shlex.split(line.replace("\\\n", " ")) for line in lines]


def follow(words: list[str]) -> Answer:
    return call(*words, *SHORTER.get(words[0], ()))


def drops(run: str) -> dict[str, float]:
    """Return by how much each subject's VOC mAP falls."""
    report = read_json(Path(run) / "accuracy.json", AccuracyReport, RunFolderError)
    base = report.subjects[0].voc_map50
    return {subject.subject: base - subject.voc_map50 for subject in report.subjects}


@pytest.fixture
def collapsing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the files that the page begins with, for a detector whose int8 form is no use; go to their folder.

    It is the demo, with one channel 500 times as wide and its reader 500 times as narrow: the same in float.
    """
    monkeypatch.chdir(tmp_path)
    detector: nn.Module = build()
    detector.load_state_dict(torch.load(demo_weights(), weights_only=True))
    state = detector.state_dict()
    for name in ("bn1.weight", "bn1.bias"):
        state[f"{HURT}.{name}"][0] *= 500
    state[f"{HURT}.conv2.weight"][:, 0] /= 500
    torch.save(state, "weights.pt")
    Path("model.py").write_text("from qexport.detectors.demo.model import build as build\n")
    write_scenes(Path("dataset"), train=8, val=4, test=8)
    return tmp_path


def test_every_command_of_the_guide_stands_there_with_options_that_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = commands()
    assert [words[0] for words in found[:4]] == ["run", "sensitivity", "mend", "run"]
    for words in found:
        answer = follow(words)
        assert answer.code == 2, words
        assert "No such option" not in answer.err, words
        assert re.search(r"dataset|model\.py|runs/\w+", answer.err), words  # which are not here


@pytest.mark.slow  # it exports four times and trains once
@pytest.mark.timeout(1800)
def test_commands_of_the_guide_bring_a_collapsed_detector_back(collapsing: Path) -> None:
    run, sensitivity, mend, mended, *rest = commands()

    answer = follow(run)
    assert answer.code == 1
    culprit = read_json(Path("runs/mine/diagnosis.json"), Diagnosis, RunFolderError)
    assert culprit.suspects[0].path.startswith(HURT)
    assert culprit.sentence in answer.err
    assert drops("runs/mine")["onnx"] > 0.5

    assert follow(sensitivity).code == 0
    noise = read_json(Path("runs/mine/sensitivity.json"), SensitivityReport, RunFolderError)
    assert max(noise.stages, key=lambda stage: stage.share).name == "trunk"
    assert HURT.startswith(max(noise.units, key=lambda unit: unit.share).name)

    assert follow(mend).code == 0
    gains = read_json(Path("runs/mine/mended/mended.json"), MendReport, RunFolderError).results
    assert gains[-1].sqnr_db > gains[0].sqnr_db + 10

    answer = follow(mended)
    assert answer.code == 0, answer.err
    assert max(drops("runs/mended").values()) < 0.02

    for words in rest:
        answer = follow(words)
        assert answer.code == 0, (words, answer.err)
    assert max(drops("runs/mended").values()) < 0.02
    assert Path("runs/trained/qat.pt").is_file()


def test_guide_names_files_that_are_there() -> None:
    text = GUIDE.read_text("utf-8")
    named = set(re.findall(r"(?:qexport|tests|docs|tools)/[\w/.]+\.(?:py|md)", text))
    named |= {f"docs/{name}" for name in re.findall(r"\]\(([\w-]+\.md)", text)}
    assert "tools/train_hard_case.py" in named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
