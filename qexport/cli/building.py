"""`build`: the engines of an artifact, on the machine that is to run them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qexport.cli import options, screen, tables
from qexport.errors import ArtifactError


def build(
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="Folder that `qexport export` wrote, RUN/tensorrt.")
    ],
    precision: Annotated[
        list[str] | None,
        typer.Option(
            "--precision",
            metavar="int8|fp16|fp32",
            show_default=False,
            help="Which engine, may be given several times. Default: int8.",
        ),
    ] = None,
    target_option: options.TargetOption = None,
) -> None:
    """Build TensorRT engines of an artifact's files for this machine: its TensorRT, its GPU, its driver.

    An engine loads where it was built and nowhere else; the files it is built from go everywhere. Needs no torch:
    this is the command for the board. With a DLA core, the float32 file and the calibration cache are taken.

      qexport build bccd/tensorrt
      qexport build bccd/tensorrt --precision int8 --precision fp16 -O tensorrt.workspace_mb=1024
      qexport build bccd/tensorrt -O tensorrt.dla_core=0
    """
    from qexport.artifact import load_artifact  # noqa: PLC0415 - `--help` needs none of it
    from qexport.runtimes.tensorrt_builder import build_from_file  # noqa: PLC0415
    from qexport.runtimes.tensorrt_library import load_library  # noqa: PLC0415
    from qexport.target import find_target  # noqa: PLC0415
    from qexport.target_options import BuildOptions, read_options  # noqa: PLC0415

    made, folder = load_artifact(artifact)
    chosen = read_options(find_target(made.target).options, made.target, target_option or ())
    if not isinstance(chosen, BuildOptions):
        raise ArtifactError(f"{folder}: target {made.target} has no engines; it runs as it was exported.")
    roles = list(dict.fromkeys(precision or ["int8"]))
    for role in roles:
        if not made.file(role).name.endswith((".onnx", ".network")):  # refused before anything is built
            raise ArtifactError(
                f"{folder}: {made.file(role).name} is no network; --precision takes int8, fp16 or fp32."
            )
    library = load_library()
    files = {file.role: file.name for file in made.files}
    with screen.progress("build engines", len(roles)) as step:
        for role in roles:
            build_from_file(library, folder, files, role, chosen)
            step()
    for sentence in tables.describe_engines(folder):
        screen.show(sentence)
