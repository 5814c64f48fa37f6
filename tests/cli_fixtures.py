"""A finished run of the demo detector on a few scenes, made once a session, and ways to call the command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from qexport.benchmarks.report import strip_timings
from qexport.cli import app
from qexport.detectors.demo.scenes import write_scenes

STAGES = (
    "inspect",
    "calibrate",
    "export.onnx",
    "compare.onnx",
    "detect.eager",
    "detect.reference",
    "detect.onnx",
    "evaluate",
    "bench.onnx",
)
MEASURED = (
    "--runs",
    "2",
    "--warmup",
    "1",
    "--parity-images",
    "2",
    "--min-accounted",
    "0.01",
    "--max-drop",
    "0.2",
)
DETECTOR = ("--model", "demo", "--data", "data")
RUN = ("run", *DETECTOR, "--target", "onnx", "--out", "mine", *MEASURED)
BEFORE_START: Callable[[], None] | None = None
"""Called in the process of a spawned command before it begins."""
TIMED = {"timings.json", "latency.csv", "kinds.csv", "onnx/latency.json", "onnx/memory.json"}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command came to."""

    code: int
    out: str
    err: str


def call(*words: str | Path) -> Answer:
    """Run a command in this process, in the current folder."""
    found = CliRunner().invoke(app, [str(word) for word in words], prog_name="qexport")
    return Answer(found.exit_code, found.stdout, found.stderr)


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "qexport", *(str(word) for word in words)]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def spawn(*words: str | Path, cwd: Path, timeout: float = 300, **more: str) -> Answer:
    """Run a command in a process of its own."""
    done = subprocess.run(
        command(*words),
        cwd=cwd,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        preexec_fn=BEFORE_START,
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def stop_after(stage: str, kind: signal.Signals, *words: str | Path, cwd: Path, delay_s: float) -> Answer:
    """Run a command and send it a signal a moment after the record of `stage` appears in its run folder."""
    record = cwd / "mine" / "stages" / f"{stage}.json"
    process = subprocess.Popen(
        command(*words), cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 120
    while not record.is_file() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(delay_s)
    process.send_signal(kind)
    out, err = process.communicate(timeout=60)
    return Answer(process.returncode, out, err)


def contents(run: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a run, timings taken out."""
    found = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if path.is_dir() or name in TIMED:
            continue
        data = path.read_bytes()
        if name == "report.html":
            data = strip_timings(data.decode()).encode()
        if name.startswith("stages/"):
            record = msgspec.json.decode(data)
            del record["seconds"]
            if name == "stages/bench.onnx.json":
                del record["outputs"]
            data = msgspec.json.encode(record)
        found[name] = data
    return found


def touched(run: Path) -> dict[str, tuple[int, int]]:
    """Return inode and time of change of every file of a run."""
    return {
        path.relative_to(run).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in run.rglob("*")
        if path.is_file()
    }


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_bytes())
    change(value)
    path.write_text(json.dumps(value))


def partial_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".part")]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with scenes in `data` and a finished run in `mine`; not to be changed."""
    folder = tmp_path_factory.getbasetemp() / "finished"
    if not folder.is_dir():  # another module of this session has made it
        making = tmp_path_factory.mktemp("making")
        write_scenes(making / "data", train=6, val=2, test=6)
        answer = spawn(*RUN, cwd=making)
        assert answer.code == 0, answer.err
        (making / "answer.txt").write_text(answer.out + "\0" + answer.err)
        making.rename(folder)
    return folder


@pytest.fixture
def copied(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the finished run with its scenes, which may be changed; it is the current folder."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
