"""Latency of an artifact, whole and module by module, beside its baselines on the same machine.

Whole runs of the artifact, of its float baseline in the same runtime and of PyTorch eager take turns in one
process, so that a busy or throttled machine hits all alike. Kernels are timed by the runtime's own profiler
and summed by module path; what they do not add up to is shown, never spread over them. Where a runtime cannot time
its kernels, whole runs are all there is, and the gate says so and why.
"""

from __future__ import annotations

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
from qexport.benchmarks.latency_rows import PathCost, build_rows, order_of, sum_by_path
from qexport.benchmarks.machine import describe_machine
from qexport.errors import QexportError
from qexport.layers import Layer
from qexport.results import Gate, LatencyProfile, LatencyStats, LayerLatency
from qexport.runtimes.runner import ProfiledRun, ProfilingRunner, SharedKernel

if TYPE_CHECKING:
    from qexport.detectors.load import LoadedDetector

ARTIFACT, FP32, EAGER = "artifact", "fp32", "eager"
"""Keys of `LatencyProfile.whole`."""
GATE = "latency accounted"

_INT8_ROLE, _FP32_ROLE = "int8", "fp32"
SETTLE_S = 0.1
"""Pause before each run with several threads: the pool of the runtime that ran last spins on for tens of
milliseconds before it sleeps, and would take a core from the next. Measured on two cores: with 10 ms between
runs a detector took 39 ms, with 30 ms or more 24 ms."""


def measure_latency(
    *,
    artifact: Path,
    runner: type[ProfilingRunner],
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
        if _has_fp32(int8.artifact, int8.folder):
            fp32 = stack.enter_context(runner(artifact, role=_FP32_ROLE, threads=threads))
        contenders = _contenders(int8, fp32, detector, own_frame)
        settle_s = SETTLE_S if threads > 1 else 0.0
        times = interleave(contenders, warmup=warmup, runs=runs, settle_s=settle_s, on_run=on_run)
        refusal = int8.profile_refusal()
        rows: tuple[LayerLatency, ...] = ()
        if refusal:
            profile = ArtifactProfile({}, median(times[ARTIFACT]), 0.0, 0.0, refusal)
            left_out = count_steps(
                int8.artifact, int8.folder, eager=detector is not None, warmup=0, runs=runs
            )
            _report(on_run, left_out - runs)
        else:
            profile = profile_artifact(int8, own_frame, layers, warmup=warmup, runs=runs)
            _report(on_run, runs)
            baselines = _Baselines(list(profile.paths), layers, warmup, runs, on_run)
            fp32_ms = baselines.runtime(fp32, own_frame) if fp32 is not None else None
            eager_ms = baselines.eager(detector, own_frame) if detector is not None else None
            rows = build_rows(profile.paths, layers, int8.kind_of, eager=eager_ms, fp32=fp32_ms)
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
        layers=rows,
        profiled_whole_ms=profile.whole_ms,
        accounted_share=profile.accounted_share,
        gates=(_gate(profile, min_accounted, int8.artifact.target),),
    )


def count_steps(artifact: Artifact, folder: Path, *, eager: bool, warmup: int, runs: int) -> int:
    """Return how often `measure_latency` calls `on_run`: each round, and each counted profiled run."""
    return warmup + runs * (2 + eager + _has_fp32(artifact, folder))


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
class ArtifactProfile:
    """The artifact under its runtime's profiler."""

    paths: Mapping[str, PathCost]
    """By module path, in the order in which they first ran."""
    whole_ms: float
    """Median of a whole run, less what the profiler itself takes between kernels."""
    between_ms: float
    """What the profiler takes between two kernels."""
    accounted_share: float
    """Median over the runs of the sum of all kernels over the whole, as above."""
    refusal: str = ""
    """Why no kernel was timed: then there are no paths, and the whole is that of runs without a profiler."""


def profile_artifact(
    runner: ProfilingRunner, frame: NDArray[np.uint8], layers: Sequence[Layer], *, warmup: int, runs: int
) -> ArtifactProfile:
    """Profile an artifact on one frame and sum its kernels by module path."""
    profiled = runner.profile(runner.input_of(frame), warmup=warmup, runs=runs)
    costs = sum_by_path(profiled, _owners(runner, profiled, None), layers)
    between_ms = runner.between_kernels_ms()
    return ArtifactProfile(
        paths={path: costs[path] for path in sorted(costs, key=order_of(list(costs), layers))},
        whole_ms=median(whole_to_explain_ms(run, between_ms) for run in profiled),
        between_ms=between_ms,
        accounted_share=accounted_share(profiled, between_ms),
    )


def accounted_share(profiled: Sequence[ProfiledRun], between_ms: float) -> float:
    """Return the median over runs of the sum of the kernels over `whole_to_explain_ms`, 0..1."""
    return median(_kernels_ms(run) / whole_to_explain_ms(run, between_ms) for run in profiled)


def whole_to_explain_ms(run: ProfiledRun, between_ms: float) -> float:
    """Return what the kernels of a profiled run must add up to: the run, less the profiler's own time.

    Args:
        run: a profiled run.
        between_ms: what the profiler takes between two kernels; never more than there is is taken off.
    """
    return max(_kernels_ms(run), run.whole_ms - between_ms * len(run.kernels))


def _kernels_ms(run: ProfiledRun) -> float:
    return sum(kernel.duration_ms for kernel in run.kernels)


def _check(warmup: int, runs: int, threads: int) -> None:
    if warmup < 0 or runs < 1 or threads < 1:
        raise QexportError(
            f"latency: {runs} runs after {warmup} for warm-up with {threads} threads; expected at least "
            "1 run, 0 for warm-up and 1 thread."
        )


def _has_fp32(artifact: Artifact, folder: Path) -> bool:
    return any(file.role == _FP32_ROLE and (folder / file.name).is_file() for file in artifact.files)


def _contenders(
    int8: ProfilingRunner,
    fp32: ProfilingRunner | None,
    detector: LoadedDetector | None,
    frame: NDArray[np.uint8],
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


@dataclass(frozen=True, slots=True)
class _Baselines:
    """Profiles what the artifact is set beside, by the artifact's paths."""

    paths: Sequence[str]
    layers: Sequence[Layer]
    warmup: int
    runs: int
    on_run: Callable[[], None]

    def runtime(self, runner: ProfilingRunner, frame: NDArray[np.uint8]) -> dict[str, float]:
        """Return the median ms of each path in the same runtime."""
        profiled = runner.profile(runner.input_of(frame), warmup=self.warmup, runs=self.runs)
        costs = sum_by_path(profiled, _owners(runner, profiled, self.paths), self.layers)
        _report(self.on_run, self.runs)
        return {path: cost.median_ms for path, cost in costs.items()}

    def eager(self, detector: LoadedDetector, frame: NDArray[np.uint8]) -> dict[str, float]:
        """Return the median ms of each path in PyTorch eager."""
        from qexport.benchmarks.eager_profile import profile_eager  # noqa: PLC0415

        return profile_eager(
            detector.module, frame, self.paths, warmup=self.warmup, runs=self.runs, on_run=self.on_run
        )


def _report(on_run: Callable[[], None], runs: int) -> None:
    """Report the runs of a profile, which ends as a whole."""
    for _ in range(runs):
        on_run()


def _owners(
    runner: ProfilingRunner, profiled: Sequence[ProfiledRun], rows: Sequence[str] | None
) -> Mapping[str, str | SharedKernel]:
    """Return the module path, or the several, of every kernel that ran."""
    owners = runner.kernel_owners(rows)
    missing = sorted({kernel.name for run in profiled for kernel in run.kernels} - owners.keys())
    if missing:
        raise QexportError(
            f"{runner.path}: kernel {missing[0]} was timed but is not in the graph that the runtime wrote "
            f"({len(missing)} such). This runtime is not one that qexport was tested with: see "
            "constraints.txt."
        )
    return owners


def _gate(profile: ArtifactProfile, limit: float, target: str) -> Gate:
    share, taken_off_us = 100 * profile.accounted_share, 1000 * profile.between_ms
    measured = f"{share:.1f} %, less {taken_off_us:.1f} us a kernel for the profiler"
    if profile.refusal:
        measured = f"whole runs alone, no layer was timed: {profile.refusal}"
    return Gate(
        name=GATE,
        passed=profile.accounted_share >= limit,
        measured=measured,
        limit=f"at least {100 * limit:.1f} %",
        subject=target,
    )
