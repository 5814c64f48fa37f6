"""The scripts of deploy/jetson: what they say, what they would run, and what they run where TensorRT is made up.

No board and no TensorRT is here. trtexec, ssh and scp are programs of a few lines that write down what they are
asked; that NVIDIA's own understand it is taken from their sources (see jetson_board).
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jetson_board import (
    HELP_8_2,
    HELP_8_5,
    HELP_10_3,
    HELP_11_1,
    ROOT,
    SCRIPTS,
    make_artifact,
    make_program,
    make_root,
    make_trtexec,
    run_script,
)

from qexport.benchmarks.board import read_board, throttling

COMMANDS = ("install.sh", "build.sh", "run.sh", "measure.sh", "board.sh", "over_ssh.sh")
ALL_SCRIPTS = sorted(path.name for path in SCRIPTS.glob("*.sh"))


def tool(name: str) -> str:
    path = Path(sys.executable).with_name(name)
    if not path.is_file():
        pytest.skip(f"{name} is not installed: pip install 'qexport[dev]'")
    return str(path)


def tool_output(*command: str) -> str:
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    return finished.stdout + finished.stderr


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return make_artifact(tmp_path / "tensorrt")


def test_scripts_are_clean_for_shellcheck() -> None:
    assert {*COMMANDS, "prelude.sh"} <= set(ALL_SCRIPTS)
    paths = [str(SCRIPTS / name) for name in ALL_SCRIPTS]
    assert tool_output(tool("shellcheck"), "--external-sources", "--shell=sh", *paths) == ""


def test_shellcheck_finds_what_is_wrong(tmp_path: Path) -> None:
    script = make_program(tmp_path, "wrong.sh", "rm -rf $1/*")
    assert "SC2086" in tool_output(tool("shellcheck"), str(script))


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


@pytest.mark.parametrize("name", ["build.sh", "measure.sh"])
def test_folder_that_is_no_artifact_is_refused(name: str, tmp_path: Path) -> None:
    assert "no artifact.json there" in run_script(name, tmp_path, cwd=tmp_path, code=2).stderr


@pytest.mark.parametrize("name", ["build.sh", "measure.sh"])
def test_network_that_the_artifact_lacks_is_refused(name: str, artifact: Path, tmp_path: Path) -> None:
    said = run_script(name, artifact, "--precision", "fp16", cwd=tmp_path, code=2).stderr
    assert "no detector.fp16.onnx there" in said


def test_machine_without_trtexec_says_what_installs_it(artifact: Path, tmp_path: Path) -> None:
    if Path("/usr/src/tensorrt/bin/trtexec").exists():
        pytest.skip("this machine has a trtexec")
    said = run_script("build.sh", artifact, "--with", "trtexec", cwd=tmp_path, code=3).stderr
    assert "apt-get install libnvinfer-bin" in said


@pytest.mark.parametrize(
    ("listing", "options", "flags"),
    [
        (HELP_8_2, (), "--int8 --profilingVerbosity=detailed --workspace=512 --buildOnly"),
        (
            HELP_8_2,
            ("--half-floats",),
            "--int8 --fp16 --profilingVerbosity=detailed --workspace=512 --buildOnly",
        ),
        (
            HELP_8_2.replace("--profilingVerbosity", "--nvtxMode"),
            (),
            "--int8 --nvtxMode=verbose --workspace=512",
        ),
        (HELP_8_5, ("--precision", "fp32"), "--profilingVerbosity=detailed --buildOnly"),
        (HELP_10_3, (), "--stronglyTyped --profilingVerbosity=detailed --skipInference"),
        (HELP_11_1, (), "--profilingVerbosity=detailed --skipInference"),
    ],
)
def test_build_takes_the_flags_that_this_trtexec_lists(
    listing: str, options: tuple[str, ...], flags: str, artifact: Path, tmp_path: Path
) -> None:
    trtexec = make_trtexec(tmp_path / "bin", listing)
    printed = run_script(
        "build.sh", artifact, "--with", "trtexec", "--dry-run", *options,
        cwd=tmp_path, variables={"TRTEXEC": str(trtexec)},
    ).stdout.splitlines()[-1]  # fmt: skip
    network = "fp32" if "fp32" in options else "int8"
    start = (
        f"{trtexec} --onnx={artifact}/detector.{network}.onnx --saveEngine=results/{network}.engine {flags}"
    )
    assert printed.startswith(start)
    assert not (tmp_path / "results").exists()
    assert not (tmp_path / "bin" / "calls").exists()


def test_build_with_half_floats_of_a_strongly_typed_network_is_refused(
    artifact: Path, tmp_path: Path
) -> None:
    trtexec = make_trtexec(tmp_path / "bin", HELP_10_3)
    said = run_script(
        "build.sh", artifact, "--with", "trtexec", "--half-floats",
        cwd=tmp_path, code=2, variables={"TRTEXEC": str(trtexec)},
    ).stderr  # fmt: skip
    assert "takes every type from the network" in said


def test_build_that_tensorrt_refuses_shows_the_end_of_its_log(artifact: Path, tmp_path: Path) -> None:
    trtexec = make_trtexec(tmp_path / "bin", HELP_10_3, fails=True)
    said = run_script(
        "build.sh", artifact, "--with", "trtexec", cwd=tmp_path, code=1, variables={"TRTEXEC": str(trtexec)}
    ).stderr
    assert "no tactic found" in said
    assert "results/build.log" in said


def test_measure_times_whole_and_layers_apart_from_copies(artifact: Path, tmp_path: Path) -> None:
    trtexec = make_trtexec(tmp_path / "bin", HELP_8_5)
    printed = run_script(
        "measure.sh", artifact, "--dry-run", "--runs", "50", cwd=tmp_path, variables={"TRTEXEC": str(trtexec)}
    ).stdout
    assert (
        f"{trtexec} --loadEngine=results/int8.engine --exportTimes=results/times.json "
        "--exportProfile=results/profile.json --exportLayerInfo=results/layers.json --iterations=50 --duration=0 "
        "--warmUp=2000 --dumpProfile --profilingVerbosity=detailed --separateProfileRun --useCudaGraph "
        "--noDataTransfers\n"
    ) in printed
    assert "sudo" not in printed
    assert not (tmp_path / "results").exists()


def test_measure_changes_power_mode_and_clocks_when_asked_and_sets_them_back(
    artifact: Path, tmp_path: Path
) -> None:
    trtexec = make_trtexec(tmp_path / "bin", HELP_11_1)
    lines = run_script(
        "measure.sh", artifact, "--dry-run", "--power-mode", "2", "--max-clocks",
        cwd=tmp_path, variables={"TRTEXEC": str(trtexec)},
    ).stdout.splitlines()  # fmt: skip
    assert [line for line in lines if line.startswith("sudo")] == [
        "sudo nvpmodel -m 2",
        "sudo jetson_clocks --store results/clocks.conf",
        "sudo jetson_clocks",
        "sudo jetson_clocks --restore results/clocks.conf",
        "sudo nvpmodel -m MODE_NOW",
    ]


def test_measure_where_the_power_mode_cannot_be_changed_is_refused(artifact: Path, tmp_path: Path) -> None:
    trtexec = make_trtexec(tmp_path / "bin", HELP_11_1)
    make_program(tmp_path / "bin", "nvpmodel", "echo 'permission denied' >&2; exit 1")
    run_script("build.sh", artifact, "--with", "trtexec", cwd=tmp_path, variables={"TRTEXEC": str(trtexec)})
    variables = {"TRTEXEC": str(trtexec), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    said = run_script(
        "measure.sh", artifact, "--power-mode", "2", cwd=tmp_path, code=1, variables=variables
    ).stderr
    assert "could not be read" in said
    assert "--loadEngine" not in (tmp_path / "bin" / "calls").read_text()


def test_measure_without_an_engine_names_the_command(artifact: Path, tmp_path: Path) -> None:
    trtexec = make_trtexec(tmp_path / "bin", HELP_11_1)
    said = run_script(
        "measure.sh", artifact, cwd=tmp_path, code=2, variables={"TRTEXEC": str(trtexec)}
    ).stderr
    assert f"Run build.sh {artifact} --precision int8 first" in said


def test_build_and_measure_write_what_is_merged(artifact: Path, tmp_path: Path) -> None:
    variables = {"TRTEXEC": str(make_trtexec(tmp_path / "bin", HELP_10_3))}
    run_script("build.sh", artifact, "--with", "trtexec", cwd=tmp_path, variables=variables)
    said = run_script("measure.sh", f"{artifact}/", cwd=tmp_path, variables=variables).stderr
    results = tmp_path / "results"
    assert "qexport report RUN --merge results/times.json" in said
    assert {file.name for file in results.glob("*.json")} == {
        f"{name}.json" for name in ("times", "profile", "layers", "board")
    }
    board = read_board(results / "board.json")
    assert board.engine is not None
    assert board.engine.precision == "int8"
    assert board.engine.warmup_ms == 2000
    assert "--separateProfileRun" in board.engine.flags
    assert str(tmp_path) not in board.engine.flags
    assert board.watched is not None
    assert board.watched.samples >= 1


def test_measure_of_an_engine_of_another_network_is_refused(artifact: Path, tmp_path: Path) -> None:
    variables = {"TRTEXEC": str(make_trtexec(tmp_path / "bin", HELP_10_3))}
    run_script("build.sh", artifact, "--with", "trtexec", cwd=tmp_path, variables=variables)
    (artifact / "detector.int8.onnx").write_text("exported again")
    said = run_script("measure.sh", artifact, cwd=tmp_path, code=2, variables=variables).stderr
    assert "was built from another detector.int8.onnx" in said


@pytest.mark.parametrize("is_of_this_network", [True, False])
def test_measure_of_what_qexport_built_asks_its_record(
    is_of_this_network: bool, artifact: Path, tmp_path: Path
) -> None:
    trtexec = make_trtexec(tmp_path / "bin", HELP_10_3)
    (artifact / "engines").mkdir()
    (artifact / "engines" / "detector.int8.engine").write_text("engine")
    network = (artifact / "detector.int8.onnx").read_bytes() if is_of_this_network else b"another"
    record = {"engines": [{"source_sha256": hashlib.sha256(network).hexdigest()}]}
    (artifact / "engines" / "engines.json").write_text(json.dumps(record))
    finished = run_script(
        "measure.sh", artifact, "--dry-run",
        cwd=tmp_path, code=0 if is_of_this_network else 2, variables={"TRTEXEC": str(trtexec)},
    )  # fmt: skip
    assert ("--loadEngine=" in finished.stdout) == is_of_this_network


def test_board_state_holds_what_the_board_tells(tmp_path: Path) -> None:
    state = json.loads(run_script("board.sh", "--root", make_root(tmp_path / "board"), cwd=tmp_path).stdout)
    assert state.pop("at").endswith("+00:00")
    assert state == {
        "power_mode": "MAXN_SUPER (2)",
        "clocks_mhz": {
            "cpu0": 729.6,
            "cpu0 limit": 1728,
            "gpu": 306,
            "gpu lowest": 306,
            "gpu limit": 1020,
        },
        "temperatures_c": {"cpu-thermal": 48.218, "gpu-thermal": 51.5},
        "cooling": {"cooling_device0 gpu-throttle-alert": 1},
        "power_events": {"oc1": 0, "oc3": 27},
        "memory_available_kib": 5012340,
    }


def test_board_state_of_an_empty_folder_is_still_json(tmp_path: Path) -> None:
    state = json.loads(run_script("board.sh", "--root", tmp_path, cwd=tmp_path).stdout)
    assert state["temperatures_c"] == state["cooling"] == state["clocks_mhz"] == {}
    assert state["memory_available_kib"] is None


def test_board_sensor_that_gives_no_number_is_left_out(tmp_path: Path) -> None:
    root = make_root(tmp_path / "board")
    (root / "sys/class/thermal/thermal_zone0/temp").write_text("n/a\n")
    (root / "sys/class/thermal/thermal_zone1/type").write_text('gpu "hot" \\ zone\n')
    state = json.loads(run_script("board.sh", "--root", root, cwd=tmp_path).stdout)
    assert state["temperatures_c"] == {'gpu "hot" \\ zone': 51.5}


def test_board_file_is_read_by_qexport(tmp_path: Path) -> None:
    root = make_root(tmp_path / "board")
    before = tmp_path / "before.json"
    before.write_text(run_script("board.sh", "--root", root, cwd=tmp_path).stdout)
    (root / "sys/class/hwmon/hwmon3/oc3_event_cnt").write_text("30\n")
    after = tmp_path / "after.json"
    after.write_text(run_script("board.sh", "--root", root, cwd=tmp_path).stdout)
    watched = tmp_path / "watched.txt"
    watched.write_text("306 48.5 0\n1020 55.5 1\n918 52 0\n")
    written = run_script(
        "board.sh", "--root", root, "--before", before, "--after", after, "--watched", watched, cwd=tmp_path
    ).stdout
    (tmp_path / "board.json").write_text(written)
    board = read_board(tmp_path / "board.json")
    assert board.model == "NVIDIA Jetson Orin Nano Developer Kit"
    assert (board.l4t, board.jetpack, board.cuda, board.cores) == ("36.4.3", "6", "12.6.68", 3)
    assert board.memory_kib == 7620236
    assert board.watched is not None
    assert (board.watched.samples, board.watched.throttled_samples) == (3, 1)
    assert (board.watched.gpu_highest_mhz, board.watched.hottest_c) == (1020, 55.5)
    assert throttling(board) == (
        "3 power events (oc3)",
        "clocks held back in 1 of 3 s",
        "cooling_device0 gpu-throttle-alert in state 1",
    )


def test_board_watch_prints_clock_heat_and_throttling(tmp_path: Path) -> None:
    root = make_root(tmp_path / "board")
    command = ["sh", str(SCRIPTS / "board.sh"), "--watch", "30", "--root", str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watch:
        assert watch.stdout is not None
        line = watch.stdout.readline()
        watch.kill()
    assert line == "306 51.5 1\n"


def test_board_with_one_of_two_states_is_refused(tmp_path: Path) -> None:
    (tmp_path / "before.json").write_text("{}")
    said = run_script("board.sh", "--before", "before.json", cwd=tmp_path, code=2).stderr
    assert "--before and --after go together" in said


def test_run_on_an_image_without_qexport_names_what_installs_it(artifact: Path, tmp_path: Path) -> None:
    make_program(tmp_path / "bin", "python3", "exit 1")  # a board whose Python has neither
    (tmp_path / "street.jpg").write_text("")
    variables = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "QEXPORT_VENV": str(tmp_path / "none")}
    said = run_script("run.sh", artifact, "street.jpg", cwd=tmp_path, code=3, variables=variables).stderr
    assert "run install.sh" in said


def test_run_on_raw_bytes_gives_them_to_trtexec(artifact: Path, tmp_path: Path) -> None:
    trtexec = make_trtexec(tmp_path / "bin", HELP_8_2)
    (tmp_path / "frame.raw").write_bytes(b"\0")
    printed = run_script(
        "run.sh", artifact, "--raw", "frame:frame.raw", "--dry-run",
        cwd=tmp_path, variables={"TRTEXEC": str(trtexec)},
    ).stdout  # fmt: skip
    assert "--loadInputs=frame:frame.raw --exportOutput=results/outputs.json" in printed


def test_install_on_an_old_python_installs_nothing(tmp_path: Path) -> None:
    make_program(
        tmp_path / "bin", "python3", 'case $1 in --version) echo "Python 3.6.9" ;; *) exit 1 ;; esac'
    )
    trtexec = make_trtexec(tmp_path / "bin", HELP_8_2)
    variables = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "TRTEXEC": str(trtexec)}
    finished = run_script("install.sh", cwd=tmp_path, variables=variables)
    assert "Python 3.6.9; qexport needs 3.10" in finished.stderr
    assert finished.stdout == ""


def test_install_without_the_bindings_names_the_package(tmp_path: Path) -> None:
    body = 'case "$2" in *tensorrt*) exit 1 ;; *) exit 0 ;; esac'
    make_program(tmp_path / "bin", "python3", body)
    variables = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    said = run_script("install.sh", cwd=tmp_path, code=3, variables=variables).stderr
    assert "sudo apt-get install python3-libnvinfer" in said


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
    assert commands[2] == "cd qexport-board && sh scripts/install.sh --from ./qexport-1-py3-none-any.whl"
    assert "build.sh" in commands[3]


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
