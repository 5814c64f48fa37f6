"""Engines beside an artifact: found where they load, refused elsewhere with the command that builds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from qexport.engines import FOLDER, RECORD, DeviceIdentity, Engine, add_engine, find_engine, load_engines
from qexport.errors import ArtifactError
from qexport.files import sha256_file

if TYPE_CHECKING:
    from qexport.artifact import Artifact

ORIN = DeviceIdentity(library="tensorrt 10.3.0", gpu="Orin", compute_capability="8.7", driver="12.6")


@pytest.fixture
def beside(tensorrt_export: tuple[Artifact, Path], tmp_path: Path) -> tuple[Artifact, Path]:
    """Return an artifact, and a folder with an engine of it for an Orin."""
    artifact = tensorrt_export[0]
    path = tmp_path / FOLDER / "detector.int8.engine"
    path.parent.mkdir()
    path.write_bytes(b"an engine")
    add_engine(
        tmp_path,
        Engine(
            role="int8",
            source="int8",
            name=path.name,
            sha256=sha256_file(path),
            size_bytes=9,
            source_sha256=artifact.file("int8").sha256,
            built_for=ORIN,
            build_s=61.5,
            options={},
        ),
    )
    return artifact, tmp_path


def changed(folder: Path, **fields: object) -> None:
    (engine,) = load_engines(folder).engines
    add_engine(folder, msgspec.structs.replace(engine, **fields))


def test_engine_that_was_built_here_is_found(beside: tuple[Artifact, Path]) -> None:
    artifact, folder = beside
    assert find_engine(artifact, folder, "int8", ORIN).read_bytes() == b"an engine"


def test_engine_with_a_newer_driver_is_found(beside: tuple[Artifact, Path]) -> None:
    artifact, folder = beside
    newer = msgspec.structs.replace(ORIN, driver="13.0")
    assert find_engine(artifact, folder, "int8", newer).is_file()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda folder: (folder / FOLDER / "detector.int8.engine").write_bytes(b"an eng"),
            "changed or cut off",
        ),
        (
            lambda folder: (folder / FOLDER / "detector.int8.engine").unlink(),
            r"detector\.int8\.engine: missing",
        ),
        (lambda folder: (folder / FOLDER / RECORD).unlink(), "no int8 engine"),
        (
            lambda folder: changed(folder, source_sha256="0" * 64),
            r"built from another detector\.int8\.onnx than lies there",
        ),
        (
            lambda folder: changed(folder, built_for=DeviceIdentity(library="tensorrt_rtx 1.7.1")),
            r"loads only where it was built: TensorRT tensorrt_rtx 1\.7\.1, here tensorrt 10\.3\.0; "
            r"GPU none, here Orin; compute capability none, here 8\.7",
        ),
    ],
    ids=["cut off", "missing", "not recorded", "of another file", "of a machine without a GPU"],
)
def test_engine_that_cannot_be_used_says_why_and_names_the_command(
    spoil: Callable[[Path], object], said: str, beside: tuple[Artifact, Path]
) -> None:
    artifact, folder = beside
    spoil(folder)
    with pytest.raises(ArtifactError, match=said) as caught:
        find_engine(artifact, folder, "int8", ORIN)
    command = f"Build it here from detector.int8.onnx: qexport build {folder} --precision int8"
    assert str(caught.value).endswith(command)


def test_engine_of_a_role_that_was_not_built_names_that_role(beside: tuple[Artifact, Path]) -> None:
    artifact, folder = beside
    with pytest.raises(ArtifactError, match=r"no fp16 engine.*--precision fp16"):
        find_engine(artifact, folder, "fp16", ORIN)
    with pytest.raises(ArtifactError, match="no file of role 'int4'; it has int8, fp16, fp32"):
        find_engine(artifact, folder, "int4", ORIN)


def test_record_of_engines_keeps_one_of_each_role(beside: tuple[Artifact, Path]) -> None:
    _, folder = beside
    (engine,) = load_engines(folder).engines
    add_engine(folder, msgspec.structs.replace(engine, role="fp16", name="detector.fp16.engine"))
    changed_int8 = msgspec.structs.replace(engine, build_s=1.0)
    add_engine(folder, changed_int8)
    assert [one.role for one in load_engines(folder).engines] == ["fp16", "int8"]
    assert load_engines(folder).of("int8") == changed_int8
    assert load_engines(folder / "elsewhere").engines == ()


def test_record_of_engines_that_was_cut_off_is_refused(beside: tuple[Artifact, Path]) -> None:
    path = beside[1] / FOLDER / RECORD
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ArtifactError, match=r"engines\.json: not valid JSON"):
        load_engines(beside[1])
