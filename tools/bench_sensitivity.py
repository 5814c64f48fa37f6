"""Hold `qexport sensitivity` against the exhaustive search, on the demo detector calibrated too tightly.

    python tools/bench_sensitivity.py

Draws scenes, calibrates with `--observer percentile --percentile 99.8`, which costs points of mAP, and times the ONNX
target. The exhaustive search measures every subset of the loudest blocks in float, all others in int8; `sensitivity`
searches as a user's call does, over all blocks. Both predict latency from the same layers' times. Configurations that
were measured are kept in the run, so that the command goes on where it was stopped. Writes OUT/sensitivity.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from qexport import pipeline
from qexport.benchmarks.sensitivity import Unit
from qexport.detectors.demo.scenes import write_scenes
from qexport.errors import QexportError
from qexport.files import write_bytes
from qexport.sensitivity import Measuring, measure_sensitivity
from qexport.sensitivity_results import Point, SensitivityReport
from qexport.settings import Settings
from qexport.work import Work

TARGET, SPLIT, PERCENTILE = "onnx", "val", 99.8


@dataclass(frozen=True, slots=True)
class Row:
    """One budget: what the exhaustive search found, and what `sensitivity` chose with how many evaluations."""

    budget: float
    """As a fraction of mAP."""
    best: Point
    chosen: Point
    evaluations: int

    @property
    def latency_ratio(self) -> float:
        """The choice's latency over that of the exhaustive search's."""
        assert self.best.latency_ms is not None
        assert self.chosen.latency_ms is not None
        return self.chosen.latency_ms / self.best.latency_ms


def main() -> int:
    """Measure; return the exit code."""
    options = _options()
    console = Console(stderr=True)
    torch.set_num_threads(1)
    try:
        work = _work(options.out, options.images)
        budgets = [points / 100 for points in options.budgets]
        rows, every = measure(work, budgets, options.blocks, SPLIT, console)
        text = "\n".join(lines(rows, every)) + "\n"
        write_bytes(options.out / "sensitivity.md", text.encode())
    except QexportError as error:
        console.print(f"bench_sensitivity: {error}", style="red", markup=False)
        return error.exit_code
    sys.stdout.write(text)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[6, 5, 4, 3.5, 3, 2.5, 2], help="points of mAP"
    )
    parser.add_argument(
        "--blocks", type=int, default=8, help="loudest blocks, of which all subsets (default: 8)"
    )
    parser.add_argument("--images", type=int, default=64, help="of the validation split (default: 64)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/sensitivity"), help="default: runs/sensitivity"
    )
    options = parser.parse_args()
    if options.blocks < 1 or options.images < 1 or min(options.budgets) <= 0:
        parser.error("--blocks and --images are at least 1, --budgets above 0")
    return options


def _work(out: Path, images: int) -> Work:
    """Return the run that loses accuracy, timed; made now where it is not there."""
    data = out / "scenes"
    write_scenes(data, val=images)
    settings = Settings(
        model="demo", data=str(data), split=SPLIT, observer="percentile", percentile=PERCENTILE
    )
    work = pipeline.start(out / "run", settings)
    pipeline.calibrate(work)
    pipeline.export(work, TARGET)
    pipeline.compare(work, TARGET)
    pipeline.bench(work, TARGET)
    return work


def measure(
    work: Work, budgets: Sequence[float], blocks: int, split: str, console: Console
) -> tuple[list[Row], tuple[Point, ...]]:
    """Return a row for each budget, and what the exhaustive search measured.

    Raises:
        QexportError: a budget that no subset keeps.
    """
    reports = [
        measure_sensitivity(
            work, target=TARGET, grain="block", split=split, max_drop=budget, below_noise=True
        )
        for budget in budgets
    ]
    measuring = Measuring(work, target=TARGET, grain="block", split=split)
    units = loudest(measuring.units, reports[0], blocks)
    with Progress(console=console) as progress:
        task = progress.add_task(f"all subsets of {blocks} blocks", total=2 ** len(units))
        every = exhaust(units, measuring.point, lambda: progress.advance(task))
    rows = [
        Row(budget, cheapest(every, budget), _choice(report), len(report.points))
        for budget, report in zip(budgets, reports, strict=True)
    ]
    return rows, every


def loudest(units: Sequence[Unit], report: SensitivityReport, number: int) -> tuple[Unit, ...]:
    """Return the units that make most noise when they alone are quantized."""
    noise = {row.name: row.alone_db for row in report.units}
    return tuple(sorted(units, key=lambda unit: noise[unit.name] or 0.0)[:number])


def exhaust(
    units: Sequence[Unit], evaluate: Callable[[Sequence[Unit]], Point], on_point: Callable[[], None]
) -> tuple[Point, ...]:
    """Measure every subset of the units in float, the smaller ones first."""
    points = []
    for size in range(len(units) + 1):
        for chosen in combinations(units, size):
            points.append(evaluate(chosen))
            on_point()
    return tuple(points)


def cheapest(points: Sequence[Point], budget: float) -> Point:
    """Return the fastest point inside a budget.

    Raises:
        QexportError: there is none.
    """
    inside = [point for point in points if point.drop <= budget]
    if not inside:
        nearest = min(point.drop for point in points)
        raise QexportError(
            f"no subset of these blocks keeps {100 * budget:g} points, the nearest loses {100 * nearest:.2f}. "
            "Give more --blocks or a larger budget."
        )
    return min(inside, key=lambda point: point.latency_ms or 0.0)


def lines(rows: Sequence[Row], every: Sequence[Point]) -> list[str]:
    """Return the table."""
    head = [
        f"Exhaustive search: {len(every)} configurations. All int8 loses {100 * every[0].drop:.2f} points in "
        f"{every[0].latency_ms:.2f} ms.",
        "",
        "| budget, points | exhaustive: drop | ms | `sensitivity`: drop | ms | latency | evaluations |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    return head + [
        f"| {100 * row.budget:g} | {100 * row.best.drop:+.2f} | {row.best.latency_ms:.2f} | "
        f"{100 * row.chosen.drop:+.2f} | {row.chosen.latency_ms:.2f} | {100 * (row.latency_ratio - 1):+.1f} % | "
        f"{row.evaluations} of {len(every)} ({100 * row.evaluations / len(every):.0f} %) |"
        for row in rows
    ]


def _choice(report: SensitivityReport) -> Point:
    if report.chosen is None:
        nearest = min(point.drop for point in report.points)
        raise QexportError(f"sensitivity: nothing inside the budget, the nearest loses {100 * nearest:.2f}")
    return report.points[report.chosen]


if __name__ == "__main__":
    sys.exit(main())
