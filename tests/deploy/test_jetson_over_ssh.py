"""deploy/jetson/over_ssh.sh: what it asks ssh and scp. They are made up: the network is not under test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from jetson_board import make_artifact, make_program, run_script


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return make_artifact(tmp_path / "tensorrt")


@pytest.fixture
def network(tmp_path: Path) -> dict[str, str]:
    """Programs ssh and scp that write down their words, one call a line; scp brings the files it is asked for."""
    log = tmp_path / "network"
    note = f"""printf '%s|' "${{0##*/}}" "$@" >>"{log}"; echo >>"{log}" """
    make_program(tmp_path / "net", "ssh", f'{note}\nexit "${{SSH_ANSWERS:-0}}"')
    make_program(
        tmp_path / "net",
        "scp",
        f'{note}\nfor word; do last=$word; done\n[ -d "$last" ] && echo x >"$last/got"; exit 0',
    )
    return {"PATH": f"{tmp_path / 'net'}:{os.environ['PATH']}"}


def calls(tmp_path: Path) -> list[list[str]]:
    return [line.split("|")[:-1] for line in (tmp_path / "network").read_text().splitlines()]


def test_over_ssh_copies_builds_measures_and_brings_back(
    artifact: Path, network: dict[str, str], tmp_path: Path
) -> None:
    finished = run_script(
        "over_ssh.sh", "me@nano", artifact, "--port", "2222", "--runs", "9", cwd=tmp_path, variables=network
    )
    made = calls(tmp_path)
    assert [call[-1] for call in made if call[0] == "ssh"] == [
        "mkdir -p qexport-board/scripts",
        "cd qexport-board && rm -rf tensorrt",
        "cd qexport-board && rm -rf tensorrt/engines",
        "cd qexport-board && sh scripts/build.sh tensorrt --precision int8 --out results",
        "cd qexport-board && sh scripts/measure.sh tensorrt --precision int8 --out results --runs 9",
    ]
    assert all(call[1:4] == ["-p", "2222", "me@nano"] for call in made if call[0] == "ssh")
    assert ["scp", "-q", "-r", "-P", "2222", str(artifact), "me@nano:qexport-board/tensorrt"] in made
    fetched = [call[-2].rpartition("/")[2] for call in made if call[-1] == "results/nano/"]
    assert fetched == ["times.json", "profile.json", "layers.json", "board.json", "measure.log"]
    assert f"qexport report {tmp_path} --merge results/nano/times.json" in finished.stderr


def test_over_ssh_asks_for_power_only_when_told(
    artifact: Path, network: dict[str, str], tmp_path: Path
) -> None:
    run_script(
        "over_ssh.sh", "nano", artifact, "--max-clocks", "--power-mode", "0", cwd=tmp_path, variables=network
    )
    measure = next(call[-1] for call in calls(tmp_path) if "measure.sh" in call[-1])
    assert measure.endswith("--out results --max-clocks --power-mode 0")


def test_over_ssh_with_a_wheel_installs_it_first(
    artifact: Path, network: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "qexport-1-py3-none-any.whl").write_text("")
    run_script(
        "over_ssh.sh",
        "nano",
        artifact,
        "--wheel",
        "qexport-1-py3-none-any.whl",
        cwd=tmp_path,
        variables=network,
    )
    commands = [call[-1] for call in calls(tmp_path) if call[0] == "ssh"]
    assert commands[3] == "cd qexport-board && sh scripts/install.sh --from ./qexport-1-py3-none-any.whl"
    assert "build.sh" in commands[4]


def test_over_ssh_without_a_build_leaves_the_artifact_there(
    artifact: Path, network: dict[str, str], tmp_path: Path
) -> None:
    run_script("over_ssh.sh", "nano", artifact, "--skip-build", cwd=tmp_path, variables=network)
    commands = [" ".join(call) for call in calls(tmp_path)]
    assert not any("rm -rf" in command or "build.sh tensorrt" in command for command in commands)
    assert not any(command.endswith("qexport-board/tensorrt") for command in commands)


@pytest.mark.parametrize(
    ("answer", "code", "said"), [("1", 1, "on nano"), ("255", 3, "could not reach nano")]
)
def test_over_ssh_passes_on_what_the_board_answers(
    answer: str, code: int, said: str, artifact: Path, network: dict[str, str], tmp_path: Path
) -> None:
    variables = {**network, "SSH_ANSWERS": answer}
    assert (
        said
        in run_script("over_ssh.sh", "nano", artifact, cwd=tmp_path, code=code, variables=variables).stderr
    )


def test_over_ssh_dry_run_touches_nothing(artifact: Path, network: dict[str, str], tmp_path: Path) -> None:
    printed = run_script("over_ssh.sh", "nano", artifact, "--dry-run", cwd=tmp_path, variables=network).stdout
    assert (
        "ssh nano 'cd qexport-board && sh scripts/build.sh tensorrt --precision int8 --out results'\n"
        in printed
    )
    assert not (tmp_path / "network").exists()
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("folder", ["/", "../elsewhere", "a b", "x;reboot"])
def test_over_ssh_refuses_a_remote_folder_that_a_shell_would_misread(
    folder: str, artifact: Path, network: dict[str, str], tmp_path: Path
) -> None:
    said = run_script(
        "over_ssh.sh", "nano", artifact, "--remote", folder, cwd=tmp_path, code=2, variables=network
    ).stderr
    assert "--remote is a folder" in said
    assert not (tmp_path / "network").exists()
