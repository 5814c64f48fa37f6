"""What runs a target on this machine: its own runtime, or the evaluation of its network."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from qexport.target import find_target


def has_device(target: str) -> bool:
    """Say whether the target's own runtime can run here; where not, its network is evaluated, never timed."""
    runtime = importlib.import_module(f"qexport.runtimes.{find_target(target).runtime}")
    return bool(runtime.has_device())


def why_untimed(target: str, run: Path) -> str:
    """Return why a target was not timed here, and how to have it timed."""
    return (
        f"{target}: no NVIDIA GPU here, so its latency was not measured. Build and measure {run / target} on the "
        f"device (docs/jetson.md), then here: qexport report {run} --merge FILE..."
    )


def runner_for(target: str) -> Any:
    """Return what runs a target here: its runtime, or the evaluation of its network where no device is."""
    where = "runtimes" if has_device(target) else "emulation"
    return importlib.import_module(f"qexport.{where}.{find_target(target).runtime}").RUNNER


def runners_for(target: str) -> tuple[Any, ...]:
    """Return everything that runs a target here: a runtime may have several sets of kernels, the usual one first."""
    module = importlib.import_module(runner_for(target).__module__)
    return (module.RUNNER, *getattr(module, "OTHER_RUNNERS", ()))
