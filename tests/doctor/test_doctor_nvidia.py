from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from doctor_fixtures import Answer, doctor

from qexport.doctor.nvidia import Driver, find_toolkit, nvidia_findings, parse_driver_release
from qexport.runtimes.nvidia_device import NvidiaDevice

H100 = NvidiaDevice("NVIDIA H100", "9.0", "12.2", 80 << 30)
# A driver's library with two GPUs, or one that does not start.
DRIVER = """
#include <string.h>
int cuDriverGetVersion(int *version) { *version = 12020; return 0; }
int cuInit(unsigned flags) { return INIT; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char *name, int bytes, int device) {
    strncpy(name, device ? "Second" : "Orin", bytes);
    return 0;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 1 << 30; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 8 : attribute == 76 ? 7 + device : -1;
    return 0;
}
int cuGetErrorName(int code, const char **text) { *text = "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"; return 0; }
"""


def doctor_with_driver(folder: Path, init: int) -> Answer:
    """Run the command over a driver's library that was compiled for the test."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler, so no library that stands for NVIDIA's driver")
    (folder / "driver.c").write_text(DRIVER)
    subprocess.run(
        [compiler, "-shared", "-fPIC", f"-DINIT={init}", "-o", folder / "libcuda.so.1", folder / "driver.c"],
        check=True, timeout=60,
    )  # fmt: skip
    return doctor("--json", LD_LIBRARY_PATH=str(folder))


def test_driver_with_two_gpus_lists_both(tmp_path: Path) -> None:
    found = doctor_with_driver(tmp_path, 0)
    assert found.row("NVIDIA device", "GPU 0")["found"] == "Orin, compute capability 8.7"
    assert found.row("NVIDIA device", "GPU 1")["found"] == "Second, compute capability 8.8"
    assert "CUDA 12.2" in found.row("NVIDIA device", "driver")["found"]


def test_driver_that_does_not_start_is_incompatible_and_exits_3(tmp_path: Path) -> None:
    found = doctor_with_driver(tmp_path, 803)
    row = found.row("NVIDIA device", "driver")
    assert row["state"] == "incompatible"
    assert "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH" in row["advice"]
    assert found.code == 3


def test_driver_without_a_gpu_reports_the_gpu_missing(tmp_path: Path) -> None:
    found = doctor_with_driver(tmp_path, 100)
    assert found.row("NVIDIA device", "driver")["state"] == "ok"
    assert found.row("NVIDIA device", "GPU")["state"] == "missing"
    assert found.code == 0


@pytest.mark.parametrize(
    ("text", "release"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
            "GCC version:  gcc version 11.4.0\n",
            "535.104.05",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build  (buildbrain@mobile)\n",
            "540.4.0",
        ),
        ("", None),
    ],
)
def test_driver_release_of_the_kernel_module_is_read(text: str, release: str | None) -> None:
    assert parse_driver_release(text) == release


def test_driver_older_than_torchs_cuda_is_incompatible(tmp_path: Path) -> None:
    driver = Driver("12.2", "535.104.05", (H100,), "")
    old = nvidia_findings(tmp_path, driver, torch_cuda="13.0", jetson=False)[0]
    assert (old.state, old.found) == ("incompatible", "535.104.05, CUDA 12.2")
    assert "CUDA 13.0" in old.advice
    assert nvidia_findings(tmp_path, driver, torch_cuda="12.6", jetson=False)[0].state == "ok"
    assert nvidia_findings(tmp_path, driver, torch_cuda=None, jetson=False)[0].state == "ok"


@pytest.mark.parametrize(
    ("vendor", "kind", "state"),
    [
        ("0x10de", "0x030000", "missing"),
        ("0x10de", "0x020000", "not applicable"),
        ("0x8086", "0x030000", "not applicable"),
    ],
)
def test_card_without_its_driver_asks_for_the_driver(
    tmp_path: Path, vendor: str, kind: str, state: str
) -> None:
    device = tmp_path / "sys/bus/pci/devices/0000:01:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")
    rows = nvidia_findings(tmp_path, Driver(None, None, (), ""), torch_cuda="13.0", jetson=False)
    assert [row.state for row in rows] == [state, state, "not applicable"]


def test_toolkit_is_read_in_both_its_forms(tmp_path: Path) -> None:
    folder = tmp_path / "usr/local/cuda"
    folder.mkdir(parents=True)
    assert find_toolkit(tmp_path) is None
    (folder / "version.txt").write_text("CUDA Version 10.2.300\n")
    assert find_toolkit(tmp_path) == "10.2.300"
    (folder / "version.json").write_text(
        '{\n "cuda" : {\n  "name" : "CUDA SDK",\n  "version" : "12.6.11"\n }\n}\n'
    )
    assert find_toolkit(tmp_path) == "12.6.11"
