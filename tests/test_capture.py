"""Videos and cameras, frame by frame, as PyAV reads them. Needs no camera: FFmpeg's test picture stands for one."""

from __future__ import annotations

import builtins
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from video_files import SIZE_PX, frame_of, write_video

from qexport.capture import Camera, CapturedFrame, Video, find_capture, list_cameras, read_camera, read_video
from qexport.errors import DatasetError, TargetUnavailable

PATTERN = "testsrc=size=64x48:rate=20:duration={seconds},realtime"


def camera_for(seconds: float) -> Camera:
    """Return 20 frames a second of FFmpeg's own, in real time, that end as an unplugged camera's do."""
    return Camera(PATTERN.format(seconds=seconds), "camera:0", driver="lavfi")


def reader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "qexport-camera"]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("camera:0", Camera("/dev/video0", "camera:0")),
        ("camera:12", Camera("/dev/video12", "camera:12")),
        ("camera:/dev/v4l/by-id/one", Camera("/dev/v4l/by-id/one", "camera:/dev/v4l/by-id/one")),
        ("/dev/video2", Camera("/dev/video2", "/dev/video2")),
        ("a/clip.MP4", Video(Path("a/clip.MP4"))),
        ("clip.mkv", Video(Path("clip.mkv"))),
        ("scene.png", None),
        ("photos", None),
    ],
)
def test_given_name_means_a_video_a_camera_or_neither(given: str, found: Video | Camera | None) -> None:
    assert find_capture(Path(given)) == found


def test_folder_named_like_a_video_is_none(tmp_path: Path) -> None:
    (tmp_path / "photos.mp4").mkdir()
    assert find_capture(tmp_path / "photos.mp4") is None


@pytest.mark.parametrize("name", ["clip.mp4", "clip.avi", "clip.mkv", "clip.mov"])
def test_video_of_any_kind_is_read_frame_by_frame(name: str, tmp_path: Path) -> None:
    frames = list(read_video(Video(write_video(tmp_path / name, count=12))))
    assert [frame.number for frame in frames] == list(range(12))
    assert [frame.time_s for frame in frames] == pytest.approx(
        [0.1 * number for number in range(12)], abs=1e-3
    )
    for frame in frames:
        assert frame.pixels.dtype == np.uint8
        assert frame.pixels.shape == (*SIZE_PX, 3)
        assert frame.pixels.flags.c_contiguous
        assert off_by(frame.pixels, frame_of(frame.number)) < 12  # what JPEG and YUV lose


def off_by(actual: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
    return float(np.abs(actual.astype(float) - reference).mean())


def test_lossless_video_gives_the_pixels_that_went_in(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mkv", count=3, codec="ffv1", pixel_format="bgr0")
    for frame in read_video(Video(path)):
        assert np.array_equal(frame.pixels, frame_of(frame.number))


@pytest.mark.parametrize(("degrees", "quarters"), [(-90, -1), (90, 1), (180, 2)])
def test_video_filmed_sideways_is_turned_upright(degrees: int, quarters: int, tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mov", count=1, rotation=degrees)
    (frame,) = read_video(Video(path))
    assert off_by(frame.pixels, np.rot90(frame_of(0), quarters)) < 12


def test_frames_come_while_the_video_is_read_and_closing_stops(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", count=5)
    with closing(read_video(Video(path))) as frames:
        assert next(frames).number == 0
    with pytest.raises(StopIteration):
        next(frames)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi", "clip.mov"])
def test_video_cut_off_gives_its_frames_and_an_error_that_names_the_next(name: str, tmp_path: Path) -> None:
    whole = write_video(tmp_path / name, count=40).read_bytes()
    cut = tmp_path / f"cut-{name}"
    cut.write_bytes(whole[: int(len(whole) * 0.6)])
    seen: list[int] = []
    with pytest.raises(DatasetError, match=r"cut-clip.*frame \d+") as error:
        exhaust(read_video(Video(cut)), seen)
    assert 3 < len(seen) < 38
    named = [int(word.strip(":,")) for word in str(error.value).split() if word.strip(":,").isdigit()]
    assert named[0] in (len(seen), len(seen) - 1)


def exhaust(frames: Iterator[CapturedFrame], seen: list[int]) -> None:
    """Note each number as its frame comes: the error after the last one must not take them along."""
    for frame in frames:
        seen.append(frame.number)  # noqa: PERF401 - so that what came before an error is kept


def test_video_damaged_in_the_middle_is_refused_at_the_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mov", count=20)
    data = bytearray(path.read_bytes())
    # The picture of a frame in the middle, from its first bytes on.
    starts = [place for place in range(len(data)) if data[place : place + 3] == b"\xff\xd8\xff"]
    data[starts[9] : starts[9] + 600] = bytes(600)
    path.write_bytes(data)
    seen: list[int] = []
    with pytest.raises(DatasetError, match="frame 9"):
        exhaust(read_video(Video(path)), seen)
    assert seen == list(range(9))


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"", "not readable at its beginning"), (b"no video" * 99, "not readable at its beginning")],
)
def test_file_that_is_no_video_is_refused(data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(data)
    with pytest.raises(DatasetError, match=said):
        next(read_video(Video(tmp_path / "clip.mp4")))


def test_sound_without_pictures_is_refused(tmp_path: Path) -> None:
    import av  # noqa: PLC0415

    with av.open(str(tmp_path / "clip.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(DatasetError, match="holds no picture"):
        next(read_video(Video(tmp_path / "clip.mkv")))


_OUT_OF_MEMORY = """
import resource, sys
from pathlib import Path
import av, numpy
from qexport.capture import Video, read_video
from qexport.errors import DatasetError
list(read_video(Video(Path(sys.argv[2]))))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), resource.RLIM_INFINITY))
try:
    next(read_video(Video(Path(sys.argv[1]))))
except DatasetError as error:
    print(error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_frame_larger_than_the_memory_is_an_error_that_says_so(tmp_path: Path) -> None:
    large = write_video(tmp_path / "large.avi", count=1, size_px=(4800, 6400))
    small = write_video(tmp_path / "small.avi", count=1)
    done = subprocess.run(
        [sys.executable, "-c", _OUT_OF_MEMORY, str(large), str(small)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "large.avi: frame 0: memory is out" in done.stdout


def test_camera_that_is_slow_to_be_read_gives_its_newest_frame() -> None:
    with closing(read_camera(camera_for(30), SIZE_PX)) as frames:
        first = next(frames)
        time.sleep(0.6)
        second = next(frames)
        third = next(frames)
    assert first.pixels.shape == (*SIZE_PX, 3)
    # 12 frames were taken meanwhile; one that is half a second old is of no use.
    assert second.number - first.number >= 8
    assert second.time_s - first.time_s >= 0.4
    assert third.number > second.number


def test_camera_is_let_go_when_its_reader_is_closed() -> None:
    with closing(read_camera(camera_for(30), SIZE_PX)) as frames:
        next(frames)
        assert reader_threads()
    assert not reader_threads()


def test_camera_unplugged_in_the_middle_gives_its_frames_and_then_an_error() -> None:
    seen: list[int] = []
    with pytest.raises(TargetUnavailable, match=r"camera:0: no more frames after frame \d+") as error:
        exhaust(read_camera(camera_for(0.5), SIZE_PX), seen)
    assert error.value.exit_code == 3
    assert f"after frame {seen[-1]}" in str(error.value)
    assert seen == sorted(set(seen))
    assert seen[-1] == 9  # the last one is not lost
    assert not reader_threads()


def test_camera_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qexport.capture._PATIENCE_S", 0.2)
    slow = Camera("testsrc=size=64x48:rate=0.2,realtime=limit=10", "camera:0", driver="lavfi")
    seen: list[int] = []
    with pytest.raises(TargetUnavailable, match="no frame came in time"):
        exhaust(read_camera(slow, SIZE_PX), seen)
    assert len(seen) <= 2


@pytest.mark.skipif(Path("/dev/video77").exists(), reason="this machine has a camera 77")
def test_absent_camera_says_what_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("video10", "video2", "videoless"):
        (tmp_path / name).touch()
    (tmp_path / "names/video2").mkdir(parents=True)
    (tmp_path / "names/video2/name").write_text("HD Webcam\n")
    monkeypatch.setattr("qexport.capture._DEVICES", tmp_path)
    monkeypatch.setattr("qexport.capture._DEVICE_NAMES", tmp_path / "names")
    assert list_cameras() == [f"{tmp_path}/video2 (HD Webcam)", f"{tmp_path}/video10"]
    with pytest.raises(TargetUnavailable, match="no such camera") as error:
        next(read_camera(Camera("/dev/video77", "camera:77"), SIZE_PX))
    assert "camera:77 (/dev/video77)" in str(error.value)
    assert "video2 (HD Webcam)" in str(error.value)


def test_device_that_is_no_camera_is_refused() -> None:
    with pytest.raises(TargetUnavailable, match="/dev/null: no camera that can be read"):
        next(read_camera(Camera("/dev/null", "/dev/null"), SIZE_PX))


def test_missing_library_names_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write_video(tmp_path / "clip.mp4", count=1)
    real = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name == "av":
            raise ModuleNotFoundError("No module named 'av'", name="av")
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    for frames in (read_video(Video(path)), read_camera(camera_for(1), SIZE_PX)):
        with pytest.raises(TargetUnavailable, match=r"pip install 'qexport\[video\]'"):
            next(frames)
