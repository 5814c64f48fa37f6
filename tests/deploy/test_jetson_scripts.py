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
    make_trtexec,
    run_script,
)

from qexport.benchmarks.board import read_board

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


def test_measure_that_fails_sets_mode_and_clocks_back(artifact: Path, tmp_path: Path) -> None:
    trtexec = make_trtexec(tmp_path / "bin", HELP_11_1)
    variables = {"TRTEXEC": str(trtexec), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    run_script("build.sh", artifact, "--with", "trtexec", cwd=tmp_path, variables=variables)
    make_trtexec(tmp_path / "bin", HELP_11_1, fails=True)
    make_program(tmp_path / "bin", "nvpmodel", "printf 'NV Power Mode: 15W\\n0\\n'")
    make_program(tmp_path / "bin", "jetson_clocks", "exit 0")
    make_program(tmp_path / "bin", "sudo", f'echo "$@" >>"{tmp_path / "asked"}"')
    said = run_script(
        "measure.sh", artifact, "--power-mode", "2", "--max-clocks", cwd=tmp_path, code=1, variables=variables
    ).stderr
    assert "trtexec could not run results/int8.engine" in said
    assert (tmp_path / "asked").read_text().splitlines() == [
        "nvpmodel -m 2",
        "jetson_clocks --store results/clocks.conf",
        "jetson_clocks",
        "jetson_clocks --restore results/clocks.conf",
        "nvpmodel -m 0",
    ]
    assert not (tmp_path / "results" / "board.json").exists()


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
