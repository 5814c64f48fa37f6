"""A bundle of a finished run of the demo detector, made once a session, and copies of it that may be spoilt."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qexport.bundle import ARTIFACT, MANIFEST, SUMS, BundleManifest
from qexport.bundling import WrittenBundle, write_bundle
from qexport.bundling.write import seal

CHANGED_LAYER = "backbone.body.layer2.0.conv1"


@pytest.fixture(scope="session")
def bundled(place: Path, tmp_path_factory: pytest.TempPathFactory) -> WrittenBundle:
    """The bundle with its float baseline; not to be changed."""
    out = tmp_path_factory.mktemp("bundled") / "demo.qbundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)  # the run's data set is given relative to this folder
        return write_bundle(Path("mine"), "onnx", out, baseline=True)


@pytest.fixture
def spoilt(bundled: WrittenBundle, tmp_path: Path) -> Path:
    """A copy of the bundle's folder that may be changed."""
    return Path(shutil.copytree(bundled.folder, tmp_path / "demo.qbundle"))


def reseal(folder: Path) -> None:
    """Write manifest and sums anew, as somebody would who changes a bundle and knows how."""
    manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=BundleManifest)
    for name in (MANIFEST, SUMS):
        (folder / name).unlink()
    seal(folder, manifest)


def change_weight(folder: Path, layer: str = CHANGED_LAYER) -> None:
    """Make one weight of a layer another, in the artifact of a bundle, and everything else agree with it."""
    path = folder / ARTIFACT / "detector.int8.onnx"
    model = onnx.load(path)
    name = f"{layer}/DequantizeLinear/input_0"
    weights = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    values = np.array(numpy_helper.to_array(weights))
    values.flat[0] += 60 if values.flat[0] < 0 else -60
    weights.CopyFrom(numpy_helper.from_array(values, name))
    edit_file(path, lambda _: model.SerializeToString())


def edit_file(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a file of a bundle's artifact, its digest in artifact.json and the bundle's own."""
    from qexport.artifact import MANIFEST as ARTIFACT_MANIFEST  # noqa: PLC0415
    from qexport.artifact import Artifact, describe_file, save_artifact  # noqa: PLC0415

    path.write_bytes(change(path.read_bytes()))
    folder = path.parent
    artifact = msgspec.json.decode((folder / ARTIFACT_MANIFEST).read_bytes(), type=Artifact)
    files = tuple(
        describe_file(folder, file.name, file.role) if file.name == path.name else file
        for file in artifact.files
    )
    save_artifact(msgspec.structs.replace(artifact, files=files), folder)
    reseal(folder.parent)
