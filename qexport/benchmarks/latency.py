"""Latency of an artifact, whole and module by module, beside its baselines on the same machine.

Whole runs of the artifact, of its float baseline in the same runtime and of PyTorch eager take turns in one
process, so that a busy or throttled machine hits all alike. Kernels are timed by the runtime's own profiler
and summed by module path; what they do not add up to is shown, never spread over them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qexport.artifact import Artifact
from qexport.benchmarks.machine import describe_machine
from qexport.benchmarks.onnx_kernels import kernel_owners, kind_of_kernel
from qexport.errors import QexportError
from qexport.layers import STAGES, Kind, Layer, Stage, stage_of
from qexport.results import Gate, LatencyProfile, LatencyStats, LayerLatency
from qexport.runtimes.runner import ProfiledRun, Runner

if TYPE_CHECKING:
    from qexport.detectors.load import LoadedDetector

ARTIFACT, FP32, EAGER = "artifact", "fp32", "eager"
"""Keys of `LatencyProfile.whole`."""
GATE = "latency accounted"

_INT8_ROLE, _FP32_ROLE = "int8", "fp32"
_SETTLE_S = 0.005
"""Pause before each run with several threads: the pool of the runtime that ran last spins on for a few
milliseconds before it sleeps, and would take a core from the next."""


def measure_latency(
    *,
    artifact: Path,
    runner: type[Runner],
    detector: LoadedDetector | None,
    frame: NDArray[np.uint8],
    layers: Sequence[Layer],
    warmup: int,
    runs: int,
    threads: int,
    min_accounted: float,
    on_run: Callable[[], None] = lambda: None,
) -> LatencyProfile:
    """Measure an artifact and its baselines on one frame.

    Args:
        artifact: its folder.
        runner: the class that runs it.
        detector: the detector it was made from; None, as on a board without torch: no eager baseline.
        frame: (H, W, 3) uint8 RGB, of the size that the artifact declares.
        layers: the static detector's, for kinds and order.
        warmup: rounds that are not counted, of each measurement.
        runs: rounds that are.
        threads: threads within an operator, of every runtime.
        min_accounted: smallest share of a profiled run that its kernels must add up to, 0..1.
        on_run: called `count_steps` times, for a progress bar.

    Raises:
        QexportError: nothing would be measured with these numbers.
        DatasetError: the frame is not what the artifact takes.
        ArtifactError: the artifact is missing or edited, or its runtime refuses it.
        TargetUnavailable: the runtime is not installed.
    """
    _check(warmup, runs, threads)
    own_frame = np.array(frame)  # writable, as torch asks of an array that it shares
    with _torch_threads(detector, threads), ExitStack() as stack:
        int8 = stack.enter_context(runner(artifact, role=_INT8_ROLE, threads=threads))
        fp32 = None
        if _has_fp32(int8.artifact):
            fp32 = stack.enter_context(runner(artifact, role=_FP32_ROLE, threads=threads))
        contenders = _contenders(int8, fp32, detector, own_frame)
        settle_s = _SETTLE_S if threads > 1 else 0.0
        times = interleave(contenders, warmup=warmup, runs=runs, settle_s=settle_s, on_run=on_run)
        profile = profile_artifact(int8, own_frame, layers, warmup=warmup, runs=runs)
        _report(on_run, runs)
        baselines: dict[str, Mapping[str, float]] = {}
        if fp32 is not None:
            profiled = fp32.profile(fp32.input_of(own_frame), warmup=warmup, runs=runs)
            owners = _owners(fp32, profiled, list(profile.paths))
            baselines[FP32] = {path: cost.median_ms for path, cost in sum_by_path(profiled, owners).items()}
            _report(on_run, runs)
        if detector is not None:
            baselines[EAGER] = _profile_eager(
                detector, own_frame, list(profile.paths), warmup=warmup, runs=runs, on_run=on_run
            )
    whole = {name: summarise(values) for name, values in times.items()}
    return LatencyProfile(
        target=int8.artifact.target,
        artifact_sha256=int8.artifact.sha256,
        machine=describe_machine(),
        threads=threads,
        warmup=warmup,
        measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        whole=whole,
        fps=1000 / whole[ARTIFACT].p50_ms,
        layers=build_rows(profile.paths, layers, eager=baselines.get(EAGER), fp32=baselines.get(FP32)),
        profiled_whole_ms=profile.whole_ms,
        accounted_share=profile.accounted_share,
        gates=(_gate(profile.accounted_share, min_accounted, int8.artifact.target),),
    )


def count_steps(artifact: Artifact, *, eager: bool, warmup: int, runs: int) -> int:
    """Return how often `measure_latency` calls `on_run`: each round, and each counted profiled run."""
    return warmup + runs * (2 + eager + _has_fp32(artifact))


def summarise(times_ms: Sequence[float]) -> LatencyStats:
    """Return the statistics of repeated runs; the standard deviation is that of the runs themselves."""
    values = np.asarray(times_ms, dtype=np.float64)
    p50, p90, p99 = (float(value) for value in np.percentile(values, [50, 90, 99]))
    return LatencyStats(
        runs=len(values),
        mean_ms=float(values.mean()),
        std_ms=float(values.std()),
        min_ms=float(values.min()),
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
    )


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    *,
    warmup: int,
    runs: int,
    settle_s: float = 0.0,
    on_run: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Time contenders in turns; each round begins with the next one, so that none always follows another.

    Args:
        contenders: what to run, by name.
        warmup: rounds that are not counted.
        runs: rounds that are.
        settle_s: pause before each run, seconds.
        on_run: called after each round.

    Returns:
        By name, the times of the counted rounds in their order, ms.
    """
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + runs):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if settle_s:
                sleep(settle_s)
            start = perf_counter()
            contenders[name]()
            duration_ms = (perf_counter() - start) * 1e3
            if number >= warmup:
                times[name].append(duration_ms)
        on_run()
    return times


@dataclass(frozen=True, slots=True)
class PathCost:
    """What one module path costs in one runtime, all of its calls together."""

    median_ms: float
    """Median over the runs of the sum of its kernels."""
    kernels: Mapping[str, float]
    """By kernel type, the mean over the runs of the time of all its kernels of this type, ms."""


@dataclass(frozen=True, slots=True)
class ArtifactProfile:
    """The artifact under its runtime's profiler."""

    paths: Mapping[str, PathCost]
    """By module path, in the order in which they first ran."""
    whole_ms: float
    """Median of a whole run."""
    accounted_share: float
    """Median over the runs of the sum of all kernels over the whole."""


def profile_artifact(
    runner: Runner, frame: NDArray[np.uint8], layers: Sequence[Layer], *, warmup: int, runs: int
) -> ArtifactProfile:
    """Profile an artifact on one frame and sum its kernels by module path."""
    profiled = runner.profile(runner.input_of(frame), warmup=warmup, runs=runs)
    costs = sum_by_path(profiled, _owners(runner, profiled, None))
    return ArtifactProfile(
        paths={path: costs[path] for path in sorted(costs, key=_order_of(list(costs), layers))},
        whole_ms=median(run.whole_ms for run in profiled),
        accounted_share=accounted_share(profiled),
    )


def accounted_share(profiled: Sequence[ProfiledRun]) -> float:
    """Return the median over runs of the sum of the kernels over the whole."""
    return median(sum(kernel.duration_ms for kernel in run.kernels) / run.whole_ms for run in profiled)


def sum_by_path(profiled: Sequence[ProfiledRun], owners: Mapping[str, str]) -> dict[str, PathCost]:
    """Sum kernels by module path.

    Args:
        profiled: runs with every kernel timed.
        owners: module path of every kernel, by its name.
    """
    by_run: list[dict[str, float]] = []
    types: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for run in profiled:
        own: defaultdict[str, float] = defaultdict(float)
        for kernel in run.kernels:
            path = owners[kernel.name]
            own[path] += kernel.duration_ms
            types[path][kernel.kernel] += kernel.duration_ms / len(profiled)
        by_run.append(own)
    return {
        path: PathCost(median(own.get(path, 0.0) for own in by_run), dict(kernels))
        for path, kernels in types.items()
    }


def build_rows(
    paths: Mapping[str, PathCost],
    layers: Sequence[Layer],
    *,
    eager: Mapping[str, float] | None,
    fp32: Mapping[str, float] | None,
) -> tuple[LayerLatency, ...]:
    """Set the artifact's paths beside the baselines'.

    What only a baseline spends time on has a row too, with no kernels and 0 ms in the artifact.

    Args:
        paths: the artifact's, in order.
        layers: the static detector's, for the kinds.
        eager: by path, ms; None where it was not measured.
        fp32: likewise.
    """
    eager, fp32 = eager or {}, fp32 or {}
    nothing = PathCost(0.0, {})
    every = list(dict.fromkeys([*paths, *fp32, *eager]))
    rows = []
    for order, path in enumerate(every):
        cost, eager_ms = paths.get(path, nothing), eager.get(path)
        stage = stage_of(path)
        compared = bool(cost.kernels) and eager_ms
        rows.append(
            LayerLatency(
                order=order,
                path=path,
                stage=stage,
                kind=kind_of_path(path, stage, cost.kernels, layers),
                kernels=tuple(sorted(cost.kernels)),
                artifact_ms=cost.median_ms,
                eager_ms=eager_ms,
                fp32_ms=fp32.get(path),
                reduction_percent=100 * (1 - cost.median_ms / compared) if compared else None,
            )
        )
    return tuple(rows)


def kind_of_path(path: str, stage: Stage, kernels: Mapping[str, float], layers: Sequence[Layer]) -> Kind:
    """Return the one kind of a path: its layer's, else that of the kernel type that costs most.

    Args:
        path: module path.
        stage: its stage; RoIAlign is RoIAlign, whatever kernels a target makes of it.
        kernels: cost of each kernel type, ms.
        layers: the static detector's.
    """
    declared = {layer.kind for layer in layers if layer.path == path}
    if len(declared) == 1:
        return declared.pop()
    if stage == "roi_align":
        return "roi_align"
    costs: defaultdict[Kind, float] = defaultdict(float)
    for kernel, cost_ms in kernels.items():
        kind = kind_of_kernel(kernel)
        if not declared or kind in declared:
            costs[kind] += cost_ms
    return max(costs, key=lambda kind: costs[kind]) if costs else "other"


def _check(warmup: int, runs: int, threads: int) -> None:
    if warmup < 0 or runs < 1 or threads < 1:
        raise QexportError(
            f"latency: {runs} runs after {warmup} for warm-up with {threads} threads; expected at least "
            "1 run, 0 for warm-up and 1 thread."
        )


def _has_fp32(artifact: Artifact) -> bool:
    return any(file.role == _FP32_ROLE for file in artifact.files)


def _contenders(
    int8: Runner, fp32: Runner | None, detector: LoadedDetector | None, frame: NDArray[np.uint8]
) -> dict[str, Callable[[], object]]:
    contenders: dict[str, Callable[[], object]] = {ARTIFACT: lambda: int8.infer(frame)}
    if fp32 is not None:
        contenders[FP32] = lambda: fp32.infer(frame)
    if detector is not None:
        # A board has no torch: only the eager baseline imports it.
        from qexport.benchmarks.eager_profile import infer_eager  # noqa: PLC0415

        contenders[EAGER] = lambda: infer_eager(detector.module, frame)
    return contenders


@contextmanager
def _torch_threads(detector: LoadedDetector | None, threads: int) -> Iterator[None]:
    limit: AbstractContextManager[None] = nullcontext()
    if detector is not None:
        from qexport.benchmarks.eager_profile import torch_threads  # noqa: PLC0415

        limit = torch_threads(threads)
    with limit:
        yield


def _profile_eager(
    detector: LoadedDetector,
    frame: NDArray[np.uint8],
    rows: Sequence[str],
    *,
    warmup: int,
    runs: int,
    on_run: Callable[[], None],
) -> dict[str, float]:
    from qexport.benchmarks.eager_profile import profile_eager  # noqa: PLC0415

    return profile_eager(detector.module, frame, rows, warmup=warmup, runs=runs, on_run=on_run)


def _report(on_run: Callable[[], None], runs: int) -> None:
    """Report the runs of a profile, which ends as a whole."""
    for _ in range(runs):
        on_run()


def _owners(runner: Runner, profiled: Sequence[ProfiledRun], rows: Sequence[str] | None) -> dict[str, str]:
    """Return the module path of every kernel that ran."""
    owners = kernel_owners(runner.path, rows)
    missing = sorted({kernel.name for run in profiled for kernel in run.kernels} - owners.keys())
    if missing:
        raise QexportError(
            f"{runner.path}: kernel {missing[0]} was timed but is not in the graph that the runtime wrote "
            f"({len(missing)} such). This runtime is not one that qexport was tested with: see "
            "constraints.txt."
        )
    return owners


def _order_of(found: Sequence[str], layers: Sequence[Layer]) -> Callable[[str], tuple[int, int, int]]:
    """Return the sort key of paths: by stage, then as the detector runs them, then as the runtime does."""
    first: dict[str, int] = {}
    for layer in layers:
        first[layer.path] = min(layer.order, first.get(layer.path, layer.order))
    behind = max(first.values(), default=0) + 1
    return lambda path: (STAGES.index(stage_of(path)), first.get(path, behind), found.index(path))


def _gate(share: float, limit: float, target: str) -> Gate:
    return Gate(
        name=GATE,
        passed=share >= limit,
        measured=f"{share:.1%}".replace("%", " %"),
        limit=f"at least {limit:.1%}".replace("%", " %"),
        subject=target,
    )
