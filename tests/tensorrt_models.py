"""Small networks as ONNX files, copies of artifacts with one thing changed, and what TensorRT tests need to run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qexport.artifact import Artifact, describe_file, load_artifact, save_artifact
from qexport.runtimes.tensorrt_builder import BuiltEngine, EngineBuilder
from qexport.runtimes.tensorrt_library import RTX, installed_flavour, load_library
from qexport.target_options import BuildOptions

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
Size = int | str | None
Tensor = tuple[str, int, Sequence[Size]]

needs_builder = pytest.mark.skipif(
    installed_flavour() != RTX,
    reason="no builder that works without a GPU: pip install 'qexport[tensorrt-cpu]'",
)


def node(name: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> onnx.NodeProto:
    """Return the node `PATH/Operator`."""
    operator = name.rpartition("/")[2].partition("_")[0]
    return helper.make_node(operator, inputs, outputs, name=name, **attributes)


def write_model(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    constants: Mapping[str, NDArray[Any]] | None = None,
) -> Path:
    """Write an ONNX file of operator set 17."""
    graph = helper.make_graph(
        list(nodes),
        "network",
        [helper.make_tensor_value_info(*tensor) for tensor in inputs],
        [helper.make_tensor_value_info(*tensor) for tensor in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def write_relu(path: Path, shape: Sequence[Size] = (1, 3, 16, 16)) -> Path:
    """Write a network that builds in no time, `backbone.relu/Relu`."""
    return write_model(
        path, [node("backbone.relu/Relu", ["x"], ["y"])], [("x", FLOAT, shape)], [("y", FLOAT, shape)]
    )


def build(path: Path, options: BuildOptions | None = None) -> BuiltEngine:
    """Parse an ONNX file and build its engine."""
    builder = EngineBuilder(load_library())
    builder.parse(path)
    return builder.build(options or BuildOptions())


def edited_model(folder: Path, to: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """Return a copy of an artifact whose int8 .onnx is changed, its digest with it."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("engines"))
    artifact, _ = load_artifact(to)
    path = to / artifact.file("int8").name
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    files = tuple(describe_file(to, file.name, file.role) for file in artifact.files)
    return edited_manifest(to, lambda made: msgspec.structs.replace(made, files=files))


def edited_manifest(folder: Path, change: Callable[[Artifact], Artifact]) -> Path:
    """Change an artifact's manifest in its folder; return the folder."""
    artifact = msgspec.json.decode((folder / "artifact.json").read_bytes(), type=Artifact)
    save_artifact(change(artifact), folder)
    return folder


def constant(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    """Return a stored tensor."""
    return next(item for item in model.graph.initializer if item.name == name)


def change_constant(
    model: onnx.ModelProto, name: str, change: Callable[[NDArray[Any]], NDArray[Any]]
) -> None:
    """Replace the values of a stored tensor."""
    stored = constant(model, name)
    stored.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(stored).copy()), name))


def node_named(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    """Return a node."""
    return next(one for one in model.graph.node if one.name == name)


def maker_of(model: onnx.ModelProto, tensor: str) -> onnx.NodeProto:
    """Return the node that makes a tensor."""
    return next(one for one in model.graph.node if tensor in one.output)
