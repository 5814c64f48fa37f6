"""The check in an emulated arm64 Debian: for real where Debian's packages can be had, and what it says where not."""

from __future__ import annotations

import fcntl
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "tools"
sys.path.insert(0, str(TOOLS))

import check_arm64  # noqa: E402 - the tools are no package
from arm64_machine import CPUS, features_of  # noqa: E402

PACKAGES_MISSING = 3
TIMING = re.compile(r"\d\s*(ms|s|sec|seconds|min|fps)\b")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_tflite_bundle_on_emulated_boards_is_bit_identical() -> None:
    command = [sys.executable, str(TOOLS / "check_arm64.py"), "--target", "tflite"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode == PACKAGES_MISSING:
        pytest.skip(finished.stderr.strip())
    assert finished.returncode == 0, finished.stdout + finished.stderr
    for cpu in CPUS:
        assert f"emulated {cpu.name} ({cpu.boards}): identical: 1 golden frames" in finished.stdout
    assert "machine aarch64" in finished.stdout
    assert not TIMING.search(finished.stdout)


def test_check_without_apt_and_qemu_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_arm64.main(["--cache", str(tmp_path / "cache")]) == PACKAGES_MISSING
    assert "apt-get is not on this machine" in capsys.readouterr().err


def test_check_with_an_apt_that_fails_says_what_apt_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    apt = tmp_path / "apt-get"
    apt.write_text(
        "#!/bin/sh\necho 'W: old lists' >&2\necho 'E: Unable to fetch some archives' >&2\nexit 100\n"
    )
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_arm64.main(["--cache", str(tmp_path / "cache")]) == PACKAGES_MISSING
    error = capsys.readouterr().err
    assert "apt-get download fails: E: Unable to fetch some archives" in error
    assert "old lists" not in error
    assert not (tmp_path / "cache/qemu").exists()


def test_check_beside_another_refuses_the_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert check_arm64.main(["--cache", str(tmp_path)]) == 2
    assert "another check runs there" in capsys.readouterr().err


def test_check_of_no_bundle_refuses_before_it_downloads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, cache = tmp_path / "empty.qbundle", tmp_path / "cache"
    bundle.mkdir()
    assert check_arm64.main(["--bundle", str(bundle), "--cache", str(cache)]) == 2
    assert "empty.qbundle is no bundle" in capsys.readouterr().err
    assert not cache.exists()


# AT_HWCAP as qemu 7.2 gives it.
@pytest.mark.parametrize(
    ("capabilities", "features"),
    [
        (0x8FB, "fp asimd aes pmull sha1 sha2 crc32 cpuid"),
        (
            0x119FFB,
            "fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp",
        ),
    ],
)
def test_features_of_capabilities_are_the_kernels_names(capabilities: int, features: str) -> None:
    assert features_of(capabilities) == features
