"""What `bench.py` measured, and how it reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
from bench_also import Also, also_lines
from bench_cost import Cost, cost_lines

from qexport.benchmarks.peers import Ratio
from qexport.layers import STAGES
from qexport.results import AccuracyReport, Gate, LatencyStats, LayerLatency, Machine

# The first is what accuracy is compared with, so it bears the name that qexport.benchmarks.accuracy expects.
EAGER, TORCHVISION, RECIPE, OURS = "eager", "torchvision ONNX", "quantize_static", "qexport"
OURS_TFLITE, FP32_TFLITE = "qexport tflite", "qexport tflite fp32"


class Profiled(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An artifact of ours layer by layer, profiled on the first frame."""

    layers: tuple[LayerLatency, ...]
    accounted_share: float
    """Sum of the layers over the profiled run, less the profiler's own time between kernels."""


class Turns(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All contenders in turns, with one number of threads."""

    threads: int
    stats: dict[str, LatencyStats]
    faster_than_eager: dict[str, Ratio]
    ours_faster_than: dict[str, Ratio]
    times_ms: dict[str, list[float]]
    """Every counted run, in order: the n-th of each were timed in the same round."""
    profiles: dict[str, Profiled]
    """By contender, those of ours."""


class Bench(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`bench.json`."""

    detector: str
    frame_px: tuple[int, int]
    dataset: str
    frames: int
    """Frames that the rounds go through."""
    artifact_sha256: str
    parity: tuple[Gate, ...]
    """No latency without it."""
    machine: Machine
    turns: tuple[Turns, ...]
    sizes_bytes: dict[str, int]
    accuracy: AccuracyReport | None
    cost: Cost | None = None
    also: tuple[Also, ...] = ()


def as_markdown(bench: Bench) -> str:
    """Return the page that is printed."""
    machine = bench.machine
    packages = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    height, width = bench.frame_px
    parity = ", ".join(
        f"{gate.name} {'ok' if gate.passed else 'FAILED'} ({gate.measured})" for gate in bench.parity
    )
    lines = [
        f"# {bench.detector}",
        "",
        f"{bench.dataset}, {bench.frames} frames of {width}x{height} in turns, frame in to boxes out. "
        f"{machine.processor}, {machine.cores} cores, {machine.system}. {packages}.",
        f"Artifact {bench.artifact_sha256[:12]}. Parity: {parity}.",
    ]
    for turns in bench.turns:
        lines += ["", *_latency(turns)]
        for name, profiled in turns.profiles.items():
            lines += ["", *_stages(turns, name, profiled)]
    lines += ["", "## Size", ""]
    sizes = [[name, f"{size / 1e6:.1f}"] for name, size in bench.sizes_bytes.items()]
    lines += _table(["file", "MB"], sizes)
    if bench.accuracy is not None:
        lines += ["", *_accuracy(bench.accuracy)]
    if bench.cost is not None:
        lines += ["", *cost_lines(bench.cost)]
    if bench.also:
        lines += ["", *also_lines(bench.also)]
    return "\n".join(lines) + "\n"


def _latency(turns: Turns) -> list[str]:
    rows = []
    for name, stats in turns.stats.items():
        times = (stats.p50_ms, stats.min_ms, stats.p90_ms, stats.std_ms)
        ours = "" if name == OURS else _ratio(turns.ours_faster_than[name])
        rows.append([name, *(f"{time:.1f}" for time in times), _ratio(turns.faster_than_eager[name]), ours])
    runs = turns.stats[OURS].runs
    return [
        f"## Latency, {_threads(turns)}",
        "",
        f"{runs} interleaved runs, ms. Ratios of medians with 95 % bootstrap intervals over rounds.",
        "",
        *_table(["", "median", "min", "p90", "std", "times eager's speed", "qexport is faster by"], rows),
    ]


def _stages(turns: Turns, name: str, profiled: Profiled) -> list[str]:
    layers = profiled.layers
    whole_ms = sum(row.artifact_ms for row in layers)
    rows = []
    for stage in STAGES:
        stage_ms = sum(row.artifact_ms for row in layers if row.stage == stage)
        rows.append([stage, f"{stage_ms:.2f}", f"{100 * stage_ms / whole_ms:.1f}"])
    others = sorted((row for row in layers if row.kind != "convolution"), key=lambda row: -row.artifact_ms)
    named = ", ".join(f"`{row.path}` ({row.kind}, {row.artifact_ms:.2f} ms)" for row in others[:2])
    return [
        f"### Where {name}'s time goes, {_threads(turns)}",
        "",
        *_table(["stage", "ms", "%"], rows),
        "",
        f"The largest that are not convolutions: {named}. "
        f"Kernels add up to {100 * profiled.accounted_share:.1f} % of a profiled run, less the profiler's own "
        "time between kernels.",
    ]


def _accuracy(report: AccuracyReport) -> list[str]:
    rows = []
    for subject in report.subjects:
        drop = subject.coco_drop_interval
        rows.append(
            [
                subject.subject,
                f"{subject.voc_map50:.4f}",
                f"{subject.coco_map:.4f}",
                "" if drop is None else f"{drop.low:+.4f} to {drop.high:+.4f}",
            ]
        )
    return [
        f"## Accuracy, {report.dataset} {report.split}, {report.images} images",
        "",
        *_table(["", "VOC mAP at 0.5", "COCO mAP", "COCO mAP less eager's, 95 %"], rows),
    ]


def _threads(turns: Turns) -> str:
    return f"{turns.threads} thread{'s' if turns.threads > 1 else ''}"


def _ratio(ratio: Ratio) -> str:
    return f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
