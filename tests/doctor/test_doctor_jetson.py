from __future__ import annotations

from pathlib import Path

import pytest

from qexport.doctor.jetson import (
    find_jetson,
    jetpack_of_l4t,
    jetson_findings,
    parse_device_tree_text,
    parse_dpkg_status,
    parse_jetpack_version,
    parse_l4t,
)

# First lines of /etc/nv_tegra_release as boards have them.
NANO = (
    "# R32 (release), REVISION: 6.1, GCID: 27863751, BOARD: t210ref, EABI: aarch64, "
    "DATE: Mon Jul 26 19:20:30 UTC 2021\n"
)
XAVIER = (
    "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64, "
    "DATE: Tue Aug  1 19:57:35 UTC 2023\n"
)
_OOT = "# KERNEL_VARIANT: oot\nTARGET_USERSPACE_LIB_DIR=nvidia\n"
ORIN = (
    "# R36 (release), REVISION: 4.0, GCID: 37537400, BOARD: generic, EABI: aarch64, "
    f"DATE: Fri Sep 13 04:36:44 UTC 2024\n{_OOT}"
)
THOR = (
    "# R38 (release), REVISION: 2.2, GCID: 42205042, BOARD: generic, EABI: aarch64, "
    f"DATE: Thu Sep 25 22:47:11 UTC 2025\n{_OOT}"
)
ORIN_7 = (
    "# R39 (release), REVISION: 2.0, GCID: 45755727, BOARD: generic, EABI: aarch64, "
    f"DATE: Mon Jun  1 09:28:48 PM UTC 2026\n{_OOT}"
)
STATUS = """\
Package: nvidia-jetpack-runtime
Status: install ok installed
Architecture: arm64
Version: 6.1+b123

Package: nvidia-jetpack
Status: install ok installed
Priority: standard
Section: metapackages
Maintainer: NVIDIA Corporation
Architecture: arm64
Version: 6.2.1+b38
Depends: nvidia-jetpack-runtime (= 6.2.1+b38)
Description: NVIDIA Jetpack Meta Package
Homepage: http://developer.nvidia.com/jetson

Package: nvidia-l4t-core
Status: install ok installed
Version: 36.4.4-20250616085344

Package: tensorrt
Status: deinstall ok config-files
Version: 10.3.0.30-1+cuda12.5
"""


@pytest.mark.parametrize(
    ("text", "l4t", "jetpack"),
    [
        (NANO, "32.6.1", "4.6"),
        (XAVIER, "35.4.1", "5.1"),
        (ORIN, "36.4.0", "6.1"),
        (THOR, "38.2.2", "7.0"),
        (ORIN_7, "39.2.0", "7.2"),
    ],
)
def test_release_text_of_each_generation_gives_l4t_and_jetpack(text: str, l4t: str, jetpack: str) -> None:
    assert parse_l4t(text) == l4t
    assert jetpack_of_l4t(l4t) == jetpack


@pytest.mark.parametrize("text", ["", "# KERNEL_VARIANT: oot\n", "Ubuntu 22.04"])
def test_release_text_without_a_release_gives_none(text: str) -> None:
    assert parse_l4t(text) is None


def test_jetpack_of_a_release_to_come_is_not_guessed() -> None:
    assert jetpack_of_l4t("41.0.0") is None


@pytest.mark.parametrize(
    ("package", "jetpack"), [("6.2.1+b38", "6.2.1"), ("4.6-b197", "4.6"), ("5.1.2-b104", "5.1.2")]
)
def test_jetpack_version_of_the_package_loses_its_build(package: str, jetpack: str) -> None:
    assert parse_jetpack_version(package) == jetpack


def test_dpkg_status_gives_installed_packages_alone() -> None:
    found = parse_dpkg_status(STATUS, ("nvidia-jetpack", "nvidia-l4t-core", "tensorrt", "absent"))
    assert found == {"nvidia-jetpack": "6.2.1+b38", "nvidia-l4t-core": "36.4.4-20250616085344"}


def test_device_tree_text_ends_at_its_zero_byte() -> None:
    assert parse_device_tree_text(b"NVIDIA Jetson Orin NX\0") == "NVIDIA Jetson Orin NX"


def board(root: Path, *, release: str | None = None, status: str | None = None, model: str = "") -> Path:
    """Write the files of a board; return the folder that stands for `/`."""
    texts = {
        "etc/nv_tegra_release": release,
        "var/lib/dpkg/status": status,
        "proc/device-tree/model": f"{model}\0",
    }
    for name, text in texts.items():
        if text is not None:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return root


def dla(root: Path, name: str, status: str | None) -> None:
    node = root / "proc/device-tree/bus@0/host1x@13e00000" / name
    node.mkdir(parents=True)
    (node / "compatible").write_bytes(b"nvidia,tegra234-nvdla\0")
    if status is not None:
        (node / "status").write_bytes(status.encode() + b"\0")


def test_board_with_jetpack_installed_says_its_package_version(tmp_path: Path) -> None:
    found = find_jetson(
        board(tmp_path, release=ORIN, status=STATUS, model="NVIDIA Jetson AGX Orin Developer Kit")
    )
    assert found is not None
    assert (found.l4t, found.jetpack, found.python) == ("36.4.0", "6.2.1", "3.10")
    assert found.board == "NVIDIA Jetson AGX Orin Developer Kit"


def test_board_without_its_release_file_is_known_by_model_and_packages(tmp_path: Path) -> None:
    found = find_jetson(
        board(tmp_path, status=STATUS.replace("nvidia-jetpack\n", "other\n"), model="NVIDIA Jetson")
    )
    assert found is not None
    assert (found.l4t, found.jetpack) == ("36.4.4", "6.2")


def test_machine_that_is_no_jetson_is_not_applicable(tmp_path: Path) -> None:
    found = find_jetson(board(tmp_path, model="Raspberry Pi 4 Model B Rev 1.4"))
    assert found is None
    rows = jetson_findings(found, python="3.11", tensorrt_dla=0)
    assert {row.state for row in rows} == {"not applicable"}


def test_dla_cores_that_are_disabled_are_not_counted(tmp_path: Path) -> None:
    board(tmp_path, release=ORIN, model="NVIDIA Jetson Orin NX")
    dla(tmp_path, "nvdla0@15880000", None)
    dla(tmp_path, "nvdla1@158c0000", "okay")
    dla(tmp_path, "nvdla2@158d0000", "disabled")
    found = find_jetson(tmp_path)
    assert found is not None
    assert found.dla_cores == 2
    by_tree = jetson_findings(found, python="3.10", tensorrt_dla=None)[2]
    assert (by_tree.found, by_tree.state) == ("2, from the device tree", "ok")
    by_tensorrt = jetson_findings(found, python="3.10", tensorrt_dla=1)[2]
    assert by_tensorrt.found == "1, as TensorRT counts them"


@pytest.mark.parametrize(
    ("release", "python", "advice"),
    [
        (ORIN, "3.10", ""),
        (ORIN, "3.12", "python3.10 -m venv --system-site-packages"),
        (THOR, "3.12", ""),
        (XAVIER, "3.10", "trtexec"),
        (NANO, "3.10", "trtexec"),
    ],
)
def test_jetpack_of_another_python_says_what_to_do(
    tmp_path: Path, release: str, python: str, advice: str
) -> None:
    row = jetson_findings(find_jetson(board(tmp_path, release=release)), python=python, tensorrt_dla=None)[1]
    assert row.state == "ok"
    assert advice in row.advice
    assert bool(row.advice) == bool(advice)


def test_jetpack_that_is_unknown_is_named_by_its_l4t(tmp_path: Path) -> None:
    text = "# R41 (release), REVISION: 1.0, GCID: 1\n"
    row = jetson_findings(find_jetson(board(tmp_path, release=text)), python="3.14", tensorrt_dla=None)[1]
    assert row.found == "not known to this qexport (L4T 41.1.0)"
