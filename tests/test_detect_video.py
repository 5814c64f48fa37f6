"""`qexport detect` on a video and a camera: lines as they come, frames drawn, and what goes wrong in the middle."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_fixtures import Answer, call, command, environment, place, spawn
from PIL import Image
from video_files import write_video

from qexport import detecting
from qexport.capture import Video, read_video
from qexport.errors import DatasetError
from qexport.sources import Picture

__all__ = ["place"]

SCENE = "data/images/test_0000.png"
CAMERA = "/dev/video77"


@pytest.fixture
def desk(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a current folder with an artifact, a scene, and 6 frames of that scene as a lossless video."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "artifact").symlink_to(place / "mine/onnx")
    (tmp_path / "scene.png").write_bytes((place / SCENE).read_bytes())
    with Image.open("scene.png") as scene:
        pixels = np.asarray(scene.convert("RGB"))
    frames = [pixels, pixels[::-1].copy()] * 3
    write_video(
        tmp_path / "clip.mkv",
        count=6,
        codec="ffv1",
        pixel_format="bgr0",
        size_px=pixels.shape[:2],
        frames=frames,
    )
    return tmp_path


@pytest.fixture(scope="session")
def fake_camera(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a library that answers for /dev/video77 as a driver does."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("the camera that is none needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("camera") / "fake_camera.so"
    source = Path(__file__).with_name("fake_camera.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return str(library)


def lines_in(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_every_frame_of_a_video_is_found_in_as_its_image_is(desk: Path) -> None:
    assert call("detect", "artifact", "scene.png", "--json", "scene.json").code == 0
    (scene,) = json.loads(Path("scene.json").read_text())
    answer = call("detect", "artifact", "clip.mkv", "--json", "-")
    assert answer.code == 0, answer.err
    lines = lines_in(answer.out)  # nothing but lines of JSON
    assert [(line["image"], line["frame"]) for line in lines] == [("clip.mkv", number) for number in range(6)]
    assert [line["time_s"] for line in lines] == pytest.approx(
        [0.1 * number for number in range(6)], abs=1e-3
    )
    assert scene["boxes"]
    assert "frame" not in scene
    for number, line in enumerate(lines):
        assert (line["boxes"] == scene["boxes"]) == (number % 2 == 0)  # the others stand on their head


def test_frames_are_drawn_as_asked_and_lines_written(desk: Path) -> None:
    answer = call("detect", "artifact", "clip.mkv", "--out", "drawn", "--every", "2", "--json", "boxes.jsonl")
    assert answer.code == 0, answer.err
    assert sorted(path.name for path in Path("drawn/clip").iterdir()) == [
        "000000.jpg",
        "000002.jpg",
        "000004.jpg",
    ]
    assert len(lines_in(Path("boxes.jsonl").read_text())) == 6
    assert "clip.mkv, frame 5: " in answer.out
    with Image.open("drawn/clip/000002.jpg") as drawn, Image.open("scene.png") as scene:
        assert drawn.size == scene.size


@pytest.mark.parametrize(("option", "value", "count"), [("--frames", "2", 2), ("--seconds", "0.35", 4)])
def test_limit_ends_a_video_early(option: str, value: str, count: int, desk: Path) -> None:
    answer = call("detect", "artifact", "clip.mkv", option, value, "--json", "-")
    assert answer.code == 0, answer.err
    assert len(lines_in(answer.out)) == count


def test_frame_of_another_size_is_letterboxed_and_its_boxes_are_in_its_own_pixels(desk: Path) -> None:
    write_video(desk / "small.mov", count=1, size_px=(48, 64))
    answer = call("detect", "artifact", "small.mov", "--json", "-", "--score", "0")
    assert answer.code == 0, answer.err
    (line,) = lines_in(answer.out)
    assert (line["height_px"], line["width_px"]) == (48, 64)
    assert all(0 <= x <= 64 and 0 <= y <= 48 for box in line["boxes"] for x, y in [box["xyxy"][2:]])


def test_video_cut_off_keeps_the_lines_of_its_frames(desk: Path) -> None:
    data = write_video(desk / "long.mkv", count=20, codec="mjpeg").read_bytes()
    (desk / "cut.mkv").write_bytes(data[: len(data) // 2])
    answer = call("detect", "artifact", "cut.mkv", "--json", "boxes.jsonl")
    assert answer.code == 2
    assert "cut.mkv: " in answer.err
    assert "frame" in answer.err
    lines = lines_in(Path("boxes.jsonl").read_text())
    assert [line["frame"] for line in lines] == list(range(len(lines)))
    assert 5 <= len(lines) <= 12


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("camera:77",), 3, "no such camera"),
        (("camera:77", "scene.png"), 2, "Give it alone"),
        (("clip.mkv", "--json", "boxes.json"), 2, "ends in .jsonl"),
        (("scene.png", "--every", "2"), 2, "--every is about a video"),
        (("scene.png", "--frames", "2"), 2, "--frames is about a video"),
        (("scene.png", "--seconds", "2"), 2, "--seconds is about a video"),
        (("clip.mkv", "other/clip.mkv", "--out", "drawn"), 2, "both be drawn"),
        (("clip.mkv", "--out", "taken"), 2, "taken/clip is a file"),
        (("absent.mp4",), 2, "absent.mp4: no such image, folder or video"),
        (("text.mp4",), 2, "not readable at its beginning"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(
    words: tuple[str, ...], code: int, said: str, desk: Path
) -> None:
    for folder in ("other", "taken"):
        (desk / folder).mkdir()
    (desk / "other/clip.mkv").write_bytes((desk / "clip.mkv").read_bytes())
    (desk / "taken/clip").touch()
    (desk / "text.mp4").write_text("no video")
    before = sorted(desk.rglob("*"))
    answer = call("detect", "artifact", *words)
    assert answer.code == code
    assert said in answer.err
    assert sorted(desk.rglob("*")) == before


def look(desk: Path, library: str, frames: int, *words: str) -> Answer:
    return spawn(
        "detect",
        "artifact",
        CAMERA,
        *words,
        cwd=desk,
        LD_PRELOAD=library,
        FAKE_FRAMES=str(frames),
        timeout=60,
    )


def test_camera_gives_frames_of_its_own_size_until_the_limit(desk: Path, fake_camera: str) -> None:
    answer = look(desk, fake_camera, 10_000, "--json", "-", "--frames", "3", "--out", "drawn")
    assert answer.code == 0, answer.err
    lines = lines_in(answer.out)
    assert len(lines) == 3
    assert {(line["height_px"], line["width_px"]) for line in lines} == {(96, 128)}
    numbers = [line["frame"] for line in lines]
    assert numbers == sorted(set(numbers))
    assert not {number % 7 for number in numbers} & {2}  # those came damaged
    assert sorted(path.name for path in (desk / "drawn/video77").iterdir()) == [
        f"{number:06d}.jpg" for number in numbers
    ]


def test_camera_unplugged_in_the_middle_loses_nothing_that_was_found(desk: Path, fake_camera: str) -> None:
    answer = look(desk, fake_camera, 20, "--json", "boxes.jsonl")
    assert answer.code == 3, answer.err
    lines = lines_in((desk / "boxes.jsonl").read_text())
    assert lines
    assert f"no more frames after frame {lines[-1]['frame']}: No such device" in answer.err
    assert lines[-1]["frame"] == 19


def test_interrupted_camera_is_let_go_and_its_lines_are_whole(desk: Path, fake_camera: str) -> None:
    process = subprocess.Popen(
        command("detect", "artifact", CAMERA, "--json", "-"),
        cwd=desk,
        env=environment(LD_PRELOAD=fake_camera, FAKE_FRAMES="10000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    first = process.stdout.readline()  # there while the camera runs
    process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert time.monotonic() - asked < 10
    assert "stopped after" in err
    assert "Traceback" not in err
    assert lines_in(first + out)[0]["image"] == CAMERA


def test_frame_of_another_size_is_refused_where_the_bundle_says_so(desk: Path) -> None:
    path = write_video(desk / "small.mov", count=1, size_px=(48, 64))
    with detecting.opened(Path("artifact")) as ready, closing(read_video(Video(path))) as frames:
        frame = next(frames)
        picture = Picture("small.mov", frame.pixels, frame=frame.number)
        with pytest.raises(DatasetError, match=r"small\.mov, frame 0: 48x64 pixels"):
            detecting.detect(ready.runner, picture, image_fit="refuse")
