"""`verify`: whether this machine computes what the workstation did. Needs no torch: this is what runs on a board."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qexport.cli import screen


def verify(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="What `qexport bundle` wrote, the folder or the archive.")
    ],
    threads: Annotated[
        int, typer.Option("--threads", metavar="N", min=1, help="Threads of the runtime.")
    ] = 1,
    tolerance_steps: Annotated[
        int | None,
        typer.Option(
            "--tolerance-steps",
            metavar="N",
            min=0,
            show_default=False,
            help="Pass layers that differ by at most so many quantization steps, where the detections keep number and "
            "labels. Default: every bit has to be the same.",
        ),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", show_default=False, help="Write what was found as JSON."),
    ] = None,
) -> None:
    """Run a bundle's golden frames here: bit-identical, or where and by how much it differs, layer by layer.

    Exit codes: 0 nothing differs; 1 something does, and where it begins is named; 2 the bundle was changed, is not
    whole, or of a newer format; 3 the runtime is not installed.

      qexport verify mine.qbundle
      qexport verify mine.qbundle.tar --json verified.json
    """
    from qexport import verifying  # noqa: PLC0415 - `--help` needs none of it
    from qexport.bundle import open_bundle, require_outside  # noqa: PLC0415
    from qexport.errors import ParityError  # noqa: PLC0415
    from qexport.files import write_json  # noqa: PLC0415

    if json is not None:
        require_outside(bundle, json)
    with open_bundle(bundle) as opened, screen.progress("verify", len(opened.manifest.golden)) as step:
        report = verifying.verify(opened, threads=threads, tolerance_steps=tolerance_steps, on_frame=step)
        stated = list(opened.manifest.verdicts.values())
    if json is not None:
        write_json(json, report)
    for line in verifying.describe(report):
        screen.show(line)
    for verdict in stated:
        screen.show(f"on the workstation: {verdict}")
    if report.verdict == "differs":
        raise ParityError(verifying.summary(report))
