"""The bench of `sensitivity`: every subset is measured once, the fastest inside a budget is found, a small run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from cli_fixtures import copied, place
from rich.console import Console

from qexport import pipeline
from qexport.benchmarks.sensitivity import Unit
from qexport.errors import QexportError
from qexport.results import Interval
from qexport.sensitivity_results import Point

TOOLS = Path(__file__).parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

from bench_sensitivity import Row, cheapest, exhaust, lines, measure  # noqa: E402 - the tools are no package

__all__ = ["copied", "place"]

NONE = Interval(low=0.0, high=0.0, level=0.95)
UNITS = tuple(Unit(name, "trunk", (name,), (name,), macs=1, weight_bytes=1) for name in "abc")


def point_of(names: Sequence[str], drop: float, latency_ms: float) -> Point:
    return Point(
        keep_float=tuple(names),
        units=len(names),
        voc_map50=1 - drop,
        coco_map=1 - drop,
        voc_drop=drop,
        coco_drop=drop / 2,
        voc_drop_interval=NONE,
        coco_drop_interval=NONE,
        float_macs=0.0,
        weight_bytes=0,
        latency_ms=latency_ms,
    )


def test_exhaust_measures_every_subset_once() -> None:
    found = exhaust(UNITS, lambda units: point_of([unit.name for unit in units], 0.0, 1.0), lambda: None)
    assert len(found) == len({point.keep_float for point in found}) == 8
    assert found[0].keep_float == ()
    assert found[-1].keep_float == ("a", "b", "c")


def test_cheapest_is_the_fastest_inside_the_budget_and_nothing_inside_is_said() -> None:
    points = [point_of("", 0.05, 1.0), point_of("a", 0.02, 3.0), point_of("b", 0.01, 2.0)]
    assert cheapest(points, 0.02).keep_float == ("b",)
    assert cheapest(points, 0.05).keep_float == ()
    with pytest.raises(QexportError, match=r"keeps 0\.5 points, the nearest loses 1\.00"):
        cheapest(points, 0.005)


def test_lines_show_both_choices_and_what_they_took() -> None:
    row = Row(0.02, best=point_of("a", 0.015, 2.0), chosen=point_of("b", 0.016, 2.1), evaluations=2)
    assert lines([row], [point_of("", 0.05, 1.0)] * 16)[-1] == (
        "| 2 | +1.50 | 2.00 | +1.60 | 2.10 | +5.0 % | 2 of 16 (12 %) |"
    )


def test_measure_holds_the_search_of_a_run_against_all_subsets(copied: Path) -> None:
    work = pipeline.resume(Path("mine"))
    (row,), every = measure(work, [0.5], 2, "train", Console(quiet=True))
    assert len(every) == 4
    assert row.best == row.chosen == every[0]
    assert row.evaluations == 1
