"""`qexport detect`: boxes in pixels of the image, drawn and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cli_fixtures import call, place
from numpy.typing import NDArray
from PIL import Image

from qexport.drawing import draw_boxes

__all__ = ["place"]

SCENE = "data/images/test_0000.png"


@pytest.fixture
def desk(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty current folder with links to an artifact and a scene."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "artifact").symlink_to(place / "mine/onnx")
    (tmp_path / "scene.png").write_bytes((place / SCENE).read_bytes())
    return tmp_path


def boxes_in(path: Path) -> list[dict[str, object]]:
    found = json.loads(path.read_text())
    assert len(found) == 1
    return list(found[0]["boxes"])


def test_detect_prints_and_writes_the_same_boxes(desk: Path) -> None:
    answer = call("detect", "artifact", "scene.png", "--json", "boxes.json")
    assert answer.code == 0, answer.err
    boxes = boxes_in(desk / "boxes.json")
    assert boxes
    assert f"scene.png: {len(boxes)} boxes" in answer.out
    for box in boxes:
        assert f"{box['label']} {box['score']:.3f}" in answer.out


def test_detect_agrees_with_the_evaluation_of_the_run(place: Path, desk: Path) -> None:
    assert call("detect", "artifact", "scene.png", "--json", "boxes.json", "--score", "0").code == 0
    recorded = json.loads((place / "mine/detections/onnx.json").read_text())["subjects"]["onnx"][0]
    assert recorded["image"] == "images/test_0000.png"
    assert [box["xyxy"] for box in boxes_in(desk / "boxes.json")] == recorded["boxes"]
    assert [box["score"] for box in boxes_in(desk / "boxes.json")] == recorded["scores"]


def test_boxes_of_a_larger_image_are_in_its_own_pixels(desk: Path) -> None:
    with Image.open("scene.png") as scene:
        scene.resize((scene.width * 2, scene.height * 2), Image.Resampling.NEAREST).save("large.png")
    call("detect", "artifact", "scene.png", "--json", "scene.json", "--score", "0.05")
    assert call("detect", "artifact", "large.png", "--json", "large.json", "--score", "0.8").code == 0
    small, large = corners(desk / "scene.json"), corners(desk / "large.json") / 2
    # The image is smoothed on the way to the frame, so boxes move a little.
    nearest = np.abs(large[:, None] - small[None]).max(2).min(1)
    assert len(large) > 0
    assert nearest.max() < 5


def corners(path: Path) -> NDArray[np.float64]:
    return np.array([box["xyxy"] for box in boxes_in(path)], np.float64).reshape(-1, 4)


def test_score_is_the_lowest_that_is_shown(desk: Path) -> None:
    call("detect", "artifact", "scene.png", "--json", "all.json", "--score", "0")
    call("detect", "artifact", "scene.png", "--json", "best.json", "--score", "0.9")
    everything, best = boxes_in(desk / "all.json"), boxes_in(desk / "best.json")
    assert best == [box for box in everything if float(str(box["score"])) >= 0.9]
    assert len(best) < len(everything)


def test_folder_is_searched_and_drawn_under_the_same_names(desk: Path) -> None:
    (desk / "photos/line 2").mkdir(parents=True)
    for name in ("photos/a.png", "photos/line 2/a.png", "photos/.hidden.png"):
        (desk / name).write_bytes((desk / "scene.png").read_bytes())
    with Image.open("scene.png") as scene:
        scene.save("photos/b.jpg")
        scene.save("photos/c.bmp")
    answer = call("detect", "artifact", "photos", "--out", "drawn", "--json", "boxes.jsonl")
    assert answer.code == 0, answer.err
    drawn = sorted(
        path.relative_to("drawn").as_posix() for path in Path("drawn").rglob("*") if path.is_file()
    )
    assert drawn == ["a.png", "b.jpg", "c.png", "line 2/a.png"]
    lines = [json.loads(line) for line in Path("boxes.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == [
        str(Path("photos") / name) for name in ("a.png", "b.jpg", "c.bmp", "line 2/a.png")
    ]
    with Image.open("drawn/a.png") as after, Image.open("scene.png") as before:
        assert after.size == before.size
        assert np.any(np.asarray(after.convert("RGB")) != np.asarray(before.convert("RGB")))


def test_drawing_never_replaces_an_image_that_was_given(desk: Path) -> None:
    before = (desk / "scene.png").read_bytes()
    answer = call("detect", "artifact", "scene.png", "--out", ".")
    assert answer.code == 2
    assert "choose another --out" in answer.err
    assert (desk / "scene.png").read_bytes() == before


def test_two_images_of_one_name_are_refused_before_anything_is_drawn(desk: Path) -> None:
    (desk / "other").mkdir()
    (desk / "other/scene.png").write_bytes((desk / "scene.png").read_bytes())
    answer = call("detect", "artifact", "scene.png", "other/scene.png", "--out", "drawn")
    assert answer.code == 2
    assert "both be drawn" in answer.err
    assert not Path("drawn").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("artifact", "absent.png"), "absent.png: no such image"),
        (("artifact", "empty"), "no image in this folder"),
        (("artifact", "text.png"), "text.png: not a readable image"),
        (("absent", "scene.png"), "no artifact.json there"),
        (("empty", "scene.png"), "no artifact.json there"),
        (("artifact", "scene.png", "--out", "text.png"), "is a file"),
        (("artifact", "scene.png", "--json", "text.png/boxes.json"), "cannot be written"),
    ],
)
def test_detect_on_what_cannot_be_used_is_refused(words: tuple[str, ...], said: str, desk: Path) -> None:
    (desk / "empty").mkdir()
    (desk / "text.png").write_text("no image")
    answer = call("detect", *words)
    assert answer.code == 2
    assert said in answer.err
    assert sorted(path.name for path in desk.iterdir()) == ["artifact", "empty", "scene.png", "text.png"]


def test_folder_of_a_run_names_its_artifacts(place: Path, desk: Path) -> None:
    answer = call("detect", place / "mine", "scene.png")
    assert answer.code == 2
    assert str(place / "mine/onnx") in answer.err


def test_drawn_box_frames_its_place_and_leaves_the_rest() -> None:
    pixels = np.zeros((120, 160, 3), np.uint8)
    drawn = np.asarray(draw_boxes(pixels, [(40.0, 50.0, 100.0, 100.0)], [1], ["nut 0.98"]))
    assert tuple(drawn[75, 40]) == (0xFF, 0xD2, 0x3F)
    assert not drawn[60:90, 50:90].any()  # inside
    assert not drawn[105:, :].any()
    assert not pixels.any()


@pytest.mark.parametrize(
    "box", [(-20.0, -10.0, 400.0, 300.0), (150.0, 110.0, 150.0, 110.0), (0.0, 0.0, 3.0, 3.0)]
)
def test_drawn_box_beyond_the_image_or_without_size_succeeds(box: tuple[float, float, float, float]) -> None:
    drawn = draw_boxes(np.zeros((120, 160, 3), np.uint8), [box], [7], ["bolt 1.00"])
    assert drawn.size == (160, 120)
    assert np.asarray(drawn).any()
