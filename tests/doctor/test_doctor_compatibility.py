from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from doctor_fixtures import ORIN, write_artifact, write_engine

from qexport.artifact import load_artifact
from qexport.doctor.compatibility import NO_GPU, Here, check_artifact, check_target
from qexport.doctor.findings import ArtifactFinding
from qexport.doctor.nvidia import Driver
from qexport.doctor.requirements import Ranges, installed_ranges, read_ranges
from qexport.doctor.tensorrt import Tensorrt
from qexport.engines import DeviceIdentity
from qexport.files import write_bytes
from qexport.runtimes.nvidia_device import NvidiaDevice
from qexport.target import find_target

NONE = Driver(None, None, (), "")
ORIN_DRIVER = Driver("12.6", "540.4.0", (NvidiaDevice("Orin", "8.7", "12.6", 8 << 30),), "")
TENSORRT_10 = Tensorrt(flavour="tensorrt", bindings="10.3.0", library="10.3.0")


def here(
    tensorrt: Tensorrt | None = TENSORRT_10, driver: Driver = ORIN_DRIVER, ranges: Ranges | None = None
) -> Here:
    return Here(ranges or installed_ranges(), tensorrt, driver, None)


def check(folder: Path, machine: Here) -> ArtifactFinding:
    return check_artifact(*load_artifact(folder), machine)


def engine_for(folder: Path, built_for: DeviceIdentity = ORIN) -> Path:
    write_engine(write_artifact(folder, "tensorrt"), built_for)
    return folder


def test_engine_built_on_this_machine_loads(tmp_path: Path) -> None:
    found = check(engine_for(tmp_path), here())
    assert found.here == ORIN
    assert [engine.loads for engine in found.engines] == [True]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gpu": "NVIDIA H100", "compute_capability": "9.0"}, "compute capability 9.0, here 8.7"),
        ({"library": "tensorrt 8.6.1"}, "TensorRT tensorrt 8.6.1, here tensorrt 10.3.0"),
        ({"library": "tensorrt_rtx 1.7.1.116", "gpu": "", "compute_capability": ""}, "GPU none, here Orin"),
    ],
)
def test_engine_built_elsewhere_does_not_load_and_names_the_build(
    tmp_path: Path, change: dict[str, str], words: str
) -> None:
    found = check(engine_for(tmp_path, msgspec.structs.replace(ORIN, **change)), here())
    (engine,) = found.engines
    assert not engine.loads
    assert words in engine.reason
    assert f"qexport build {tmp_path}" in engine.reason
    assert not found.runs
    assert engine.reason in found.problems


def test_engine_that_was_cut_off_does_not_load(tmp_path: Path) -> None:
    write_bytes(engine_for(tmp_path) / "engines" / "int8.engine", b"an eng")
    (engine,) = check(tmp_path, here()).engines
    assert not engine.loads
    assert "changed or cut off" in engine.reason


def test_artifact_without_an_engine_asks_for_its_build(tmp_path: Path) -> None:
    found = check(write_artifact(tmp_path, "tensorrt"), here())
    assert "no engine has been built" in found.problems
    assert f"qexport build {tmp_path}" in found.advice


def test_artifact_on_a_machine_without_gpu_says_so(tmp_path: Path) -> None:
    found = check(engine_for(tmp_path), here(driver=NONE))
    assert NO_GPU in found.problems
    assert "here none" in found.engines[0].reason


def test_artifact_of_onnx_needs_no_engine_and_no_gpu(tmp_path: Path) -> None:
    found = check(write_artifact(tmp_path, "onnx"), here(None, NONE))
    assert found.runs
    assert (found.problems, found.engines, found.advice) == ((), (), "")


def test_target_whose_tensorrt_only_builds_cannot_run_on_the_gpu(tmp_path: Path) -> None:
    rtx = Tensorrt(flavour="tensorrt_rtx", bindings="1.7.1.116", library="1.7.1")
    found = check_target(find_target("tensorrt"), here(rtx))
    assert "tensorrt_rtx 1.7.1.116 only builds" in found.ability("run").problems
    assert here(rtx).identity() == DeviceIdentity(library="tensorrt_rtx 1.7.1.116")


def test_target_whose_package_is_of_another_version_names_the_range() -> None:
    ranges = read_ranges(None, ['onnxruntime<0.9,>=0.8; extra == "onnx-runtime"'])
    found = check_target(find_target("onnx"), here(ranges=ranges)).ability("run")
    assert not found.possible
    assert found.problems[0].endswith("is installed, tested with >=0.8,<0.9")
    assert found.advice == "pip install 'qexport[onnx-runtime]'"


def test_target_with_a_range_for_each_ability_is_judged_by_its_own() -> None:
    lines = ['onnxruntime<0.9,>=0.8; extra == "all"', 'onnxruntime>=1; extra == "onnx-runtime"']
    found = check_target(find_target("onnx"), here(ranges=read_ranges(None, lines)))
    assert found.ability("run").possible
    assert not found.ability("export").possible
