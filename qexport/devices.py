"""What runs a target on this machine: its own runtime, or the evaluation of its network."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from qexport.artifact import load_artifact
from qexport.target import find_target


def has_device(target: str) -> bool:
    """Say whether the target's own runtime can run here; where not, its network is evaluated, never timed."""
    runtime = importlib.import_module(f"qexport.runtimes.{find_target(target).runtime}")
    return bool(runtime.has_device())


def why_untimed(target: str, run: Path) -> str:
    """Return why a target was not timed here, and how to have it timed."""
    folder = run / target
    travels = load_artifact(folder)[0].file("int8").name.endswith(".onnx")
    how = (
        f"Measure {folder} on the device (deploy/jetson/measure.sh), then here: qexport report {run} --merge FILE..."
        if travels
        else "Its engine is made where PyTorch is: give the same command on a device with torch and torch2trt."
    )
    return f"{target}: no NVIDIA GPU here, so its latency was not measured. {how}"


def runner_for(target: str) -> Any:
    """Return what runs a target here: its runtime, or the evaluation of its network where no device is."""
    where = "runtimes" if has_device(target) else "emulation"
    return importlib.import_module(f"qexport.{where}.{find_target(target).runtime}").RUNNER
