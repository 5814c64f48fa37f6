from __future__ import annotations

from pathlib import Path

import pytest
from doctor_fixtures import TENSORRT, doctor

from qexport.doctor.jetson import Jetson
from qexport.doctor.requirements import installed_ranges
from qexport.doctor.tensorrt import Tensorrt, find_tensorrt, library_files, library_version, tensorrt_findings
from qexport.runtimes.tensorrt_library import installed_flavour

# Bindings whose tables are shifted: a convolution is asked for, a deconvolution comes back.
SHIFTED = """
import types
__version__ = "11.4.0"
float32 = object()
class _Names(str): pass
class LayerType: CONVOLUTION, POOLING = "CONVOLUTION", "POOLING"
class PoolingType: MAX = 0
class NetworkDefinitionCreationFlag: __members__ = {}
class Logger:
    INTERNAL_ERROR = 0
    def __init__(self, level): pass
class _Network:
    num_layers = 1
    def add_input(self, *given): return object()
    def add_convolution_nd(self, *given): return object()
    def add_pooling_nd(self, *given): return None
    def get_layer(self, index):
        output = types.SimpleNamespace(shape=(1, 8, 18, 18))
        return types.SimpleNamespace(type="DECONVOLUTION", get_output=lambda _: output)
class Builder:
    def __init__(self, logger): pass
    def create_network(self, flags): return _Network()
"""
# What pybind11 raises where a classic TensorRT finds no GPU.
WITHOUT_GPU = SHIFTED.replace(
    "def __init__(self, logger): pass",
    "def __init__(self, logger): raise TypeError('pybind11::init(): factory function returned nullptr')",
)


def bindings(folder: Path, code: str) -> Path:
    (folder / "tensorrt").mkdir()
    (folder / "tensorrt" / "__init__.py").write_text(code)
    return folder


@pytest.mark.parametrize(
    ("number", "version"), [(8205, "8.2.5"), (8502, "8.5.2"), (100300, "10.3.0"), (10701, "1.7.1")]
)
def test_library_number_of_each_generation_is_its_version(number: int, version: str) -> None:
    assert library_version(number) == version


@pytest.mark.skipif(
    installed_flavour() != "tensorrt_rtx", reason="the builder that needs no GPU is not installed"
)
def test_tensorrt_that_is_installed_says_its_bindings_and_its_library() -> None:
    found = find_tensorrt()
    assert found is not None
    assert found.error == ""
    assert found.bindings.startswith(f"{found.library}.")
    assert found.name == f"tensorrt_rtx {found.bindings}"


def test_tensorrt_absent_is_missing_and_harms_only_its_targets() -> None:
    found = doctor("--json", hidden=TENSORRT)
    row = found.row("TensorRT", "bindings")
    assert (row["found"], row["state"]) == (None, "missing")
    assert "qexport[tensorrt-cpu]" in row["advice"]
    assert not found.ability("tensorrt", "run")["possible"]
    assert found.ability("onnx", "run")["possible"]
    assert found.code == 0


def test_tensorrt_absent_with_its_target_asked_exits_3_and_says_how_to_install() -> None:
    found = doctor("--target", "tensorrt", hidden=TENSORRT)
    assert found.code == 3
    assert "target tensorrt: cannot export here: missing tensorrt or tensorrt_rtx_bindings" in found.err
    assert "pip install 'qexport[all,tensorrt-cpu]'" in found.err


def test_bindings_of_another_version_are_incompatible_and_exit_3(tmp_path: Path) -> None:
    found = doctor("--json", path=bindings(tmp_path, SHIFTED))
    row = found.row("TensorRT", "bindings")
    assert (row["found"], row["state"]) == ("tensorrt 11.4.0", "incompatible")
    assert "DECONVOLUTION" in row["advice"]
    assert found.code == 3
    assert not found.ability("tensorrt", "measure")["possible"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; os.abort()", "signal 6"),
        ("raise SystemExit(9)", "exit code 9"),
        ("import ctypes; ctypes.CDLL('libnvinfer.so.99')", "cannot be loaded"),
        (WITHOUT_GPU, "returned nullptr"),
    ],
)
def test_bindings_that_cannot_be_used_are_told_and_end_nothing(tmp_path: Path, code: str, words: str) -> None:
    found = doctor("--json", path=bindings(tmp_path, code))
    row = found.row("TensorRT", "bindings")
    assert row["state"] == "incompatible"
    assert words in row["advice"]
    assert found.code == 3


def test_library_of_another_release_than_the_bindings_is_incompatible(tmp_path: Path) -> None:
    found = Tensorrt(
        flavour="tensorrt", bindings="10.3.0", library="8.6.1", error="bindings 10.3.0 over library 8.6.1"
    )
    rows = {row.name: row for row in tensorrt_findings(tmp_path, found, installed_ranges(), None)}
    assert (rows["library"].found, rows["library"].state) == ("8.6.1", "incompatible")
    assert rows["library"].compatible == "10.3.0, as the bindings"
    assert rows["bindings"].state == "incompatible"


def test_library_of_the_system_is_found_by_its_file(tmp_path: Path) -> None:
    folder = tmp_path / "usr/lib/aarch64-linux-gnu"
    folder.mkdir(parents=True)
    for name in (
        "libnvinfer.so.8.6.2",
        "libnvinfer.so.10",
        "libnvinfer.so.10.3.0",
        "libnvinfer_plugin.so.10.3.0",
    ):
        (folder / name).touch()
    trtexec = tmp_path / "usr/src/tensorrt/bin/trtexec"
    trtexec.parent.mkdir(parents=True)
    trtexec.touch()
    assert library_files(tmp_path) == ("8.6.2", "10.3.0")
    rows = {row.name: row for row in tensorrt_findings(tmp_path, None, installed_ranges(), None)}
    assert (rows["library"].found, rows["library"].state) == ("10.3.0", "ok")
    assert rows["trtexec"].found == "/usr/src/tensorrt/bin/trtexec"


def test_bindings_absent_on_a_jetson_come_from_jetpack(tmp_path: Path) -> None:
    old = Jetson("NVIDIA Jetson Nano", "32.7.1", "4.6.1", 0)
    advice = tensorrt_findings(tmp_path, None, installed_ranges(), old)[0].advice
    assert "trtexec" in advice
    unknown = Jetson("NVIDIA Jetson", "41.0.0", None, 0)
    advice = tensorrt_findings(tmp_path, None, installed_ranges(), unknown)[0].advice
    assert "python3-libnvinfer" in advice
