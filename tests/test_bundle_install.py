"""The install script of a bundle: what it says, what it would run, and what it makes of an empty environment."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from bundle_fixtures import bundled, spoilt
from cli_fixtures import place
from test_device_side import IS_TORCH_THERE, NO_NETWORK, run

from qexport.bundle import INSTALL
from qexport.bundling import WrittenBundle, wheel
from qexport.measurement import read_measurement

__all__ = ["bundled", "place", "spoilt"]

BUILD_WHEEL = """
import sys
from pathlib import Path
from qexport.bundling.wheel import build_wheel
build_wheel(Path(sys.argv[1]))
"""


def install(
    bundle: Path, *words: str | Path, cwd: Path, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(bundle / INSTALL), *(str(word) for word in words)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=timeout, check=False
    )


def refused(done: subprocess.CompletedProcess[str], code: int, *said: str) -> None:
    assert done.returncode == code, done.stdout + done.stderr
    assert [text for text in said if text not in done.stderr] == []


def fake_python(folder: Path, about: str, range_code: int = 0) -> Path:
    """A python that says what it is and can do nothing."""
    path = folder / "python-of-another-kind"
    path.write_text(
        f'#!/bin/sh\ncase $2 in *calcsize*) echo "{about}" ;; *version_info*) exit {range_code} ;; *) exit 1 ;; esac\n'
    )
    path.chmod(0o755)
    return path


def test_script_is_clean_for_shellcheck_as_written_and_as_it_lies_in_a_bundle(bundled: WrittenBundle) -> None:
    tool = Path(sys.executable).with_name("shellcheck")
    if not tool.is_file():
        pytest.skip("shellcheck is not installed: pip install 'qexport[dev]'")
    for script in (wheel.PACKAGE / "bundling" / INSTALL, bundled.folder / INSTALL):
        done = subprocess.run([tool, "--shell=sh", script], capture_output=True, text=True, check=False)
        assert done.stdout == ""


def test_script_in_a_bundle_has_its_wheel_and_extra_and_no_placeholder(bundled: WrittenBundle) -> None:
    text = (bundled.folder / INSTALL).read_text()
    assert re.findall(r"@[A-Z]+@", text) == []
    assert f"wheel='{bundled.manifest.wheel}'" in text
    assert "extra='onnx-runtime'" in text


def test_dry_run_prints_the_commands_and_makes_nothing(spoilt: Path, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    done = install(spoilt, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    venv = f"{spoilt}.venv"
    lines = done.stdout.splitlines()
    assert lines[0] == f"python3 -m venv {venv}"
    assert lines[1].startswith(f"{venv}/bin/python -m pip install")
    assert "--only-binary :all:" in lines[1]  # nothing is compiled on a board
    assert lines[1].endswith("-py3-none-any.whl[onnx-runtime]")
    assert lines[-1] == f"{venv}/bin/qexport verify {spoilt}"
    assert set(tmp_path.rglob("*")) == before


def test_dry_run_with_a_folder_of_wheels_asks_no_index(spoilt: Path, tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    done = install(
        spoilt, "--dry-run", "--no-verify", "--wheels", tmp_path / "wheels", "--venv", "venv", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"python3 -m venv {tmp_path}/venv"
    assert all(f"--no-index --find-links {tmp_path}/wheels" in line for line in lines[1:])
    assert not any("verify" in line for line in lines)


def change(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


@pytest.mark.parametrize("harm", [change, Path.unlink])
def test_bundle_that_was_changed_is_not_installed(
    harm: Callable[[Path], None], spoilt: Path, tmp_path: Path
) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("sha256sum is not installed")
    harm(spoilt / "layers.json")
    refused(install(spoilt, "--dry-run", cwd=tmp_path), 2, "layers.json", "changed")


def test_options_that_cannot_be_used_are_refused(spoilt: Path, tmp_path: Path) -> None:
    refused(install(spoilt, "--fast", cwd=tmp_path), 2, "--fast")
    refused(install(spoilt, "--venv", cwd=tmp_path), 2, "--venv needs a value")
    refused(install(spoilt, "--venv", spoilt / "venv", cwd=tmp_path), 2, "lies in the bundle")
    refused(install(spoilt, "--venv", "venv", cwd=spoilt), 2, "lies in the bundle")
    refused(install(spoilt, "--wheels", "nowhere", cwd=tmp_path), 2, "nowhere")
    assert install(spoilt, "--help", cwd=tmp_path).stdout.startswith("usage: install.sh")


def test_python_that_cannot_be_used_is_named(spoilt: Path, tmp_path: Path) -> None:
    missing = install(spoilt, "--python", "python9", cwd=tmp_path)
    refused(missing, 3, "python9 is not on this machine", "apt-get install")
    old = install(spoilt, "--python", fake_python(tmp_path, "3.7 64", 1), cwd=tmp_path)
    refused(old, 3, "Python 3.7", "3.10 to 3.13")
    narrow = install(spoilt, "--python", fake_python(tmp_path, "3.11 32"), cwd=tmp_path)
    refused(narrow, 3, "32-bit", platform.machine(), "64-bit image")
    bare = install(spoilt, "--python", fake_python(tmp_path, "3.11 64"), cwd=tmp_path)
    refused(bare, 3, "virtual environments", "python3.11-venv")


def test_wheels_of_another_architecture_are_answered_with_this_machine_and_python(
    spoilt: Path, tmp_path: Path
) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "onnxruntime-1.31.0-cp311-cp311-manylinux_2_28_s390x.whl").write_bytes(b"")
    done = install(spoilt, "--python", sys.executable, "--wheels", wheels, cwd=tmp_path)
    version = ".".join(map(str, sys.version_info[:2]))
    refused(
        done,
        1,
        "No matching distribution",
        platform.machine(),
        f"Python {version}",
        "no wheel of the runtime",
    )


@pytest.mark.slow
def test_archive_installs_verifies_detects_and_measures_in_an_empty_environment(
    bundled: WrittenBundle, tmp_path: Path
) -> None:
    """What the owner of a board does: unpack, install, use. No torch comes with it."""
    subprocess.run(["tar", "xf", str(bundled.archive)], cwd=tmp_path, check=True)
    bundle = tmp_path / bundled.folder.name
    done = install(bundle, "--python", sys.executable, cwd=tmp_path, timeout=500)
    if done.returncode == 1 and NO_NETWORK.search(done.stdout + done.stderr):
        pytest.skip("pip cannot reach the package index, so no environment without torch can be made")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "identical: 2 golden frames" in done.stdout
    command = Path(f"{bundle}.venv/bin/qexport")
    python = command.with_name("python")
    assert run(python, "-c", IS_TORCH_THERE, cwd=tmp_path).strip() == "False"
    run(python, "-m", "pip", "check", cwd=tmp_path)
    found = run(python, command, "detect", bundle, bundle / "golden/0/frame.png", cwd=tmp_path)
    assert any(part in found for part in ("washer", "nut", "bolt"))
    words = ("--runs", "3", "--min-accounted", "0.01", "--measured-on", "host")
    run(python, command, "bench", bundle, *words, cwd=tmp_path)
    assert read_measurement(tmp_path / "measurement.json").golden.startswith("identical")
    assert re.search(r"installed: \d+ MB", done.stderr)
    # That installation, which is no checkout, makes the same wheel again.
    run(python, "-c", BUILD_WHEEL, tmp_path / "again", cwd=tmp_path)
    with (
        zipfile.ZipFile(bundle / bundled.manifest.wheel) as first,
        zipfile.ZipFile(tmp_path / "again" / Path(bundled.manifest.wheel).name) as second,
    ):
        assert sorted(first.namelist()) == sorted(second.namelist())
        changed = [name for name in first.namelist() if first.read(name) != second.read(name)]
        assert [name for name in changed if not name.endswith("/RECORD")] == []
    # Again, over what is there.
    assert install(bundle, "--python", sys.executable, cwd=tmp_path, timeout=500).returncode == 0
