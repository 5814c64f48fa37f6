"""`mend`: have accuracy back without training."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from qexport.cli import options, qat_options, screen, tables


def mend(
    run: options.Run,
    equalize: Annotated[
        bool,
        typer.Option(
            "--equalize", help="Bring the channels between two layers to ranges that one scale can hold."
        ),
    ] = False,
    learn_rounding: Annotated[
        bool,
        typer.Option(
            "--learn-rounding",
            help="Round each weight to that neighbouring code which keeps its layer's output.",
        ),
    ] = False,
    correct_bias: Annotated[
        bool,
        typer.Option("--correct-bias", help="Take away what quantization adds to the mean of each channel."),
    ] = False,
    images: Annotated[
        int,
        typer.Option(
            "--images",
            metavar="N",
            min=1,
            help="Calibration images that are looked at; as many others measure what it gave.",
        ),
    ] = 8,
) -> None:
    """Have accuracy back without training: weights and scales that quantize better.

    Without an option all means are taken, one after another. Each is measured on calibration images that none of them
    saw. The result is a checkpoint that holds its encodings, and goes through a run like one from training:

      qexport mend runs/mine
      qexport run --qat runs/mine/mended/mended.pt --model model.py:build --weights weights.pt --data dataset/
        --target onnx --out runs/b

    With --weights accuracy is held to the detector before.
    """
    from qexport import mending, pipeline  # noqa: PLC0415 - `--help` needs none of it

    work = pipeline.resume(run, progress=screen.progress)
    asked = {"equalize": equalize, "learn-rounding": learn_rounding, "correct-bias": correct_bias}
    chosen = [means for means in mending.MEANS if asked[means] or not any(asked.values())]
    report, path = mending.mend(work, chosen, images=images)
    table = tables.make_table("means", ">signal to noise, dB", ">gain, dB", "changed")
    before = report.results[0].sqnr_db
    for result in report.results:
        table.add_row(
            result.means, f"{result.sqnr_db:.2f}", f"{result.sqnr_db - before:+.2f}", result.changed
        )
    table.caption = f"at the heads' outputs, on {report.held_out} calibration images that no means saw"
    screen.show_table(table)
    screen.show(f"wrote {path}")
    settings = msgspec.structs.replace(work.settings, keep_float=work.encodings.keep_float)
    screen.show(f"next: {qat_options.following_run(path, settings, out='runs/mended')}")
