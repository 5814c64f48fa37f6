"""Finding TensorRT: bindings that do not fit their library, a GPU that is missing, a folder of the same name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorrt_models import needs_builder

from qexport.devices import has_device, runner_for, why_untimed
from qexport.errors import TargetUnavailable
from qexport.runtimes import nvidia_device
from qexport.runtimes.nvidia_device import driver_version, find_device
from qexport.runtimes.tensorrt_library import (
    check_bindings,
    load_library,
    network_flags,
    start_builder,
)
from qexport.versions import is_importable

without_gpu = pytest.mark.skipif(find_device() is not None, reason="an NVIDIA GPU is here")


def bindings(layers: list[tuple[str, tuple[int, ...]]]) -> Any:
    """Return bindings whose calls give other layers than those that were asked for."""

    class Network(SimpleNamespace):
        num_layers = len(layers)

        def add_input(self, *given: object) -> object:
            return object()

        add_convolution_nd = add_pooling_nd = add_input

        def get_layer(self, index: int) -> object:
            kind, shape = layers[index]
            return SimpleNamespace(type=kind, get_output=lambda _: SimpleNamespace(shape=shape))

    class Logger:
        INTERNAL_ERROR = 0

        def __init__(self, level: int) -> None:
            pass

    return SimpleNamespace(
        __version__="11.4.0",
        Logger=Logger,
        Builder=lambda logger: SimpleNamespace(create_network=lambda flags: Network()),
        NetworkDefinitionCreationFlag=SimpleNamespace(),
        LayerType=SimpleNamespace(CONVOLUTION="CONVOLUTION", POOLING="POOLING"),
        PoolingType=SimpleNamespace(MAX=0),
        float32=object(),
    )


CONVOLUTION, POOLING = ("CONVOLUTION", (1, 8, 14, 14)), ("POOLING", (1, 3, 15, 15))


@pytest.mark.parametrize(
    ("layers", "got"),
    [
        ([("DECONVOLUTION", (1, 8, 18, 18))], "DECONVOLUTION"),
        ([CONVOLUTION], r"\('CONVOLUTION', \(1, 8, 14, 14\)\)\]\. Install"),
        ([("CONVOLUTION", (1, 8, 16, 16)), POOLING], r"\(1, 8, 16, 16\)"),
    ],
    ids=["another layer", "no pool", "another shape"],
)
def test_bindings_whose_tables_are_shifted_are_refused_with_what_came_back(
    layers: list[tuple[str, tuple[int, ...]]], got: str
) -> None:
    said = rf"bindings \(11\.4\.0\) and the library .* different versions: asked for .*POOLING.*, got .*{got}"
    with pytest.raises(TargetUnavailable, match=said):
        check_bindings(bindings(layers))


def test_bindings_that_fit_are_taken() -> None:
    check_bindings(bindings([CONVOLUTION, POOLING]))


@needs_builder
def test_library_that_is_installed_is_checked_and_named() -> None:
    library = load_library()
    check_bindings(library.trt)
    assert library.name == f"{library.flavour} {library.trt.__version__}"
    assert load_library() is library


def refuse(logger: object) -> None:
    raise TypeError("pybind11::init(): factory function returned nullptr")


@pytest.mark.parametrize("builder", [refuse, lambda logger: None], ids=["raises", "gives none"])
def test_builder_of_classic_tensorrt_without_a_gpu_says_what_it_needs(builder: Any) -> None:
    with pytest.raises(TargetUnavailable, match=r"needs an NVIDIA GPU.*qexport\[tensorrt-cpu\]") as caught:
        start_builder(SimpleNamespace(__version__="10.3.0", Builder=builder), None)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("members", "strong", "weak"),
    [
        ({"EXPLICIT_BATCH": 0, "EXPLICIT_PRECISION": 1}, 1, 1),  # 8.6
        ({"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}, 3, 1),  # 10
        ({"STRONGLY_TYPED": 0, "PREFER_AOT_PYTHON_PLUGINS": 1}, 1, 0),  # 11
    ],
    ids=["8.6", "10", "11"],
)
def test_network_flags_of_each_generation(members: dict[str, int], strong: int, weak: int) -> None:
    trt = SimpleNamespace(NetworkDefinitionCreationFlag=SimpleNamespace(__members__=members))
    assert (network_flags(trt), network_flags(trt, weakly_typed=True)) == (strong, weak)


def test_folder_of_a_packages_name_is_not_taken_for_the_package(tmp_path: Path) -> None:
    """A run has folders named after its targets."""
    for name in ("tensorrt", "torch2trt", "no_such_package"):
        (tmp_path / name).mkdir()
    code = (
        "from qexport.runtimes.tensorrt_library import installed_flavour\n"
        "from qexport.versions import is_importable\n"
        "print(is_importable('no_such_package'), installed_flavour())"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True
        ).stdout
        for cwd in (tmp_path, Path(__file__).parents[2])
    ]
    assert found[0] == found[1]
    assert found[0].startswith("False ")
    assert is_importable("numpy")


# The GPU


@without_gpu
def test_machine_without_a_gpu_has_no_device_and_its_networks_are_evaluated() -> None:
    assert find_device() is None
    for target in ("tensorrt", "torch2trt"):
        assert not has_device(target)
        assert runner_for(target).__name__ == "EvaluatedRunner"
        assert runner_for(target).rung == "built"
    assert has_device("onnx")
    assert runner_for("onnx").rung == "run"


def test_target_that_was_not_timed_says_so_and_how_to_have_it_timed(tmp_path: Path) -> None:
    said = why_untimed("tensorrt", tmp_path)
    assert said.startswith("tensorrt: no NVIDIA GPU here, so its latency was not measured.")
    assert f"qexport report {tmp_path} --merge FILE..." in said


class Driver(SimpleNamespace):
    """The calls of libcuda that are made, as they answer for one Orin."""

    def __init__(self, devices: int = 1, initialised: int = 0) -> None:
        super().__init__()
        self.devices, self.initialised = devices, initialised

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.initialised

    def cuDriverGetVersion(self, number: Any) -> int:  # noqa: N802
        number._obj.value = 12060
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self.devices
        return 0

    def cuDeviceGet(self, handle: Any, ordinal: int) -> int:  # noqa: N802
        handle._obj.value = ordinal
        return 0

    def cuDeviceGetName(self, name: Any, size: int, handle: object) -> int:  # noqa: N802
        name.value = b"Orin"
        return 0

    def cuDeviceTotalMem_v2(self, memory: Any, handle: object) -> int:  # noqa: N802
        memory._obj.value = 8 << 30
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, handle: object) -> int:  # noqa: N802
        value._obj.value = {75: 8, 76: 7}[attribute]
        return 0


def test_device_is_what_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia_device, "_load", Driver)
    found = find_device()
    assert found is not None
    assert (found.name, found.compute_capability, found.driver) == ("Orin", "8.7", "12.6")
    assert found.memory_bytes == 8 << 30
    assert find_device(1) is None


@pytest.mark.parametrize(
    "driver",
    [None, Driver(devices=0), Driver(initialised=100)],
    ids=["no driver", "no device", "not started"],
)
def test_device_is_none_where_the_driver_has_none(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia_device, "_load", lambda: driver)
    assert find_device() is None
    assert driver_version() == (None if driver is None else "12.6")
