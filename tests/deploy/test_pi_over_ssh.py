"""deploy/raspberrypi/over_ssh.sh, from end to end: its ssh runs the scripts in a folder of this machine."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from pi_board import calls, make_board, make_bundle, make_network, run_script


@pytest.fixture
def board(tmp_path: Path) -> dict[str, str]:
    make_network(tmp_path)
    return make_board(tmp_path)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "mine.qbundle")


@pytest.mark.parametrize("packed", [False, True])
def test_over_ssh_installs_verifies_measures_and_brings_back(
    packed: bool, bundle: Path, board: dict[str, str], tmp_path: Path
) -> None:
    given = bundle
    if packed:
        given = tmp_path / "mine.qbundle.tar"
        with tarfile.open(given, "w") as archive:
            archive.add(bundle, arcname=bundle.name)
    for _ in range(2):  # the second time, all of the first is there
        finished = run_script(
            "over_ssh.sh", "me@pi.local", given, "--port", "2222", "--runs", "9",
            cwd=tmp_path, variables=board,
        )  # fmt: skip
    place = tmp_path / "home" / "qexport-pi"
    assert calls(tmp_path)[-3:] == [
        f"install --venv {place}/bundle.venv --no-verify",
        "verify|bundle|--threads|1|--json|results/verify.json|",
        "bench|bundle|--runs|9|--warmup|10|--threads|1|--out|results/measurement.json|",
    ]
    results = tmp_path / "results" / "pi.local"
    assert {path.name for path in results.iterdir()} == {"measurement.json", "verify.json", "state.txt"}
    assert "qexport report RUN --merge results/pi.local/measurement.json" in finished.stderr
    network = [line.split("|") for line in calls(tmp_path, "network")]
    assert all(words[1:4] == ["-p", "2222", "me@pi.local"] for words in network if words[0] == "ssh")
    assert all("-P" in words for words in network if words[0] == "scp")


def test_over_ssh_brings_back_what_failed_a_gate_and_says_so(
    bundle: Path, board: dict[str, str], tmp_path: Path
) -> None:
    variables = {**board, "BENCH_ANSWERS": "1"}
    said = run_script("over_ssh.sh", "pi", bundle, cwd=tmp_path, code=1, variables=variables).stderr
    assert "on pi" in said
    assert (tmp_path / "results" / "pi" / "measurement.json").is_file()


def test_over_ssh_to_a_board_that_cannot_install_measures_nothing(bundle: Path, tmp_path: Path) -> None:
    make_network(tmp_path)
    board = make_board(tmp_path, architecture="armhf")
    said = run_script("over_ssh.sh", "pi", bundle, cwd=tmp_path, code=3, variables=board).stderr
    assert "this is a 32-bit system" in said
    assert calls(tmp_path) == []


def test_over_ssh_takes_wheels_along_for_a_board_without_network(
    bundle: Path, board: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "wheels here").mkdir()
    (tmp_path / "wheels here" / "a.whl").write_text("")
    run_script(
        "over_ssh.sh", "pi", bundle, "--wheels", "wheels here/", "--no-apt", cwd=tmp_path, variables=board
    )
    assert "--wheels wheels --no-verify" in calls(tmp_path)[0]
    assert (tmp_path / "home" / "qexport-pi" / "wheels" / "a.whl").is_file()


def test_over_ssh_without_install_copies_no_bundle(
    bundle: Path, board: dict[str, str], tmp_path: Path
) -> None:
    run_script("over_ssh.sh", "pi", bundle, cwd=tmp_path, variables=board)
    (tmp_path / "network").unlink()
    (tmp_path / "calls").unlink()
    run_script("over_ssh.sh", "pi", bundle, "--skip-install", cwd=tmp_path, variables=board)
    assert not any(str(bundle) in line for line in calls(tmp_path, "network"))
    assert [call.partition("|")[0] for call in calls(tmp_path)] == ["verify", "bench"]


def test_over_ssh_to_a_host_that_is_not_there_says_so(
    bundle: Path, board: dict[str, str], tmp_path: Path
) -> None:
    variables = {**board, "SSH_ANSWERS": "255"}
    said = run_script("over_ssh.sh", "pi", bundle, cwd=tmp_path, code=3, variables=variables).stderr
    assert "ssh could not reach pi" in said


def test_over_ssh_dry_run_touches_nothing(bundle: Path, board: dict[str, str], tmp_path: Path) -> None:
    printed = run_script("over_ssh.sh", "pi", bundle, "--dry-run", cwd=tmp_path, variables=board).stdout
    assert "ssh pi 'cd qexport-pi && sh scripts/install.sh bundle --no-verify'\n" in printed
    assert "ssh pi 'cd qexport-pi && sh scripts/measure.sh bundle --out results'\n" in printed
    assert calls(tmp_path, "network") == []
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("folder", ["/", "../elsewhere", "a b", "x;reboot", "-x"])
def test_over_ssh_refuses_a_remote_folder_that_a_shell_would_misread(
    folder: str, bundle: Path, board: dict[str, str], tmp_path: Path
) -> None:
    said = run_script(
        "over_ssh.sh", "pi", bundle, "--remote", folder, cwd=tmp_path, code=2, variables=board
    ).stderr
    assert "--remote" in said
    assert calls(tmp_path, "network") == []
