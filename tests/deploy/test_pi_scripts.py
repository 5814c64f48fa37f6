"""The scripts of deploy/raspberrypi on a made-up board: what they refuse, ask for, run and leave behind.

No Raspberry Pi is here; the programs around the scripts are a few lines of shell each (see pi_board).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from jetson_board import SCRIPTS as JETSON_SCRIPTS
from jetson_board import make_program
from pi_board import GOVERNOR, ROOT, SCRIPTS, calls, make_board, make_bundle, release, run_script

COMMANDS = ("install.sh", "measure.sh", "serve.sh", "service.sh", "over_ssh.sh")


@pytest.fixture
def board(tmp_path: Path) -> dict[str, str]:
    return make_board(tmp_path)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "mine.qbundle")


@pytest.fixture
def installed(bundle: Path, board: dict[str, str], tmp_path: Path) -> Path:
    """A bundle with its environment."""
    run_script("install.sh", bundle, cwd=tmp_path, variables=board)
    (tmp_path / "calls").unlink()
    return bundle


def without_ensurepip(board: dict[str, str], tmp_path: Path) -> dict[str, str]:
    make_program(tmp_path / "programs", "python3", "exit 1")
    return board


def test_scripts_are_clean_for_shellcheck() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.is_file():
        pytest.skip("shellcheck is not installed: pip install 'qexport[dev]'")
    paths = sorted(SCRIPTS.glob("*.sh"))
    assert {path.name for path in paths} == {*COMMANDS, "prelude.sh"}
    command = [shellcheck, "--external-sources", "--shell=sh", *paths]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert finished.stdout + finished.stderr == ""


def test_preludes_of_both_boards_begin_the_same() -> None:
    """Each folder is copied to a board by itself, so each has them; they are one text."""
    shared = [
        re.search(
            r"^# Exit codes.*?^need_number\(\).*?^\}$", (folder / "prelude.sh").read_text(), re.M | re.S
        )
        for folder in (SCRIPTS, JETSON_SCRIPTS)
    ]
    assert shared[0] is not None
    assert shared[1] is not None
    assert shared[0][0] == shared[1][0]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches_with_examples_and_exit_codes(name: str, tmp_path: Path) -> None:
    text = run_script(name, "--help", cwd=tmp_path).stdout
    assert text.startswith(f"usage: {name}")
    assert f"  sh {name}" in text
    assert "--dry-run" in text
    assert "Exit codes:" in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name", COMMANDS)
def test_unknown_option_is_refused(name: str, tmp_path: Path) -> None:
    assert "--loud" in run_script(name, "--loud", cwd=tmp_path, code=2).stderr


@pytest.mark.parametrize("name", ["install.sh", "measure.sh", "service.sh"])
def test_folder_that_is_no_bundle_is_refused(name: str, board: dict[str, str], tmp_path: Path) -> None:
    said = run_script(name, tmp_path, cwd=tmp_path, code=2, variables=board).stderr
    assert "no bundle.json and install.sh there" in said


def test_install_runs_the_bundles_own_script(bundle: Path, board: dict[str, str], tmp_path: Path) -> None:
    said = run_script("install.sh", bundle, cwd=tmp_path, variables=board).stderr
    assert "Raspberry Pi 5 Model B Rev 1.0, Debian GNU/Linux 13, arm64\n" in said
    assert calls(tmp_path) == [f"install --venv {bundle}.venv"]
    assert "next: measure.sh" in said


def test_install_hands_on_where_pytorch_comes_from(
    bundle: Path, board: dict[str, str], tmp_path: Path
) -> None:
    index = "https://index.example/cpu"
    run_script("install.sh", bundle, "--torch-index", index, cwd=tmp_path, variables=board)
    assert calls(tmp_path) == [f"install --venv {bundle}.venv --torch-index {index}"]


def test_install_unpacks_an_archive_beside_itself(
    bundle: Path, board: dict[str, str], tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "renamed.tar", "w") as archive:
        archive.add(bundle, arcname="mine.qbundle")
    run_script("install.sh", "renamed.tar", "--no-verify", cwd=tmp_path, variables=board)
    assert (tmp_path / "renamed" / "bundle.json").is_file()
    assert calls(tmp_path) == [f"install --venv {tmp_path}/renamed.venv --no-verify"]
    again = run_script("install.sh", "renamed.tar", cwd=tmp_path, code=2, variables=board)
    assert "renamed is there already" in again.stderr


def test_install_of_an_archive_that_is_cut_off_is_refused(board: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "cut.tar").write_bytes(b"\1" * 700)
    said = run_script("install.sh", "cut.tar", cwd=tmp_path, code=2, variables=board).stderr
    assert "cut.tar cannot be unpacked: copy it again" in said


@pytest.mark.parametrize("architecture", ["armhf", "armv7l"])
def test_install_on_a_32_bit_system_says_so_and_installs_nothing(
    architecture: str, bundle: Path, tmp_path: Path
) -> None:
    board = make_board(tmp_path, architecture=architecture)
    said = run_script("install.sh", bundle, cwd=tmp_path, code=3, variables=board).stderr
    assert f"this is a 32-bit system ({architecture})" in said
    assert "Write the 64-bit Raspberry Pi OS to the card" in said
    assert calls(tmp_path) == []


def test_install_on_an_old_release_names_the_newer(bundle: Path, tmp_path: Path) -> None:
    said = run_script(
        "install.sh", bundle, cwd=tmp_path, code=3, variables=make_board(tmp_path, version="11")
    ).stderr
    assert "Raspberry Pi OS 12 (bookworm) or 13 (trixie)" in said


def test_install_on_another_system_warns_and_goes_on(
    bundle: Path, board: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "board/etc/os-release").write_text(release("24.04", "ubuntu"))
    assert "warning: neither" in run_script("install.sh", bundle, cwd=tmp_path, variables=board).stderr


def test_install_asks_sudo_only_for_what_is_missing(
    bundle: Path, board: dict[str, str], tmp_path: Path
) -> None:
    run_script("install.sh", bundle, cwd=tmp_path, variables=without_ensurepip(board, tmp_path))
    assert calls(tmp_path)[:2] == [
        "sudo apt-get update",
        "sudo apt-get install -y --no-install-recommends python3-venv",
    ]


def test_install_without_apt_names_the_package(bundle: Path, board: dict[str, str], tmp_path: Path) -> None:
    said = run_script(
        "install.sh",
        bundle,
        "--no-apt",
        cwd=tmp_path,
        code=3,
        variables=without_ensurepip(board, tmp_path),
    ).stderr
    assert "sudo apt-get install python3-venv" in said
    assert calls(tmp_path) == []


@pytest.mark.parametrize("answer", [1, 2, 3])
def test_install_passes_on_what_the_bundle_answers(
    answer: int, bundle: Path, board: dict[str, str], tmp_path: Path
) -> None:
    variables = {**board, "INSTALL_ANSWERS": str(answer)}
    run_script("install.sh", bundle, cwd=tmp_path, code=answer, variables=variables)


def test_install_dry_run_touches_nothing(bundle: Path, board: dict[str, str], tmp_path: Path) -> None:
    printed = run_script(
        "install.sh", bundle, "--dry-run", cwd=tmp_path, variables=without_ensurepip(board, tmp_path)
    ).stdout
    assert "sudo apt-get install -y --no-install-recommends python3-venv\n" in printed
    assert f"sh {bundle}/install.sh --venv {bundle}.venv\n" in printed
    assert calls(tmp_path) == []
    assert not Path(f"{bundle}.venv").exists()


def test_measure_verifies_benches_and_records_the_board(
    installed: Path, board: dict[str, str], tmp_path: Path
) -> None:
    said = run_script(
        "measure.sh", f"{installed}/", "--runs", "9", "--threads", "2", cwd=tmp_path, variables=board
    ).stderr
    assert calls(tmp_path) == [
        f"verify|{installed}|--threads|2|--json|results/verify.json|",
        f"bench|{installed}|--runs|9|--warmup|10|--threads|2|--out|results/measurement.json|",
    ]
    state = (tmp_path / "results" / "state.txt").read_text()
    assert state.count("policy0 governor ondemand, 1500000 of 2400000 kHz") == 2
    assert state.count("cpu-thermal 48218") == state.count("throttled=0x0") == 2
    assert "qexport report RUN --merge results/measurement.json" in said


@pytest.mark.parametrize("which", ["VERIFY_ANSWERS", "BENCH_ANSWERS"])
def test_measure_with_a_difference_or_a_failed_gate_keeps_the_results(
    which: str, installed: Path, board: dict[str, str], tmp_path: Path
) -> None:
    said = run_script("measure.sh", installed, cwd=tmp_path, code=1, variables={**board, which: "1"}).stderr
    assert "a tensor differs or a gate fails" in said
    assert {path.name for path in (tmp_path / "results").iterdir()} == {
        "measurement.json",
        "verify.json",
        "state.txt",
    }


def test_measure_of_a_bundle_that_was_changed_times_nothing(
    installed: Path, board: dict[str, str], tmp_path: Path
) -> None:
    run_script("measure.sh", installed, cwd=tmp_path, code=2, variables={**board, "VERIFY_ANSWERS": "2"})
    assert [call.partition("|")[0] for call in calls(tmp_path)] == ["verify"]


@pytest.mark.parametrize("answer", [0, 1, 3])
def test_measure_sets_the_governor_when_asked_and_back_whatever_happens(
    answer: int, installed: Path, board: dict[str, str], tmp_path: Path
) -> None:
    governor = tmp_path / "board" / GOVERNOR
    variables = {**board, "BENCH_ANSWERS": str(answer), "GOVERNOR_FILE": str(governor)}
    run_script("measure.sh", installed, "--performance", cwd=tmp_path, code=answer, variables=variables)
    assert governor.read_text() == "ondemand\n"
    assert calls(tmp_path)[0] == f"sudo tee {governor}"
    assert calls(tmp_path)[-2:] == ["performance", f"sudo tee {governor}"]


def test_measure_leaves_the_governor_alone_unless_asked(
    installed: Path, board: dict[str, str], tmp_path: Path
) -> None:
    run_script("measure.sh", installed, cwd=tmp_path, variables=board)
    assert not any("sudo" in call for call in calls(tmp_path))


def test_measure_without_a_governor_refuses_performance(
    installed: Path, board: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "board" / GOVERNOR).unlink()
    said = run_script("measure.sh", installed, "--performance", cwd=tmp_path, code=3, variables=board).stderr
    assert "no governor that could be set" in said


def test_measure_before_install_names_it(bundle: Path, board: dict[str, str], tmp_path: Path) -> None:
    said = run_script("measure.sh", bundle, cwd=tmp_path, code=3, variables=board).stderr
    assert f"Run install.sh {bundle} first" in said


def test_measure_into_the_bundle_is_refused(installed: Path, board: dict[str, str], tmp_path: Path) -> None:
    said = run_script(
        "measure.sh", installed, "--out", f"{installed}/results", cwd=tmp_path, code=2, variables=board
    ).stderr
    assert "lies in the bundle" in said


def test_measure_dry_run_prints_every_command(installed: Path, board: dict[str, str], tmp_path: Path) -> None:
    printed = run_script(
        "measure.sh", installed, "--performance", "--dry-run", cwd=tmp_path, variables=board
    ).stdout.splitlines()
    governor = tmp_path / "board" / GOVERNOR
    assert printed[0] == f"echo performance | sudo tee {governor}"
    assert printed[-1] == f"echo ondemand | sudo tee {governor}"
    assert not (tmp_path / "results").exists()
    assert os.path.lexists(governor)
    assert calls(tmp_path) == []
