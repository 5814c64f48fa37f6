"""TFLite on inputs that are given: what it computed itself comes out again, whichever kernels run."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from conftest import Frame
from forced_fixtures import assert_forced_run_reproduces

pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed (the extra tflite)")

from qexport.detectors.load import LoadedDetector
from qexport.encodings import Encodings
from qexport.errors import ArtifactError
from qexport.exporters.tflite import export
from qexport.quantization.reference import QuantizedDetector
from qexport.runtimes.tflite import BuiltinTfliteRunner, TfliteRunner
from qexport.target_options import TfliteOptions


@pytest.fixture(scope="module")
def folder(
    demo: LoadedDetector,
    demo_quantized: QuantizedDetector,
    demo_encodings: Encodings,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    made = tmp_path_factory.mktemp("tflite-forced")
    export(demo_quantized, demo_encodings, made, labels=demo.labels, options=TfliteOptions())
    return made


@pytest.mark.parametrize("kind", [TfliteRunner, BuiltinTfliteRunner])
def test_run_forced_of_its_own_codes_reproduces_them(
    kind: type[TfliteRunner], folder: Path, demo_frames: list[Frame]
) -> None:
    with kind(folder) as runner:
        assert_forced_run_reproduces(runner, demo_frames[0])


def test_run_forced_at_a_tensor_that_the_file_lacks_is_refused(
    folder: Path, demo_frames: list[Frame]
) -> None:
    with TfliteRunner(folder) as runner:
        first, *rest = runner.artifact.sites
        strange = msgspec.structs.replace(first, tensor="elsewhere")
        runner.artifact = msgspec.structs.replace(runner.artifact, sites=(strange, *rest))
        with pytest.raises(ArtifactError, match="no operator writes tensor elsewhere"):
            runner.run_forced(runner.input_of(demo_frames[0]), {}, None)  # type: ignore[arg-type]
