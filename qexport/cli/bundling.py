"""`bundle`: what a board needs of a run, in one folder and its archive."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qexport.cli import options, screen


def bundle(
    run: options.Run,
    target: options.OneTarget,
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="BUNDLE", help="Folder of the bundle; its archive has .tar behind the name."
        ),
    ],
    frames: Annotated[
        int,
        typer.Option("--frames", metavar="N", min=1, help="Golden frames, of the split that was evaluated."),
    ] = 2,
    with_baseline: Annotated[
        bool,
        typer.Option(
            "--with-baseline", help="Take the float32 file along, for `qexport bench` to measure beside."
        ),
    ] = False,
    other_sizes: Annotated[
        Literal["letterbox", "refuse"],
        typer.Option(
            "--other-sizes",
            help="What becomes of an image that has not the frame's size: scaled with its aspect kept and padded, or "
            "refused.",
        ),
    ] = "letterbox",
) -> None:
    """Pack a target's artifact for a board, with qexport itself and golden tensors to verify it by.

    The folder and its archive hold the same. On the board: tar xf mine.qbundle.tar, sh mine.qbundle/install.sh.
    Golden frames are images of the data set: whoever has the bundle has them. Needs no torch.

      qexport bundle runs/mine --target onnx --out mine.qbundle
      qexport bundle runs/mine --target onnx --out mine.qbundle --with-baseline --frames 4
    """
    from qexport.bundling import write_bundle  # noqa: PLC0415 - `--help` needs none of it

    with screen.progress("bundle", frames + 1) as step:
        written = write_bundle(
            run, target, out, frames=frames, baseline=with_baseline, image_fit=other_sizes, on_step=step
        )
    for part, what in (
        ("artifact/", "artifact"),
        ("golden/", f"{frames} golden frames"),
        ("wheel/", "qexport"),
    ):
        screen.show(f"{what}: {written.size_bytes(part) / 1e6:.2f} MB")
    for verdict in written.manifest.verdicts.values():
        screen.show(verdict)
    screen.show(f"wrote {written.folder}")
    screen.show(f"wrote {written.archive}: {written.archive.stat().st_size / 1e6:.2f} MB")
    screen.show(
        f"on the board: tar xf {written.archive.name} && sh {written.folder.name}/install.sh; it verifies too"
    )
