"""The command in a process of its own, with packages hidden or faked, and artifacts made of the real classes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qexport.artifact import Artifact, InputSpec, describe_file, save_artifact
from qexport.engines import FOLDER, DeviceIdentity, Engine, add_engine
from qexport.files import sha256_file, write_bytes

TENSORRT = ("tensorrt", "tensorrt_rtx_bindings", "onnxruntime_ep_nv_tensorrt_rtx")
WORKSTATION = (
    "torch",
    "torchvision",
    "torchao",
    "safetensors",
    "onnx",
    "onnxscript",
    "onnxsim",
    "onnxruntime",
)
ORIN = DeviceIdentity(library="tensorrt 10.3.0", gpu="Orin", compute_capability="8.7", driver="12.6")
# The finder that looks through sys.path does not find what is hidden.
_HIDE = """
import importlib.machinery, runpy, sys
HIDDEN = set({hidden!r})

class Bare(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)

sys.meta_path = [Bare if one is importlib.machinery.PathFinder else one for one in sys.meta_path]
sys.argv[0] = "qexport"
runpy.run_module("qexport", run_name="__main__")
"""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command came to."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found

    def row(self, group: str, name: str) -> dict[str, Any]:
        return next(one for one in self.json["findings"] if (one["group"], one["name"]) == (group, name))

    def ability(self, target: str, ability: str) -> dict[str, Any]:
        verdict = next(one for one in self.json["targets"] if one["name"] == target)
        return next(one for one in verdict["abilities"] if one["ability"] == ability)


def doctor(*words: str | Path, hidden: tuple[str, ...] = (), path: Path | None = None, **more: str) -> Answer:
    """Run `qexport doctor WORDS`.

    Args:
        words: arguments of the command.
        hidden: packages that cannot be imported.
        path: folder whose packages come before those that are installed.
        more: variables of the environment.
    """
    variables = {**os.environ, **more, "COLUMNS": "120"}
    if path is not None:
        variables["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-c", _HIDE.format(hidden=hidden), "doctor", *map(str, words)],
        capture_output=True, text=True, timeout=120, check=False, env=variables,
    )  # fmt: skip
    return Answer(done.returncode, done.stdout, done.stderr)


def write_artifact(folder: Path, target: str) -> Path:
    """Write an artifact with one file; return its folder."""
    write_bytes(folder / "int8.onnx", b"a model")
    frame = InputSpec(
        frame_height_px=8, frame_width_px=8, preprocess="inside", resized_height_px=8, resized_width_px=8,
        padded_height_px=32, padded_width_px=32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
    )  # fmt: skip
    artifact = Artifact(
        target=target, qexport_version="0", versions={}, detector_sha256="", encodings_sha256="",
        labels=("background", "bolt"), input=frame, proposals=1, detections=1, forms={},
        files=(describe_file(folder, "int8.onnx", "int8"),), sites=(), float_sites={}, layers=(),
    )  # fmt: skip
    save_artifact(artifact, folder)
    return folder


def write_engine(folder: Path, built_for: DeviceIdentity) -> None:
    """Write an engine beside the artifact in `folder`."""
    path = write_bytes(folder / FOLDER / "int8.engine", b"an engine")
    engine = Engine(
        role="int8", source="int8", name=path.name, sha256=sha256_file(path), size_bytes=path.stat().st_size,
        source_sha256=sha256_file(folder / "int8.onnx"), built_for=built_for, build_s=1.0, options={},
    )  # fmt: skip
    add_engine(folder, engine)
