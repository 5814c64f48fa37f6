"""What a run costs: seconds of each stage, memory of export and inference, calibration against images."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from qexport.benchmarks.complexity import peak_memory
from qexport.calibration.calibrator import calibrate
from qexport.errors import RunFolderError
from qexport.files import read_json
from qexport.pipeline import Work
from qexport.run_folder import STAGES, StageRecord

CALIBRATION_SIZES = (8, 16, 32)
_EXPORT_NEEDS = (
    "run.json",
    "detector.json",
    "encodings.json",
    "stages/inspect.json",
    "stages/calibrate.json",
)
_EAGER = """
import sys, torch
from pathlib import Path
from qexport.detectors.load import load_detector
loaded = load_detector(sys.argv[1], Path(sys.argv[2]) if sys.argv[2] else None)
with torch.inference_mode():
    loaded.module([torch.zeros(3, int(sys.argv[3]), int(sys.argv[4]))])
"""


class Cost(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Of one run, on this machine."""

    stage_seconds: dict[str, float]
    """As the run's own records say; a stage that has not run is missing."""
    peak_bytes: dict[str, int]
    """Peak resident memory of a fresh process, by what it did."""
    calibration_seconds: dict[str, float]
    """Seconds by number of images, preparing the graph included."""


def measure_cost(work: Work, target: str) -> Cost:
    """Measure what a run and its parts cost."""
    stages = {
        path.stem: read_json(path, StageRecord, RunFolderError).seconds
        for path in sorted((work.path / STAGES).glob("*.json"))
    }
    return Cost(
        stage_seconds=stages,
        peak_bytes=_peaks(work, target),
        calibration_seconds={str(number): _calibration_seconds(work, number) for number in CALIBRATION_SIZES},
    )


def cost_lines(cost: Cost) -> list[str]:
    """Return the section of the page."""
    few, many = CALIBRATION_SIZES[0], CALIBRATION_SIZES[-1]
    each = (cost.calibration_seconds[str(many)] - cost.calibration_seconds[str(few)]) / (many - few)
    calibration = ", ".join(
        f"{number}: {seconds:.1f} s" for number, seconds in cost.calibration_seconds.items()
    )
    lines = ["## What a run costs", "", "| stage | s |", "| --- | ---: |"]
    lines += [f"| {name} | {seconds:.1f} |" for name, seconds in cost.stage_seconds.items()]
    lines += ["", "| peak memory of a fresh process | MB |", "| --- | ---: |"]
    lines += [f"| {name} | {size / 1e6:.0f} |" for name, size in cost.peak_bytes.items()]
    lines += [
        "",
        f"Calibration by number of images: {calibration}; {1000 * each:.0f} ms for each further image.",
    ]
    return lines


def _calibration_seconds(work: Work, number: int) -> float:
    samples = list(work.subject.calibration.samples[:number])
    started = time.perf_counter()
    calibrate(work.subject.static, work.subject.inputs(samples))
    return round(time.perf_counter() - started, 2)


def _peaks(work: Work, target: str) -> dict[str, int]:
    _, artifact = work.artifact(target)
    once = [sys.executable, "-m", "qexport.runtimes.once", str(artifact)]
    height, width = work.subject.frame_px
    eager = [work.settings.model, work.settings.weights or "", str(height), str(width)]
    peaks = {
        "inference, int8": peak_memory([*once, "int8"]),
        "inference, the same runtime fp32": peak_memory([*once, "fp32"]),
        "inference, PyTorch eager": peak_memory([sys.executable, "-c", _EAGER, *eager]),
    }
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        for name in _EXPORT_NEEDS:
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(work.path / name, run / name)
        peaks["export"] = peak_memory(
            [sys.executable, "-m", "qexport", "export", str(run), "--target", target]
        )
    return peaks
