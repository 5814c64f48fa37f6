"""The calibration cache: float32 to the last bit, tensors of the float network, another model's refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorrt_models import needs_builder

from qexport.errors import ArtifactError
from qexport.quantization.graph import scale_of
from qexport.runtimes.calibration_cache import (
    FILE_NAME,
    cache_calibrator,
    check_cache,
    read_cache,
    write_cache,
)
from qexport.runtimes.tensorrt_builder import EngineBuilder
from qexport.runtimes.tensorrt_library import load_library

if TYPE_CHECKING:
    from qexport.artifact import Artifact
    from qexport.quantization.reference import QuantizedDetector

SCALES = {"frame": 1.0, "backbone.body.conv1/Conv/output": 0.1, "a: b": 2**-20}


@given(
    st.dictionaries(
        st.text("abc./@:_ 09", min_size=1).map(str.strip).filter(bool), st.floats(2**-100, 2**100, width=32)
    )
)
def test_cache_written_and_read_gives_every_bit_of_every_scale(scales: dict[str, float]) -> None:
    assert read_cache(write_cache(scales)) == scales


def test_cache_has_a_header_and_a_line_for_each_tensor() -> None:
    assert write_cache({"x": 1.0, "y": 0.1}) == "TRT-8502-EntropyCalibration2\nx: 3f800000\ny: 3dcccccd\n"
    assert read_cache(write_cache(SCALES))["backbone.body.conv1/Conv/output"] == float(np.float32(0.1))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"begins with TRT-8502-EntropyCalibration2, this one with ''"),
        ("TRT-8502-MinMaxCalibration\nx: 3f800000\n", "this one with 'TRT-8502-MinMaxCalibration'"),
        ("x: 3f800000\n", "this one with 'x: 3f800000'"),
        ("TRT-8502-EntropyCalibration2\nx: 3f800000\ny: 3dcc", r"line 3: 'y: 3dcc' is no .*Export again"),
        ("TRT-8502-EntropyCalibration2\nbackbone.bo", r"line 2: 'backbone\.bo' is no `TENSOR: SCALE`"),
    ],
    ids=["empty", "another calibrator", "no header", "cut in a scale", "cut in a name"],
)
def test_cache_that_is_none_or_was_cut_off_is_refused_with_its_line(text: str, said: str) -> None:
    with pytest.raises(ArtifactError, match=said):
        read_cache(text)


def test_cache_of_another_model_names_its_tensors() -> None:
    with pytest.raises(
        ArtifactError, match=r"c: .*another model: 2 of its 3 tensors .*backbone.*Export again"
    ):
        check_cache(SCALES, {"frame"}, Path("c"))
    with pytest.raises(ArtifactError, match="another model: 0 of its 0"):
        check_cache({}, {"frame"}, Path("c"))
    check_cache(SCALES, {*SCALES, "more"}, Path("c"))


def calibrating(version: str) -> Any:
    """Return a TensorRT that still calibrates, of a version."""

    class Parent:
        pass

    return SimpleNamespace(__version__=version, IInt8EntropyCalibrator2=Parent)


@pytest.mark.parametrize(
    ("version", "number"), [("8.5.2.2", 8502), ("8.2.1", 8201), ("10.3.0", 100300), ("10.3.0.30", 100300)]
)
def test_calibrator_gives_the_cache_in_the_name_of_the_tensorrt_that_asks(
    version: str, number: int, tmp_path: Path
) -> None:
    path = tmp_path / FILE_NAME
    path.write_text(write_cache(SCALES))
    calibrator = cache_calibrator(calibrating(version), path, SCALES.keys())
    first, *lines = calibrator.read_calibration_cache().decode().splitlines()
    assert first == f"TRT-{number}-EntropyCalibration2"
    assert lines == write_cache(SCALES).splitlines()[1:]
    # It answers from the cache, never from images.
    assert (calibrator.get_batch_size(), calibrator.get_batch(["frame"])) == (1, None)
    calibrator.write_calibration_cache(b"another")
    assert path.read_text() == write_cache(SCALES)


def test_calibrator_of_another_models_cache_is_refused(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    path.write_text(write_cache(SCALES))
    with pytest.raises(ArtifactError, match="the calibration cache of another model"):
        cache_calibrator(calibrating("8.5.2"), path, {"frame"})


@needs_builder
def test_cache_of_an_artifact_names_tensors_of_its_float_file_with_the_scales_of_the_table(
    tensorrt_export: tuple[Artifact, Path], demo_quantized: QuantizedDetector
) -> None:
    artifact, folder = tensorrt_export
    scales = read_cache((folder / artifact.file("calibration-cache").name).read_text())
    builder = EngineBuilder(load_library())  # the network lives as long
    network = builder.parse(folder / artifact.file("fp32").name)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    made = {layer.get_output(port).name for layer in layers for port in range(layer.num_outputs)}
    check_cache(scales, made, folder)
    decided = {float(np.float32(scale_of(node))) for node in demo_quantized.quantize_nodes.values()}
    assert set(scales.values()) == decided
    # Two rows may be of one tensor; no tensor is left out.
    assert len(scales) > 0.8 * len(demo_quantized.quantize_nodes)
    relu = "backbone.body.layer1.0.relu/Relu/output"
    row = demo_quantized.quantize_nodes["backbone.body.layer1.0.conv1@0/output:conv2d"]
    assert scales[relu] == float(np.float32(scale_of(row)))
