"""`sensitivity`: which layers cost the accuracy, and the fastest configuration inside a budget."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from qexport.cli import options, screen, tables

if TYPE_CHECKING:
    from qexport.results import Interval
    from qexport.sensitivity_results import Point, SensitivityReport, UnitNoise

_SHOWN = 12
"""Units that the table has; all of them are in the file."""


def sensitivity(
    run: options.Run,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="NAME",
            show_default=False,
            help="Whose measured latency says what a float layer costs; `qexport bench` has to have timed it. Without "
            "it multiply-accumulates stand for time.",
        ),
    ] = None,
    by: Annotated[
        Literal["layer", "block", "stage"],
        typer.Option(
            "--by",
            help="What becomes float at a time: one layer, the layers of one name at the third level "
            "(backbone.body.layer1), or a stage.",
        ),
    ] = "block",
    split: Annotated[
        str | None,
        typer.Option(
            "--split",
            metavar="NAME",
            show_default=False,
            help="Split that mAP is measured on. Default: val where there is one, so that what is chosen was not "
            "chosen on the split that the report measures.",
        ),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            "--max-drop",
            metavar="POINTS",
            min=0.0,
            show_default=False,
            help="Find the fastest configuration whose VOC and COCO mAP fall by no more, in points of a hundred.",
        ),
    ] = None,
    below_noise: Annotated[
        bool,
        typer.Option("--below-noise", help="Search even for a drop that the split cannot tell from noise."),
    ] = False,
) -> None:
    """Say which layers cost the accuracy; find the fastest configuration inside a budget of it.

    Noise is measured at the outputs of RPN head and box head: with a unit quantized alone, and with it alone left
    float. With --max-drop, mAP is measured too, of as few configurations as it takes; each one once, whatever comes
    between. The choice is a table of encodings with float rows, which every target honours.

      qexport sensitivity runs/mine
      qexport sensitivity runs/mine --target onnx --max-drop 0.5
    """
    from qexport import pipeline  # noqa: PLC0415 - `--help` needs none of it
    from qexport.sensitivity import FOLDER, REPORT, measure_sensitivity  # noqa: PLC0415

    work = pipeline.resume(run, progress=screen.progress)
    found = measure_sensitivity(
        work,
        target=target,
        grain=by,
        split=split,
        max_drop=None if max_drop is None else max_drop / 100,
        below_noise=below_noise,
    )
    screen.show_table(_noise_table("stage", found.stages))
    screen.show_table(_noise_table(by, sorted(found.units, key=_loudness)[:_SHOWN], of=len(found.units)))
    screen.show_table(_point_table(found))
    for line in _sentences(found):
        screen.show(line)
    screen.show(f"wrote {run / REPORT}")
    if found.chosen is not None and found.points[found.chosen].keep_float:
        patterns = [word for path in found.points[found.chosen].keep_float for word in ("--keep-float", path)]
        screen.show(f"table of the choice: {run / FOLDER / 'encodings.json'}")
        screen.show(f"next: qexport calibrate {shlex.join([str(run), *patterns])}")
    tables.require_gates(found.gates)


def _noise_table(title: str, units: list[UnitNoise] | tuple[UnitNoise, ...], *, of: int = 0) -> Table:
    table = tables.make_table(title, ">quantized alone, dB", ">left float, dB", ">noise that goes", ">layers")
    for unit in units:
        table.add_row(
            escape(unit.name),
            _db(unit.alone_db),
            _db(unit.left_float_db),
            f"{100 * unit.share:.1f} %",
            str(unit.layers),
        )
    if of > len(units):
        table.caption = f"{len(units)} of {of}, loudest first"
    return table


def _point_table(found: SensitivityReport) -> Table:
    table = tables.make_table(
        "configuration",
        ">VOC mAP",
        ">drop",
        "95 %",
        ">COCO mAP",
        ">drop",
        "95 %",
        ">float MACs",
        ">latency ms",
    )
    for number, point in enumerate(found.points):
        table.add_row(
            ("all int8" if not point.units else f"{point.units} float")
            + (" *" if number == found.chosen else ""),
            f"{100 * point.voc_map50:.2f}",
            f"{100 * point.voc_drop:+.2f}",
            _interval(point.voc_drop_interval),
            f"{100 * point.coco_map:.2f}",
            f"{100 * point.coco_drop:+.2f}",
            _interval(point.coco_drop_interval),
            f"{100 * point.float_macs:.1f} %",
            "-" if point.latency_ms is None else f"{point.latency_ms:.2f}",
        )
    latency = f"; latency predicted from {found.target}'s layers" if found.target else ""
    table.caption = f"{found.dataset}/{found.split}, {found.images} images; points of 100{latency}"
    return table


def _sentences(found: SensitivityReport) -> list[str]:
    lines = [
        f"whole int8 detector: {_db(found.whole_db)} dB at the heads' outputs, {found.noise_images} images; this split "
        f"tells a drop of {100 * found.smallest_budget:.2f} points from noise"
    ]
    if found.chosen is not None:
        point = found.points[found.chosen]
        lines.append(f"chosen: {_describe(point)}; {len(found.points)} configurations were measured")
    elif found.max_drop is not None:
        nearest = min(found.points, key=lambda point: point.drop)
        lines.append(f"no configuration keeps {100 * found.max_drop:g} points; nearest: {_describe(nearest)}")
    return lines


def _describe(point: Point) -> str:
    what = ", ".join(point.keep_float) or "nothing"
    return f"{what} in float, drop {100 * point.drop:.2f} points"


def _loudness(unit: UnitNoise) -> float:
    return unit.alone_db if unit.alone_db is not None else float("inf")


def _db(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _interval(interval: Interval) -> str:
    return f"{100 * interval.low:+.2f} to {100 * interval.high:+.2f}"
