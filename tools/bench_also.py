"""Speed and parity of further detectors, with seeded weights: nothing here says anything of accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from qexport.benchmarks.eager_profile import infer_eager, torch_threads
from qexport.benchmarks.latency import SETTLE_S, interleave, summarise
from qexport.benchmarks.parity import compare
from qexport.benchmarks.peers import Ratio, ratio_of_medians
from qexport.calibration.calibrator import calibrate
from qexport.detectors.load import load_detector
from qexport.detectors.static import make_static
from qexport.exporters.onnx import export
from qexport.quantization.inspection import inspect_layers
from qexport.quantization.reference import quantize
from qexport.results import Gate, LatencyStats
from qexport.runtimes.onnx import OnnxRunner
from qexport.target_options import TargetOptions

CALIBRATION_FRAMES, PARITY_FRAMES = 4, 2


class AlsoTurns(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Eager, fp32 and int8 in turns, with one number of threads."""

    threads: int
    stats: dict[str, LatencyStats]
    faster_than_eager: dict[str, Ratio]


class Also(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One further detector."""

    model: str
    turns: tuple[AlsoTurns, ...]
    parity: tuple[Gate, ...]
    layers_compared: int
    float_layers: tuple[str, ...]
    """Quantized tensors whose operator ONNX Runtime computes in float."""
    size_ratio: float


def measure_also(
    model: str, frames: Sequence[NDArray[np.uint8]], *, threads: Sequence[int], rounds: int, folder: Path
) -> Also:
    """Export a detector, compare it with its references and time it against eager.

    Args:
        model: as for `qexport run`.
        frames: (H, W, 3) uint8 RGB, of one size; the first ones calibrate.
        threads: numbers of threads to time with.
        rounds: counted rounds.
        folder: for the artifact.
    """
    loaded = load_detector(model, None)
    static = make_static(loaded.module, frame_px=(frames[0].shape[0], frames[0].shape[1]))
    encodings = calibrate(static, frames[:CALIBRATION_FRAMES])
    quantized = quantize(static, encodings)
    artifact = export(quantized, encodings, folder, labels=loaded.labels, options=TargetOptions())
    with OnnxRunner(folder) as runner:
        report = compare(quantized, runner, inspect_layers(static), frames[-PARITY_FRAMES:], split="bench")
    turns = []
    for number in threads:
        with (
            torch_threads(number),
            OnnxRunner(folder, threads=number) as int8,
            OnnxRunner(folder, role="fp32", threads=number) as fp32,
        ):
            times = interleave(
                {
                    "eager": lambda: infer_eager(loaded.module, frames[0]),
                    "fp32": lambda fp32=fp32: fp32.infer(frames[0]),  # type: ignore[misc]
                    "int8": lambda int8=int8: int8.infer(frames[0]),  # type: ignore[misc]
                },
                warmup=1,
                runs=rounds,
                settle_s=SETTLE_S,
                on_run=lambda: None,
            )
        turns.append(
            AlsoTurns(
                threads=number,
                stats={name: summarise(values) for name, values in times.items()},
                faster_than_eager={
                    name: ratio_of_medians(times["eager"], values) for name, values in times.items()
                },
            )
        )
    return Also(
        model=model,
        turns=tuple(turns),
        parity=report.gates,
        layers_compared=sum(row.values > 0 for row in report.layers),
        float_layers=tuple(sorted({layer.op for layer in artifact.layers if not layer.integer})),
        size_ratio=artifact.file("fp32").size_bytes / artifact.file("int8").size_bytes,
    )


def also_lines(measured: Sequence[Also]) -> list[str]:
    """Return the section of the page."""
    lines = ["## Further detectors, seeded weights: speed and parity alone", ""]
    lines += [
        "| detector | threads | eager, ms | fp32, ms | int8, ms | int8 faster than eager | size | parity |"
    ]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"]
    for also in measured:
        failed = [gate for gate in also.parity if not gate.passed]
        parity = f"{'FAILED' if failed else 'ok'}, {also.parity[0].measured}, {also.layers_compared} layers"
        if also.float_layers:
            parity += f"; float between int8: {', '.join(also.float_layers)}"
        for turn in also.turns:
            eager, fp32, int8 = (f"{turn.stats[name].p50_ms:.0f}" for name in ("eager", "fp32", "int8"))
            ratio = turn.faster_than_eager["int8"]
            faster = f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
            cells = (also.model, turn.threads, eager, fp32, int8, faster, f"1/{also.size_ratio:.2f}", parity)
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines
