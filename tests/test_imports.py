"""What importing qexport loads, and that every module of it can be imported."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import qexport

HEAVY = frozenset(
    [
        "av",
        "torch",
        "torchvision",
        "torchao",
        "safetensors",
        "onnx",
        "onnx_ir",
        "onnxscript",
        "onnxruntime",
        "tensorrt",
        "tensorrt_rtx_bindings",
        "torch2trt",
        "matplotlib",
        "pycocotools",
        "jinja2",
    ]
)
COMMANDS = (
    "run",
    "demo",
    "qat",
    "inspect",
    "calibrate",
    "export",
    "compare",
    "bench",
    "evaluate",
    "sensitivity",
    "mend",
    "report",
    "build",
    "bundle",
    "verify",
    "detect",
    "targets",
    "doctor",
)
PACKAGE = Path(qexport.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.name != "__main__.py"
)
needs_cli = pytest.mark.skipif(
    importlib.util.find_spec("qexport.cli") is None, reason="this installation has no qexport.cli"
)


def run_python(*arguments: str) -> tuple[str, frozenset[str]]:
    """Run a fresh interpreter; return its output and the top-level packages that it imported."""
    finished = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    lines = [line for line in finished.stderr.splitlines() if line.startswith("import time:")]
    names = (line.rpartition("|")[2].strip() for line in lines)
    return finished.stdout, frozenset(name.partition(".")[0] for name in names)


def test_run_python_importing_a_heavy_package_sees_it() -> None:
    assert "onnxruntime" in run_python("-c", "import onnxruntime")[1] & HEAVY


def test_import_of_the_package_loads_no_backend() -> None:
    _, loaded = run_python("-c", "import qexport")
    assert "qexport" in loaded
    assert not loaded & HEAVY


@needs_cli
def test_import_of_the_cli_loads_no_backend() -> None:
    _, loaded = run_python("-c", "import qexport.cli")
    assert not loaded & HEAVY


@needs_cli
def test_help_loads_no_backend_and_lists_every_command() -> None:
    text, loaded = run_python("-m", "qexport", "--help")
    words = set(text.split())
    assert [command for command in COMMANDS if command not in words] == []
    assert not loaded & HEAVY


@needs_cli
@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_loads_no_backend(command: str) -> None:
    text, loaded = run_python("-m", "qexport", command, "--help")
    assert command in text
    assert not loaded & HEAVY


@pytest.mark.parametrize("name", MODULES)
def test_module_imported_succeeds_and_says_what_it_is_for(name: str) -> None:
    assert importlib.import_module(name).__doc__
