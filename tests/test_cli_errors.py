"""Bad input: a message that says what is wrong, the exit code, and nothing half-written."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_fixtures import (
    DETECTOR,
    RUN,
    call,
    contents,
    copied,
    edit_json,
    partial_files,
    place,
    spawn,
    touched,
)
from PIL import Image

from qexport.detectors.demo import demo_weights

__all__ = ["copied", "place"]

Words = tuple[str, ...]

FACTORIES = """
from torch import nn
def raises():
    raise KeyError("layer9")
def nothing():
    pass
def one_stage():
    return nn.Sequential(nn.Conv2d(3, 8, 3))
def needs(arguments):
    return None
"""


@pytest.fixture
def desk(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty current folder with a data set in `data` that may be changed."""
    shutil.copytree(place / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(*words: str, code: int = 2) -> str:
    """Run a command that has to fail; return its message, when it left nothing behind."""
    answer = call(*words)
    assert answer.code == code, answer.err
    assert "Traceback" not in answer.err
    assert not Path("mine").exists()
    assert partial_files(Path()) == []
    return answer.err


def run_with(*words: str) -> Words:
    """Return a run on the data set, with another detector."""
    return ("run", *words, "--data", "data", "--target", "onnx", "--out", "mine")


# Detector and weights


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, ("executed",))


def write_weights(kind: str, path: Path) -> None:
    if kind == "text":
        path.write_text("not weights\n")
    elif kind == "image":
        Image.new("RGB", (8, 8)).save(path, "PNG")
    elif kind == "truncated":
        data = demo_weights().read_bytes()
        path.write_bytes(data[: len(data) // 2])
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Evil()))
    elif kind == "zip pickle":
        torch.save({"model": Evil()}, path)
    else:
        state = torch.load(demo_weights(), weights_only=True)
        name = next(key for key in state if key.endswith("conv1.weight") or key.endswith("0.weight"))
        if kind == "NaN":
            state[name] = torch.full_like(state[name], torch.nan)
        elif kind == "other layers":
            state["backbone.unknown.weight"] = state.pop(name)
        torch.save(state, path)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("text", "text"),
        ("image", "PNG"),
        ("truncated", "cut short"),
        ("pickle", "weights.pt"),
        ("zip pickle", "weights.pt"),
        ("NaN", "NaN"),
        ("other layers", "backbone.unknown.weight"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(kind: str, said: str, desk: Path) -> None:
    write_weights(kind, desk / "weights.pt")
    message = refused(*run_with("--model", "demo", "--weights", "weights.pt"))
    assert said in message
    assert "weights.pt" in message
    assert not (desk / "executed").exists()


def test_weights_that_are_missing_are_named(desk: Path) -> None:
    assert "absent.pt" in refused(*run_with("--model", "demo", "--weights", "absent.pt"))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("absent.py:build", "absent.py"),
        ("model.py:absent", "absent"),
        ("model.py", "model.py:build"),
        ("model.py:raises", "layer9"),
        ("model.py:nothing", "returned None"),
        ("model.py:one_stage", "no two stages"),
        ("model.py:needs", "arguments"),
        ("torchvision:retinanet_resnet50_fpn", "one-stage"),
        ("torchvision:fasterrcnn_resnet5O_fpn", "Did you mean"),
    ],
)
def test_model_that_cannot_be_used_is_refused(model: str, said: str, desk: Path) -> None:
    (desk / "model.py").write_text(FACTORIES)
    assert said in refused(*run_with("--model", model))


def test_detector_with_other_classes_than_the_data_is_refused(desk: Path) -> None:
    for split in ("train", "val", "test"):
        edit_json(
            desk / f"data/{split}.coco.json",
            lambda coco: coco["categories"].append({"id": 9, "name": "rivet", "supercategory": ""}),
        )
    message = refused(*RUN)
    assert "rivet" in message
    assert "demo" in message


# Data set


def remove_images(data: Path) -> None:
    shutil.rmtree(data)
    data.mkdir()


def remove_annotations(data: Path) -> None:
    for path in data.glob("*.json"):
        path.unlink()


def truncate_jpeg(data: Path) -> None:
    first = data / "images/test_0000.png"
    whole = data / "images/test_0000.jpg"
    Image.open(first).save(whole, quality=95)
    whole.write_bytes(whole.read_bytes()[:-2000])

    def rename(coco: Any) -> None:
        for image in coco["images"]:
            image["file_name"] = image["file_name"].replace("test_0000.png", "test_0000.jpg")

    edit_json(data / "test.coco.json", rename)


def unknown_category(data: Path) -> None:
    edit_json(data / "test.coco.json", lambda coco: coco["annotations"][0].update(category_id=99))


def repeat_image_id(data: Path) -> None:
    edit_json(data / "test.coco.json", lambda coco: coco["images"][1].update(id=coco["images"][0]["id"]))


def remove_listed_image(data: Path) -> None:
    (data / "images/test_0002.png").unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (remove_images, "no images and no annotations"),
        (remove_annotations, "annotations"),
        (truncate_jpeg, "test_0000.jpg"),
        (unknown_category, "99"),
        (repeat_image_id, "id"),
        (remove_listed_image, "test_0002.png"),
    ],
)
def test_data_that_cannot_be_used_is_refused(spoil: Callable[[Path], None], said: str, desk: Path) -> None:
    spoil(desk / "data")
    message = refused(*RUN)
    assert said in message
    assert "data" in message


def test_data_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no such folder or file" in refused(*RUN)


def test_split_that_is_not_there_lists_those_that_are(desk: Path) -> None:
    message = refused(*RUN, "--split", "holdout")
    assert "holdout" in message
    assert "test, train, val" in message


# Options and targets


def test_keep_float_that_matches_nothing_is_refused(desk: Path) -> None:
    assert "backbone.head.*" in refused(*RUN, "--keep-float", "backbone.head.*")


def test_unknown_target_is_refused_before_any_work(desk: Path) -> None:
    message = refused(*run_with("--model", "absent.py:build"), "--target", "gameboy")
    assert "gameboy" in message
    assert "onnx" in message


HIDE = """
import importlib.machinery, os, sys
HIDDEN = set(os.environ["HIDDEN_PACKAGES"].split(","))

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)

sys.meta_path = [Finder if one is importlib.machinery.PathFinder else one for one in sys.meta_path]
"""


@pytest.mark.parametrize(
    ("hidden", "words", "install"),
    [
        ("onnxruntime", RUN, "qexport[all]"),
        ("onnxruntime", ("export", "mine", "--target", "onnx"), "qexport[all]"),
        ("torch,torchvision,torchao", ("inspect", *DETECTOR, "--out", "new"), "qexport[all]"),
        ("pycocotools", RUN, "qexport[all]"),
        ("onnxruntime", ("detect", "mine/onnx", "data/images/test_0000.png"), "qexport[onnx-runtime]"),
    ],
)
def test_missing_packages_leave_with_3_and_the_command_that_installs_them(
    hidden: str, words: Words, install: str, place: Path, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    before = touched(place)
    answer = spawn(*words, cwd=place, PYTHONPATH=str(tmp_path), HIDDEN_PACKAGES=hidden)
    assert answer.code == 3, answer.err
    assert f"pip install '{install}'" in answer.err
    assert hidden.partition(",")[0] in answer.err
    assert "Traceback" not in answer.err
    assert touched(place) == before


def test_targets_without_onnxruntime_says_what_to_install(place: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    answer = spawn("targets", cwd=place, PYTHONPATH=str(tmp_path), HIDDEN_PACKAGES="onnxruntime")
    assert answer.code == 0
    assert "no onnxruntime" in answer.out


# Output folder


def test_out_that_is_a_file_is_refused_and_kept(desk: Path) -> None:
    (desk / "taken").write_text("mine")
    answer = call("run", *DETECTOR, "--target", "onnx", "--out", "taken")
    assert answer.code == 2
    assert "is a file" in answer.err
    assert (desk / "taken").read_text() == "mine"


@pytest.mark.parametrize("out", ["taken/below", "/proc/qexport/mine"])
def test_out_that_cannot_be_written_is_refused(out: str, desk: Path) -> None:
    (desk / "taken").write_text("a file")
    answer = call("inspect", *DETECTOR, "--out", out)
    assert answer.code == 2
    assert out in answer.err
    assert "Choose another" in answer.err or "choose another" in answer.err


def test_out_that_holds_something_else_is_refused_and_kept(desk: Path) -> None:
    (desk / "holiday").mkdir()
    (desk / "holiday/photo.txt").write_text("x")
    answer = call("inspect", *DETECTOR, "--out", "holiday")
    assert answer.code == 2
    assert "photo.txt" in answer.err
    assert [path.name for path in (desk / "holiday").iterdir()] == ["photo.txt"]


def test_out_that_holds_another_run_says_what_differs_and_is_kept(copied: Path) -> None:
    before = contents(copied / "mine"), touched(copied / "mine")
    answer = call(*RUN, "--observer", "mse")
    assert answer.code == 2
    assert "observer ('min-max' there, 'mse' asked)" in answer.err
    assert (contents(copied / "mine"), touched(copied / "mine")) == before


def test_run_folder_that_is_none_is_refused(desk: Path) -> None:
    for words in (
        ("report", "data"),
        ("export", "data", "--target", "onnx"),
        ("compare", "absent", "--target", "onnx"),
    ):
        answer = call(*words)
        assert answer.code == 2
        assert "holds no run" in answer.err
    assert not (desk / "absent").exists()


def test_disk_that_is_full_is_an_error_and_leaves_whole_files_only(
    desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_file_beyond_40_kb() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    monkeypatch.setattr("cli_fixtures.BEFORE_START", no_file_beyond_40_kb)
    answer = spawn(*RUN, cwd=desk)
    assert answer.code == 2, answer.err
    assert "encodings.json: cannot be written: File too large" in answer.err
    assert "Traceback" not in answer.err
    assert partial_files(desk) == []
    assert [path.name for path in (desk / "mine/stages").iterdir()] == ["inspect.json"]
    assert not (desk / "mine/encodings.json").exists()
