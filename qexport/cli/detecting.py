"""`detect`: use an artifact. Needs no torch: this is what runs on a board."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qexport.cli import screen

if TYPE_CHECKING:
    from qexport.detecting import FoundImage

_INTERRUPTED = 130
"""128 + SIGINT: as for every command, but without the word that it goes on where it stopped."""


def detect(
    artifact: Annotated[
        Path,
        typer.Argument(
            metavar="ARTIFACT|BUNDLE",
            help="Folder that `qexport export` wrote, RUN/TARGET; or a bundle, its folder or archive.",
        ),
    ],
    image: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGE|FOLDER|VIDEO|CAMERA",
            help="Images; of a folder, every image in it; of a video, every frame; camera:0 or /dev/video0.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FOLDER", show_default=False, help="Draw the boxes and save the images here."
        ),
    ] = None,
    score: Annotated[
        float, typer.Option("--score", metavar="S", min=0.0, max=1.0, help="Lowest score of a box.")
    ] = 0.5,
    json: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            show_default=False,
            help="Write the boxes as JSON: where the name ends in .jsonl, or is - (standard output), one line at "
            "once for each image or frame; else one list at the end.",
        ),
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(
            "--every",
            metavar="N",
            min=1,
            show_default=False,
            help="Of a video or camera, draw every Nth frame.",
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            "--frames",
            metavar="N",
            min=1,
            show_default=False,
            help="Of a video or camera, stop after N frames.",
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            "--seconds",
            metavar="S",
            min=0.001,
            show_default=False,
            help="Of a video or camera, stop after S.",
        ),
    ] = None,
    threads: Annotated[
        int, typer.Option("--threads", metavar="N", min=1, help="Threads of the runtime.")
    ] = 1,
) -> None:
    r"""Run an artifact on images, a video or a camera: label, score and box, in pixels of the image.

    ARTIFACT is a folder that `qexport export` wrote; an image of any size is scaled into its frame, its aspect kept.
    A bundle says itself whether it takes an image of another size.

      qexport detect runs/mine/onnx image.jpg
      qexport detect mine.qbundle image.jpg
      qexport detect runs/mine/onnx photos/ --out drawn/ --score 0.7 --json boxes.jsonl
      qexport detect runs/mine/onnx clip.mp4 --out drawn/ --every 25
      qexport detect mine.qbundle camera:0 --json -

    Of a camera it takes the newest frame each time and skips those that came meanwhile; Ctrl-C ends it.

    Needs no PyTorch: pip install 'qexport\[onnx-runtime]' is enough, and 'qexport\[video]' for a video or camera.
    """
    from qexport import detecting, sources  # noqa: PLC0415 - `--help` needs none of it

    given = sources.list_sources(image)
    for option, value in (("--every", every), ("--frames", frames), ("--seconds", seconds)):
        if value is not None:
            sources.require_frames(given, option)
    drawn = sources.plan_drawings(given, out) if out is not None else {}
    if json is not None:
        detecting.require_json_name(json, given)
    to_pipe = json == detecting.STANDARD_OUTPUT  # where lines for people would be in the way
    done = 0
    try:
        with detecting.opened(artifact, threads) as ready, detecting.json_written(json) as write:
            taken = sources.pictures(
                given,
                ready.frame_px,
                drawings=drawn,
                every=every or 1,
                limits=sources.Limits(frames, seconds),
            )
            with closing(taken):
                for picture in taken:
                    one = detecting.detect(
                        ready.runner, picture, minimum_score=score, image_fit=ready.image_fit
                    )
                    write(one)
                    detecting.save_drawing(one, picture)
                    done += 1
                    if not to_pipe:
                        _show(str(picture), one)
    except KeyboardInterrupt:
        screen.say(f"stopped after {done} images or frames; what was found is written")
        raise typer.Exit(_INTERRUPTED) from None
    for place in (out, json):
        if place is not None and not to_pipe:
            screen.show(f"wrote {place}")


def _show(name: str, found: FoundImage) -> None:
    screen.show(f"{name}: {len(found.boxes)} boxes")
    for box in found.boxes:
        corners = ", ".join(f"{value:.1f}" for value in box.xyxy)
        screen.show(f"  {box.label} {box.score:.3f}  ({corners})")
