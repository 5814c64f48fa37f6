"""`report` and `targets`: what a run came to, and what this machine can do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qexport.cli import screen, tables
from qexport.errors import QexportError


def report(
    run: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders that `qexport run` made.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FOLDER",
            show_default=False,
            help="Where the table of several runs goes. Default: the current folder.",
        ),
    ] = None,
    merge: Annotated[
        Path | None,
        typer.Option(
            "--merge",
            metavar="FILE...",
            show_default=False,
            help="Files of one measurement that a board made, all that follow: what `qexport bench BUNDLE` or "
            "deploy/jetson/measure.sh wrote there.",
        ),
    ] = None,
) -> None:
    """Write the report of a run from what has been measured; of several runs, one table of them all.

    A stage that has not run is named in the report, with its command. Nothing is measured here.

    What was measured on a board is merged: its latency stands in the report beside the parity verdict, marked as
    the device's, under the same module paths. Files of another engine or artifact are refused.

      qexport report runs/mine
      qexport report runs/mine --merge measurement.json
      qexport report runs/mine --merge results/times.json results/profile.json results/layers.json results/board.json
      qexport report runs/min-max runs/mse --out runs/compared
    """
    from qexport import pipeline  # noqa: PLC0415 - `--help` needs none of it

    if merge is not None:
        screen.show(f"merged: {pipeline.merge(run[0], [merge, *run[1:]])}")
        run = run[:1]
    if len(run) == 1:
        if out is not None:
            raise QexportError("--out is for several runs; the report of one lies in its folder.")
        files = pipeline.report(run[0])
        screen.show(f"report: {files.html}")
        return
    written = pipeline.report_experiments(run, out or Path())
    screen.show(f"table: {written.html}, {written.csv}")


def targets() -> None:
    """List the runtimes qexport lowers to, and what each needs on this machine.

    `export` makes an artifact, `run` uses one, `measure` compares and times it. Below, what one target alone can
    choose, given as -O TARGET.NAME=VALUE to `run`, `inspect`, `export` and `build`.

      qexport targets
    """
    screen.show_table(tables.target_table())
    screen.show_table(tables.target_option_table())
