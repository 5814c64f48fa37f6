"""The device side: what a board has, numpy, Pillow and ONNX Runtime, is enough to run an artifact."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tomllib
from PIL import Image

import qexport
from qexport.calibration.calibrator import calibrate
from qexport.detections import Detections
from qexport.detectors.demo.scenes import HEIGHT, WIDTH, draw_scene
from qexport.detectors.load import load_detector
from qexport.detectors.static import make_static
from qexport.exporters import onnx as onnx_exporter
from qexport.quantization.reference import quantize
from qexport.runtimes.onnx import OnnxRunner
from qexport.target_options import TargetOptions

ROOT = Path(__file__).parents[1]
PACKAGE = Path(qexport.__file__).parent
WORKSTATION_MODULES = {"pipeline", "subject"}
DEVICE_MODULES = (
    "qexport",
    *sorted(
        f"qexport.{path.stem}" for path in PACKAGE.glob("[!_]*.py") if path.stem not in WORKSTATION_MODULES
    ),
    *sorted(f"qexport.runtimes.{path.stem}" for path in (PACKAGE / "runtimes").glob("[!_]*.py")),
)
HAS_CLI = (PACKAGE / "cli").is_dir()
CAMERA_SEED = (11, 0, 0)

# What only a workstation has. The finder that looks through sys.path does not find it here.
HIDE_WORKSTATION = """
import importlib.machinery, sys
HIDDEN = {"torch", "torchvision", "torchao", "safetensors", "onnx", "onnx_ir", "onnxscript", "onnxsim",
          "matplotlib", "pycocotools", "jinja2", "psutil"}

class Device(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)

sys.meta_path = [Device if one is importlib.machinery.PathFinder else one for one in sys.meta_path]
"""
DETECT = """
import sys
from pathlib import Path
import numpy as np
from qexport.frames import read_frame
from qexport.runtimes.onnx import OnnxRunner
artifact, image, out = map(Path, sys.argv[1:])
with OnnxRunner(artifact) as runner:
    spec = runner.artifact.input
    frame = read_frame(image, (spec.frame_height_px, spec.frame_width_px))
    found = runner.infer(frame.pixels)
np.savez(out, boxes=found.boxes, scores=found.scores, labels=found.labels)
"""
IS_TORCH_THERE = "import importlib.util; print(importlib.util.find_spec('torch') is not None)"
NO_NETWORK = re.compile(
    "NewConnectionError|ConnectTimeout|ReadTimeout|ProxyError|name resolution|Network is unreachable"
)


@dataclass(frozen=True, slots=True)
class Camera:
    """An artifact of the demo detector, an image for it, and what this process detects in it."""

    artifact: Path
    image: Path
    expected: Detections


@pytest.fixture(scope="module")
def camera(tmp_path_factory: pytest.TempPathFactory) -> Camera:
    folder = tmp_path_factory.mktemp("camera")
    loaded = load_detector("demo", None)
    static = make_static(loaded.module, frame_px=(HEIGHT, WIDTH))
    encodings = calibrate(static, [draw_scene(*CAMERA_SEED, index).pixels for index in range(2)])
    onnx_exporter.export(
        quantize(static, encodings), encodings, folder / "onnx", labels=loaded.labels, options=TargetOptions()
    )
    pixels = draw_scene(*CAMERA_SEED).pixels
    Image.fromarray(pixels).save(folder / "frame.png")
    with OnnxRunner(folder / "onnx") as runner:
        return Camera(folder / "onnx", folder / "frame.png", runner.infer(pixels))


def run(python: Path, *arguments: str | Path, cwd: Path) -> str:
    """Run an interpreter that sees only its own packages; return what it prints."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    finished = subprocess.run(
        [python, *arguments], capture_output=True, text=True, timeout=120, check=False, cwd=cwd, env=variables
    )
    assert finished.returncode == 0, finished.stdout[-1000:] + finished.stderr[-3000:]
    return finished.stdout


def run_hidden(code: str, *arguments: str | Path, cwd: Path) -> str:
    return run(Path(sys.executable), "-c", HIDE_WORKSTATION + code, *arguments, cwd=cwd)


def run_command_hidden(*words: str | Path, cwd: Path) -> str:
    """Run `qexport WORDS` where the workstation's packages are hidden."""
    code = "import runpy; sys.argv[0] = 'qexport'; runpy.run_module('qexport', run_name='__main__')"
    return run_hidden(code, *words, cwd=cwd)


def assert_same_detections(saved: Path, expected: Detections) -> None:
    assert len(expected) > 0
    with np.load(saved) as found:
        assert np.array_equal(found["boxes"], expected.boxes)
        assert np.array_equal(found["scores"], expected.scores)
        assert np.array_equal(found["labels"], expected.labels)


def test_hidden_packages_are_not_found(tmp_path: Path) -> None:
    assert run_hidden(IS_TORCH_THERE, cwd=tmp_path).strip() == "False"


def test_device_modules_without_torch_import(tmp_path: Path) -> None:
    code = f"""
    import importlib
    for name in {DEVICE_MODULES}:
        importlib.import_module(name)
    print(len(sys.modules.keys() & HIDDEN))
    """
    assert run_hidden(textwrap.dedent(code), cwd=tmp_path).strip() == "0"


def test_artifact_without_torch_gives_the_same_detections(camera: Camera, tmp_path: Path) -> None:
    run_hidden(DETECT, camera.artifact, camera.image, tmp_path / "found.npz", cwd=tmp_path)
    assert_same_detections(tmp_path / "found.npz", camera.expected)


@pytest.mark.skipif(not HAS_CLI, reason="this installation has no qexport.cli")
def test_targets_command_without_torch_lists_onnx(tmp_path: Path) -> None:
    assert "onnx" in run_command_hidden("targets", cwd=tmp_path)


@pytest.mark.skipif(not HAS_CLI, reason="this installation has no qexport.cli")
def test_detect_command_without_torch_finds_the_parts(camera: Camera, tmp_path: Path) -> None:
    text = run_command_hidden("detect", camera.artifact, camera.image, cwd=tmp_path)
    assert any(part in text for part in ("washer", "nut", "bolt"))


@pytest.fixture(scope="module")
def device_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the environment that the README tells the owner of a board to make; return its interpreter."""
    folder = tmp_path_factory.mktemp("device")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True, timeout=120)
    python = folder / "venv" / "bin" / "python"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["onnx-runtime"]]
    install(python, "-c", str(ROOT / "constraints.txt"), *wanted)
    source = folder / "source"
    source.mkdir()
    shutil.copytree(ROOT / "qexport", source / "qexport", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    install(python, "--no-deps", str(source))
    return python


def install(python: Path, *arguments: str) -> None:
    """Install with pip; skip where the package index cannot be reached, fail where pip finds a fault."""
    command = [python, "-m", "pip", "install", "--quiet", "--retries", "1", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    if finished.returncode != 0 and NO_NETWORK.search(finished.stdout + finished.stderr):
        pytest.skip("pip cannot reach the package index, so no environment without torch can be made")
    assert finished.returncode == 0, finished.stderr[-3000:]


@pytest.mark.slow
def test_fresh_environment_of_the_base_and_onnx_runtime_runs_an_artifact(
    device_python: Path, camera: Camera, tmp_path: Path
) -> None:
    assert run(device_python, "-c", IS_TORCH_THERE, cwd=tmp_path).strip() == "False"
    run(device_python, "-m", "pip", "check", cwd=tmp_path)
    run(device_python, "-c", DETECT, camera.artifact, camera.image, tmp_path / "found.npz", cwd=tmp_path)
    assert_same_detections(tmp_path / "found.npz", camera.expected)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_CLI, reason="this installation has no qexport.cli")
def test_fresh_environment_of_the_base_and_onnx_runtime_has_the_command(
    device_python: Path, camera: Camera, tmp_path: Path
) -> None:
    command = device_python.with_name("qexport")
    assert "onnx" in run(device_python, command, "targets", cwd=tmp_path)
    text = run(device_python, command, "detect", camera.artifact, camera.image, cwd=tmp_path)
    assert any(part in text for part in ("washer", "nut", "bolt"))
