"""`bench BUNDLE`: what a board measures. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich import box
from rich.table import Table

from qexport.cli import screen, tables
from qexport.target import latency_note

if TYPE_CHECKING:
    from qexport.measurement import Measurement

_SLOWEST = 10


def measure_bundle(
    path: Path,
    out: Path,
    *,
    runs: int,
    warmup: int,
    threads: int,
    min_accounted: float | None,
    given: Literal["device", "host", "emulated"] | None,
) -> None:
    """Measure a bundle here, write the measurement, show it, and ask its gates.

    Args:
        path: the bundle, its folder or archive.
        out: where the measurement goes.
        runs: measured runs.
        warmup: runs before them that do not count.
        threads: of the runtime.
        min_accounted: smallest share that the layers must add up to; None: 0.9.
        given: what the user says that this machine is.
    """
    from qexport import measuring  # noqa: PLC0415 - `--help` needs none of it
    from qexport.bundle import open_bundle, require_outside  # noqa: PLC0415
    from qexport.files import write_json  # noqa: PLC0415

    require_outside(path, out)
    measured_on = measuring.where_measured(given)
    screen.say(
        f"figures are marked as measured on: {measured_on}" + ("" if given else " (--measured-on changes it)")
    )
    with open_bundle(path) as bundle:
        steps = measuring.steps_of(bundle, warmup=warmup, runs=runs)
        with screen.progress("bench", steps) as step:
            measurement = measuring.measure(
                bundle,
                runs=runs,
                warmup=warmup,
                threads=threads,
                measured_on=measured_on,
                min_accounted=0.9 if min_accounted is None else min_accounted,
                on_step=step,
            )
    write_json(out, measurement)
    screen.show_table(_whole_table(measurement))
    screen.show_table(_layer_table(measurement))
    for line in _sentences(measurement):
        screen.show(line)
    screen.show(f"wrote {out}; on the workstation: qexport report RUN --merge {out.name}")
    tables.require_gates(measurement.profile.gates)


def _whole_table(measurement: Measurement) -> Table:
    """Return a row for each file that was run in turns, the verdict of the golden frames in each."""
    profile, memory = measurement.profile, {use.subject: use.peak_bytes for use in measurement.memory}
    verdict = measurement.golden.partition(":")[0]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    for column in ("subject", "p50 ms", "p90 ms", "p99 ms", "mean ms", "std ms", "peak MB", "golden"):
        table.add_column(column, justify="left" if column in ("subject", "golden") else "right")
    for subject, stats in profile.whole.items():
        times = (stats.p50_ms, stats.p90_ms, stats.p99_ms, stats.mean_ms, stats.std_ms)
        peak = f"{memory[subject] / 1e6:.0f}" if subject in memory else "-"
        shown = verdict if subject == "artifact" else "baseline"
        table.add_row(subject, *(f"{time:.2f}" for time in times), peak, shown)
    machine = profile.machine
    threads = f"{profile.threads} thread{'' if profile.threads == 1 else 's'}"
    note = latency_note(profile.target, machine.system)
    table.caption = (
        f"{machine.processor}, {machine.measured_on}, {threads}; "
        f"layers account for {100 * profile.accounted_share:.1f} %{'. ' if note else ''}{note}"
    )
    return table


def _layer_table(measurement: Measurement) -> Table:
    """Return the slowest layers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    for column in ("slowest layers", "stage", "ms", "float ms", "kernels"):
        table.add_column(column, justify="right" if column.endswith("ms") else "left", overflow="fold")
    rows = sorted(measurement.profile.layers, key=lambda row: -row.artifact_ms)
    for row in rows[:_SLOWEST]:
        fp32 = f"{row.fp32_ms:.3f}" if row.fp32_ms is not None else "-"
        table.add_row(row.path, row.stage, f"{row.artifact_ms:.3f}", fp32, ", ".join(row.kernels))
    table.caption = f"{min(_SLOWEST, len(rows))} of {len(rows)}; the rest is in the measurement"
    return table


def _sentences(measurement: Measurement) -> list[str]:
    """Return the verdicts, and the state of the board."""
    before, after = measurement.before, measurement.after
    lines = [measurement.golden, *(f"on the workstation: {text}" for text in measurement.verdicts.values())]
    lines.append(f"a fresh process has its first boxes after {measurement.cold_start_s:.2f} s")
    if before.temperatures_c:
        hottest = [max(state.temperatures_c.values()) for state in (before, after) if state.temperatures_c]
        lines.append("temperature before and after: " + ", ".join(f"{value:.1f} °C" for value in hottest))
    if after.throttled is not None:
        since = ", ".join(after.throttled_since_start) or "nothing"
        lines.append(f"throttling flags {after.throttled}; since the board was started: {since}")
    return lines
