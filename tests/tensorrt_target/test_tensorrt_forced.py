"""TensorRT's network, evaluated, on inputs that are given: what it computed itself comes out again."""

from __future__ import annotations

from pathlib import Path

from conftest import Frame
from forced_fixtures import assert_forced_run_reproduces

from qexport.artifact import Artifact
from qexport.emulation.tensorrt import EvaluatedRunner


def test_run_forced_of_its_own_codes_reproduces_them(
    tensorrt_export: tuple[Artifact, Path], demo_frames: list[Frame]
) -> None:
    with EvaluatedRunner(tensorrt_export[1]) as runner:
        assert_forced_run_reproduces(runner, demo_frames[0])
