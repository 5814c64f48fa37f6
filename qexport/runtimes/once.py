"""`python -m qexport.runtimes.once ARTIFACT [ROLE]`: load an artifact, run one frame, end.

A process that does nothing else, so that its peak memory is the memory of inference.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np

from qexport.artifact import load_artifact
from qexport.target import find_target


def main(arguments: list[str]) -> None:
    """Run one blank frame through the artifact."""
    folder, role = Path(arguments[0]), (arguments[1] if len(arguments) > 1 else "int8")
    artifact, _ = load_artifact(folder)
    runner = importlib.import_module(f"qexport.runtimes.{find_target(artifact.target).runtime}").RUNNER
    frame = np.zeros((artifact.input.frame_height_px, artifact.input.frame_width_px, 3), np.uint8)
    with runner(folder, role=role) as session:
        session.infer(frame)


if __name__ == "__main__":
    main(sys.argv[1:])
