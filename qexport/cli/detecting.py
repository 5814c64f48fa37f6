"""`detect`: use an artifact. Needs no torch: this is what runs on a board."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qexport.cli import screen


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
        typer.Argument(metavar="IMAGE|FOLDER", help="Images; of a folder, every image in it."),
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
            help="Write the boxes as JSON; as one line for each image where the name ends in .jsonl.",
        ),
    ] = None,
    threads: Annotated[
        int, typer.Option("--threads", metavar="N", min=1, help="Threads of the runtime.")
    ] = 1,
) -> None:
    r"""Run an artifact on images: label, score and box, in pixels of the image.

    ARTIFACT is a folder that `qexport export` wrote; an image of any size is scaled into its frame, its aspect kept.
    A bundle says itself whether it takes an image of another size.

      qexport detect runs/mine/onnx image.jpg
      qexport detect mine.qbundle image.jpg
      qexport detect runs/mine/onnx photos/ --out drawn/ --score 0.7 --json boxes.jsonl

    Needs no PyTorch: pip install 'qexport\[onnx-runtime]' is enough.
    """
    from qexport import detecting  # noqa: PLC0415 - `--help` needs none of it

    images = detecting.list_images(image)
    drawn = detecting.plan_drawings(images, out) if out is not None else {}
    found = []
    with screen.progress("detect", len(images)) as step, detecting.opened(artifact, threads) as ready:
        for path in images:
            one = detecting.detect(ready.runner, path.file, minimum_score=score, image_fit=ready.image_fit)
            found.append(one)
            if path in drawn:
                detecting.save_drawing(one, drawn[path])
            step()
    if json is not None:
        detecting.write_json_file(found, json)
    for one in found:
        screen.show(f"{one.image}: {len(one.boxes)} boxes")
        for box in one.boxes:
            corners = ", ".join(f"{value:.1f}" for value in box.xyxy)
            screen.show(f"  {box.label} {box.score:.3f}  ({corners})")
    for place in (out, json):
        if place is not None:
            screen.show(f"wrote {place}")
