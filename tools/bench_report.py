"""What `bench.py` measured, and how it reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
from bench_also import Also, also_lines
from bench_cost import Cost, cost_lines

from qexport.benchmarks.peers import Ratio
from qexport.cross_results import CrossReport
from qexport.layers import STAGES, Kind
from qexport.results import AccuracyReport, Gate, LatencyStats, LayerLatency, Machine

# The first is what accuracy is compared with, so it bears the name that qexport.benchmarks.accuracy expects.
EAGER, TORCHVISION, RECIPE, OURS = "eager", "torchvision ONNX", "quantize_static", "qexport"
OURS_TFLITE, FP32_TFLITE = "qexport tflite", "qexport tflite fp32"
OURS_EXECUTORCH = "qexport executorch"
REFERENCE = "quantized reference"

DENSE: tuple[Kind, ...] = ("convolution", "linear")
_NAMED_SHARE = 0.03
"""What costs more than this share, and is no convolution or linear, is named."""


class Profiled(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An artifact of ours layer by layer, profiled on the first frame."""

    layers: tuple[LayerLatency, ...]
    other_kernels_ms: dict[str, float]
    """By type, of kernels that are no convolution or linear: the mean over the runs."""
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


class Size(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A file that runs the detector."""

    name: str
    bytes: int
    fp32_bytes: int | None = None
    """Of the same target's float32 baseline; None: a peer's file, which has none."""


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
    sizes: tuple[Size, ...]
    crossed: CrossReport
    """Every target against every other, layer by layer."""
    accuracy: AccuracyReport | None
    cost: Cost | None = None
    also: tuple[Also, ...] = ()


def as_markdown(bench: Bench) -> str:
    """Return the page that is printed."""
    machine = bench.machine
    packages = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    height, width = bench.frame_px
    lines = [
        f"# {bench.detector}",
        "",
        f"{bench.dataset}, {bench.frames} frames of {width}x{height} in turns, frame in to boxes out. "
        f"{machine.processor}, {machine.cores} cores, {machine.system}. {packages}.",
        f"Artifact {bench.artifact_sha256[:12]}. {_parity(bench.parity)}",
    ]
    for turns in bench.turns:
        lines += ["", *_latency(turns)]
        for name, profiled in turns.profiles.items():
            lines += ["", *_stages(turns, name, profiled)]
    lines += ["", *_sizes(bench.sizes), "", *_crossed(bench.crossed)]
    if bench.accuracy is not None:
        lines += ["", *_accuracy(bench.accuracy)]
    if bench.cost is not None:
        lines += ["", *cost_lines(bench.cost)]
    if bench.also:
        lines += ["", *also_lines(bench.also)]
    return "\n".join(lines) + "\n"


def _parity(gates: Sequence[Gate]) -> str:
    failed = [f"{gate.subject} {gate.name} ({gate.measured})" for gate in gates if not gate.passed]
    return f"Parity: {len(gates) - len(failed)} of {len(gates)} gates ok" + (
        f"; FAILED: {', '.join(failed)}." if failed else "."
    )


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
    dense = [row for row in layers if row.kind in DENSE]
    dense_ms, eager_ms = (
        sum(row.artifact_ms for row in dense),
        sum(row.eager_ms or 0.0 for row in dense),
    )
    named = [
        f"`{row.path}` ({row.kind}) {row.artifact_ms:.2f} ms"
        for row in sorted(layers, key=lambda row: -row.artifact_ms)
        if row.kind not in DENSE and row.artifact_ms > _NAMED_SHARE * whole_ms
    ]
    kernels = [
        f"`{kernel}` {cost_ms:.2f} ms"
        for kernel, cost_ms in sorted(profiled.other_kernels_ms.items(), key=lambda item: -item[1])
        if cost_ms > _NAMED_SHARE * whole_ms
    ]
    return [
        f"### Where {name}'s time goes, {_threads(turns)}",
        "",
        *_table(["stage", "ms", "%"], rows),
        "",
        f"Convolutions and linears: {dense_ms:.1f} ms, in eager {eager_ms:.1f} ms: "
        f"{eager_ms / dense_ms:.2f} times faster.",
        "",
        f"Others above {100 * _NAMED_SHARE:.0f} %: {', '.join(named) or 'none'}. "
        f"Their kernels above {100 * _NAMED_SHARE:.0f} %: {', '.join(kernels) or 'none'}.",
        "",
        f"Kernels add up to {100 * profiled.accounted_share:.1f} % of a profiled run, less the profiler's own "
        "time between kernels.",
    ]


def _sizes(sizes: Sequence[Size]) -> list[str]:
    rows = []
    for size in sizes:
        fp32 = ["", ""]
        if size.fp32_bytes is not None:
            fp32 = [f"{size.fp32_bytes / 1e6:.1f}", f"1/{size.fp32_bytes / size.bytes:.2f}"]
        rows.append([size.name, f"{size.bytes / 1e6:.1f}", *fp32])
    return ["## Size", "", *_table(["file", "MB", "fp32, MB", "of fp32"], rows)]


def _crossed(report: CrossReport) -> list[str]:
    rows = []
    columns: tuple[Kind, ...] = (*DENSE, "elementwise", "roi_align")
    for pair in report.pairs:
        found = [pair.kinds.get(kind) for kind in columns]
        cells = ["" if kind is None else f"{kind.per_million:.2f}" for kind in found]
        promised = pair.promised
        rows.append(
            [f"{pair.first}, {pair.second}", *cells, f"{promised.per_million:.2f}", str(promised.max_step)]
        )
    head = ["", "convolutions", "linears", "adds", "RoIAlign", "the first three", "largest step of them"]
    return [
        f"## Every target against every other, {report.images} images",
        "",
        "Values of a million that differ, every layer given the integers of the quantized reference.",
        "",
        *_table(head, rows),
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
