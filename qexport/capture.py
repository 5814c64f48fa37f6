"""Frames of a video file, or of a camera through V4L2, one at a time. PyAV (FFmpeg) is imported here alone.

**A video** is read to its end, every frame. What cannot be decoded, or ends before the length that its header states,
is an error that names the frame: the frames before it were handed out.

**A camera** is faster than most detectors. Its driver queues up to 32 frames, so that a detector of one frame a second
would look half a minute back. Here a thread empties the queue and keeps the newest frame alone; the others are
skipped, which the numbers of the frames show.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from qexport.errors import DatasetError, TargetUnavailable

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

VIDEO_SUFFIXES = frozenset(
    ".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .ts .mts .m2ts .3gp .wmv .flv".split()  # noqa: SIM905 - one line
)

_INSTALL = "pip install 'qexport[video]'"
_DEVICES = Path("/dev")
_DEVICE_NAMES = Path("/sys/class/video4linux")
_PATIENCE_S = 10.0
"""A camera that gives nothing for so long is taken for dead; setting the exposure takes one or two."""
_DAMAGED_IN_A_ROW = 30
"""Cameras on USB lose a part of a picture now and then, and of the first one often."""
_LONGEST_GAP_S = 0.5
"""A video may end so much before its header says: tracks differ a little in length."""


@dataclass(frozen=True, slots=True)
class Video:
    """A video file."""

    file: Path


@dataclass(frozen=True, slots=True)
class Camera:
    """A camera.

    device: as FFmpeg's input takes it, `/dev/video0`.
    name: as it was given.
    driver: the input of FFmpeg that reads it.
    """

    device: str
    name: str
    driver: str = "v4l2"


@dataclass(frozen=True, slots=True, eq=False)
class CapturedFrame:
    """One frame.

    number: from 0; those of a camera have gaps where frames were skipped.
    time_s: since the first frame, by the video's or the camera's own clock.
    pixels: (H, W, 3) uint8, RGB, upright.
    """

    number: int
    time_s: float
    pixels: NDArray[np.uint8]


def find_capture(given: Path) -> Video | Camera | None:
    """Return the video or camera that a path means: `clip.mp4`, `camera:0`, `/dev/video0`; None: something else."""
    name = str(given)
    numbered = re.fullmatch(r"camera:(\d+)", name)
    if numbered:
        return Camera(f"{_DEVICES}/video{int(numbered[1])}", name)
    if name.startswith("camera:"):
        return Camera(name.removeprefix("camera:"), name)
    if given.is_relative_to(_DEVICES):
        return Camera(name, name)
    return Video(given) if given.suffix.lower() in VIDEO_SUFFIXES and not given.is_dir() else None


def read_video(video: Video) -> Generator[CapturedFrame, None, None]:
    """Yield every frame of a video; of several pictures in one file, those that players show.

    Raises:
        TargetUnavailable: PyAV is not installed.
        DatasetError: no video, a frame that cannot be decoded, a file that was cut off, or a frame too large for
            the memory.
    """
    av = _library()
    number = 0
    try:
        with av.open(str(video.file)) as container:
            stream = _video_stream(container, video.file)
            clock, reached_s = _Clock(stream), 0.0
            for packet in container.demux():
                if packet.pts is not None and packet.time_base is not None:
                    end = (packet.pts + (packet.duration or 0)) * packet.time_base
                    reached_s = max(reached_s, float(end))
                # One packet can hold several frames, and the last packet of all the ones that were held back.
                for frame in packet.decode() if packet.stream is stream else ():
                    _require_sound(frame, video.file, number)
                    yield CapturedFrame(number, clock.seconds(frame, number), _upright_rgb(frame))
                    number += 1
            _require_whole(container, stream, reached_s, video.file, number)
    except MemoryError as error:
        raise DatasetError(
            f"{video.file}: frame {number}: memory is out. Close other programs, or scale the video down."
        ) from error
    except av.error.FFmpegError as error:
        where = f"frame {number}" if number else "its beginning"
        raise DatasetError(
            f"{video.file}: not readable at {where}: {error.strerror or error}. Copy the video again, or convert it: "
            "ffmpeg -i VIDEO -c:v libx264 NEW.mp4"
        ) from error


def read_camera(camera: Camera, frame_px: tuple[int, int]) -> Generator[CapturedFrame, None, None]:
    """Yield the newest frame of a camera each time, without end.

    Args:
        camera: what to read.
        frame_px: (height, width) that the camera is asked for; where it has no such size, it takes the nearest.

    Raises:
        TargetUnavailable: PyAV is not installed, there is no such camera, it may not be used, or it was there and
            gives no more frames.
        DatasetError: a frame too large for the memory.
    """
    av = _library()
    container = _opened_camera(av, camera, frame_px)
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1  # more of them hold frames back
    newest = _Newest(container, stream)
    clock, last, damaged = _Clock(stream), -1, 0
    newest.start()
    try:
        while True:
            taken = newest.take(_PATIENCE_S)
            if taken is None:
                raise TargetUnavailable(_gone(camera, last, newest.ended))
            frame = newest.decoded(taken[1], av)
            damaged = 0 if frame is not None else damaged + 1
            if damaged >= _DAMAGED_IN_A_ROW:
                raise TargetUnavailable(_gone(camera, last, f"{damaged} damaged frames in a row"))
            if frame is not None:
                last = taken[0]
                yield CapturedFrame(last, clock.seconds(frame, last), _upright_rgb(frame))
    except MemoryError as error:
        raise DatasetError(
            f"{camera.name}: memory is out after frame {last}. Close other programs, or give fewer --threads."
        ) from error
    finally:
        newest.stop()


def list_cameras() -> list[str]:
    """Return the video devices of this machine, each with the name that its driver gives."""
    found = []
    for device in sorted(_DEVICES.glob("video[0-9]*"), key=lambda path: (len(path.name), path.name)):
        told = _DEVICE_NAMES / device.name / "name"
        found.append(f"{device} ({told.read_text().strip()})" if told.is_file() else str(device))
    return found


class _Clock:
    """Seconds since a stream's first frame."""

    def __init__(self, stream: VideoStream) -> None:
        self._rate = float(stream.average_rate or 0)
        self._first: float | None = None

    def seconds(self, frame: VideoFrame, number: int) -> float:
        # A bare stream has no time stamps: its rate has to do.
        now = frame.time if frame.time is not None else number / self._rate if self._rate else 0.0
        if self._first is None:
            self._first = now
        return round(now - self._first, 6)


class _Newest:
    """A thread that reads a camera and keeps what came last. It closes the camera when it ends."""

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self._container, self._stream = container, stream
        # Pictures that stand alone are decoded when they are wanted; others need all before them.
        self._alone = stream.codec_context.codec.intra_only
        self._changed = threading.Condition()
        self._kept: tuple[int, Packet[VideoStream] | VideoFrame] | None = None
        self._stopped = self._over = False
        self.ended = "no frame came in time"
        # A daemon: a driver that never answers must not hold the process.
        self._thread = threading.Thread(target=self._read, name="qexport-camera", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def take(self, patience_s: float) -> tuple[int, Packet[VideoStream] | VideoFrame] | None:
        """Return the newest and its number, once; None where the camera ended or gave nothing in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._kept is not None or self._over, patience_s)
            taken, self._kept = self._kept, None
            return taken

    def decoded(self, taken: Packet[VideoStream] | VideoFrame, av: Any) -> VideoFrame | None:
        """Return the frame; None: it came damaged."""
        if not isinstance(taken, av.Packet):
            return cast("VideoFrame", taken)
        try:
            frames = self._stream.codec_context.decode(cast("Packet[VideoStream]", taken))
        except (av.error.InvalidDataError, av.error.ArgumentError):
            return None
        return frames[-1] if frames and not frames[-1].is_corrupt else None

    def stop(self) -> None:
        self._stopped = True
        self._thread.join(timeout=2.0)

    def _read(self) -> None:
        import av  # noqa: PLC0415 - optional; `_library` has said so where it is missing

        try:
            self._pump(av)
            self.ended = "its stream ended"
        except (av.error.FFmpegError, MemoryError) as error:
            self.ended = str(getattr(error, "strerror", None) or error or "memory is out")
        finally:
            # Only here, where no packet is left: a packet is the driver's own memory, and gone with the device.
            self._container.close()
            with self._changed:
                self._over = True
                self._changed.notify_all()

    def _pump(self, av: Any) -> None:
        for number, packet in enumerate(self._container.demux(self._stream)):
            if self._stopped:
                return
            if not packet.size:  # the driver lost this picture; or it is the end
                continue
            if self._alone:
                copied = av.Packet(
                    packet.size
                )  # memory of our own; made of bytes, it would only refer to them
                copied.update(packet)
                copied.pts, copied.time_base = packet.pts, packet.time_base
                self._keep(number, copied)
            else:
                for frame in packet.decode()[-1:]:
                    self._keep(number, frame)

    def _keep(self, number: int, kept: Packet[VideoStream] | VideoFrame) -> None:
        with self._changed:
            self._kept = (number, kept)
            self._changed.notify_all()


def _library() -> Any:
    try:
        import av  # noqa: PLC0415 - optional, 100 MB, and needed for videos and cameras alone
    except ImportError as error:
        raise TargetUnavailable(f"videos and cameras are read by PyAV: {error}. {_INSTALL}") from error
    return av


def _video_stream(container: InputContainer, file: Path) -> VideoStream:
    stream = container.streams.best("video")
    if stream is None:
        raise DatasetError(f"{file}: holds no picture ({container.format.long_name}). Give a video.")
    # The cores are the detector's; one decodes faster than it can look.
    stream.codec_context.thread_count = 1
    return stream  # type: ignore[return-value]


def _require_sound(frame: VideoFrame, file: Path, number: int) -> None:
    if frame.is_corrupt:
        raise DatasetError(f"{file}: frame {number} is damaged. Copy the video again, or cut it off before.")


def _require_whole(
    container: InputContainer, stream: VideoStream, reached_s: float, file: Path, number: int
) -> None:
    """Refuse a video that ends before its header says; where the length is only an estimate, it says nothing."""
    stated = stream.frames > 0 if "mp4" in container.format.name else "matroska" in container.format.name
    if not number:
        raise DatasetError(f"{file}: no frame in it. Copy the video again.")
    if not stated or container.duration is None:
        return
    expected_s = container.duration / 1e6
    gap_s = max(_LONGEST_GAP_S, 2.5 / float(stream.average_rate or 30))
    if reached_s < expected_s - gap_s:
        raise DatasetError(
            f"{file}: cut off after frame {number - 1}, at {reached_s:.2f} s of {expected_s:.2f} s. Copy it again."
        )


def _upright_rgb(frame: VideoFrame) -> NDArray[np.uint8]:
    """Return (H, W, 3) uint8, RGB, turned as the file says (phones film sideways)."""
    pixels = frame.to_ndarray(format="rgb24")
    turned = np.rot90(pixels, round(frame.rotation / 90))  # both count against the clock
    return np.ascontiguousarray(turned, dtype=np.uint8)


def _opened_camera(av: Any, camera: Camera, frame_px: tuple[int, int]) -> InputContainer:
    if camera.driver == "v4l2" and not sys.platform.startswith("linux"):
        raise TargetUnavailable(f"{camera.name}: cameras are read through V4L2, which Linux alone has.")
    options = {"video_size": f"{frame_px[1]}x{frame_px[0]}"} if camera.driver == "v4l2" else {}
    try:
        # As the container's: `options` would tell the decoder too, which then expects a size the camera has not.
        container: InputContainer = av.open(camera.device, format=camera.driver, container_options=options)
    except av.error.FFmpegError as error:
        raise TargetUnavailable(_cannot_open(camera, error)) from error
    return container


def _cannot_open(camera: Camera, error: Exception) -> str:
    there = ", ".join(list_cameras())
    listed = f"There is: {there}." if there else f"There is no {_DEVICES}/video* on this machine."
    where = camera.name if camera.name == camera.device else f"{camera.name} ({camera.device})"
    if isinstance(error, FileNotFoundError):
        return (
            f"{where}: no such camera. {listed} Plug it in and look with: v4l2-ctl --list-devices. In a container, "
            f"pass --device {camera.device}."
        )
    if isinstance(error, PermissionError):
        return (
            f"{where}: this user may not open it. Join the group that may: sudo usermod -aG video $USER, and log in "
            "anew."
        )
    reason = getattr(error, "strerror", None) or error
    return (
        f"{where}: no camera that can be read through V4L2: {reason}. {listed} If another program has it, close that "
        "one: fuser -v DEVICE. A Raspberry Pi's own camera (CSI) is libcamera's: put libcamerify before the command."
    )


def _gone(camera: Camera, last: int, reason: str) -> str:
    after = f"after frame {last}" if last >= 0 else "from the beginning"
    return (
        f"{camera.name}: no more frames {after}: {reason}. Was it unplugged? What was found until then is written. "
        "Plug it in and give the command again."
    )
