"""ONNX files read and extended without the onnx package, against the onnx package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from qexport.errors import ArtifactError
from qexport.runtimes.onnx_model import add_outputs, chain_of, read_nodes
from qexport.runtimes.onnx_session import make_session

SITE_COUNT = 3


@pytest.fixture(scope="module")
def model(demo_artifact: Path) -> bytes:
    return (demo_artifact / "detector.int8.onnx").read_bytes()


def test_nodes_of_a_detector_are_those_that_the_onnx_package_reads(model: bytes) -> None:
    wanted = [
        (node.name, node.op_type, tuple(node.input), tuple(node.output))
        for node in onnx.load_from_string(model).graph.node
    ]
    assert [(node.name, node.op_type, node.input, node.output) for node in read_nodes(model)] == wanted
    assert len(wanted) > 100


def test_added_outputs_stand_behind_those_there_were_and_change_nothing_else(model: bytes) -> None:
    before = onnx.load_from_string(model)
    tensors = [node.output[0] for node in before.graph.node[:SITE_COUNT]]
    after = onnx.load_from_string(add_outputs(model, [*tensors, tensors[0], "boxes"]))
    outputs = [output.name for output in after.graph.output]
    assert outputs == [*(output.name for output in before.graph.output), *tensors]
    del after.graph.output[-SITE_COUNT:]
    assert after == before


def test_chain_of_operators_is_valid_and_runs() -> None:
    chain = chain_of("Sin", 3)
    onnx.checker.check_model(onnx.load_from_string(chain), full_check=True)
    (found,) = make_session(chain).run(None, {"v0": np.ones(1, np.float32)})
    assert found == pytest.approx(np.sin(np.sin(np.sin(1.0))), abs=1e-6)


@pytest.mark.parametrize("length", [1, 1000, -1])
def test_model_that_is_cut_off_raises_artifact_error(length: int, model: bytes) -> None:
    with pytest.raises(ArtifactError, match="cut off"):
        read_nodes(model[:length])


def test_bytes_that_are_no_onnx_raise_artifact_error() -> None:
    with pytest.raises(ArtifactError, match="no ONNX"):
        read_nodes(b"\xff" * 64)
