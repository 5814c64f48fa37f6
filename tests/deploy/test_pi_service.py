"""deploy/raspberrypi: the systemd service, its unit and what it runs.

systemd is not running here: its own `systemd-analyze` reads the unit, and the watchdog's messages go to a socket of
the test. sudo, useradd and systemctl are a few lines of shell.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from jetson_board import make_program
from pi_board import SCRIPTS, calls, make_board, make_bundle, run_script


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


@pytest.fixture
def told(tmp_path: Path) -> Iterator[list[str]]:
    """What systemd is told on a socket that stands for its own; the descriptors that come along are closed, as it does.

    The socket has an abstract name: the path of a test is too long for one.
    """
    if shutil.which("systemd-notify") is None:
        pytest.skip("systemd-notify is not on this machine: apt-get install systemd")
    messages: list[str] = []

    def listen(manager: socket.socket) -> None:
        while messages[-1:] != ["end"]:
            message, descriptors, *_ = socket.recv_fds(manager, 1024, 4)
            messages.append(message.decode())
            for descriptor in descriptors:
                os.close(descriptor)

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{tmp_path}")
        thread = threading.Thread(target=listen, args=(manager,))
        thread.start()
        yield messages
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"end", f"\0{tmp_path}")
        thread.join()


def put(state: Path, *names: str) -> None:
    (state / "inbox").mkdir(parents=True, exist_ok=True)
    for name in names:
        (state / "inbox" / name).write_text(name)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    "options", [(), ("--camera", "/dev/video0"), ("--name", "bench-2", "--score", "0.7")]
)
def test_unit_is_taken_by_systemd(options: tuple[str, ...], tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not on this machine: apt-get install systemd")
    unit = tmp_path / "made.service"
    unit.write_text(run_script("service.sh", "--print-unit", *options, cwd=tmp_path).stdout)
    command = [analyze, "verify", "--man=no", str(unit)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


def test_unit_runs_without_rights_is_restarted_and_watched(tmp_path: Path) -> None:
    lines = run_script("service.sh", "--print-unit", cwd=tmp_path).stdout.splitlines()
    assert {
        "Type=notify", "User=qexport", "Restart=on-failure", "RestartPreventExitStatus=2 3", "WatchdogSec=120",
        "StandardOutput=journal", "NoNewPrivileges=yes", "CapabilityBoundingSet=", "ProtectSystem=strict",
        "PrivateNetwork=yes", "PrivateDevices=yes", "StateDirectory=qexport",
    } <= set(lines)  # fmt: skip
    assert (
        "ExecStart=/bin/sh /opt/qexport/scripts/serve.sh /opt/qexport/bundle --venv /opt/qexport/venv --score 0.5 "
        "--threads 1 --keep-days 7"
    ) in lines


def test_unit_of_a_camera_sees_that_device_alone_and_is_always_tried_again(tmp_path: Path) -> None:
    lines = run_script("service.sh", "--print-unit", "--camera", "/dev/video2", cwd=tmp_path).stdout
    assert "DevicePolicy=closed\nDeviceAllow=/dev/video2 rw\nSupplementaryGroups=video\n" in lines
    assert "StartLimitIntervalSec=0\n" in lines
    assert "RestartPreventExitStatus=2\n" in lines  # 3 says that it is unplugged
    assert "PrivateDevices" not in lines


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--name", "../../etc"), ("--name", "Qexport"), ("--camera", "0"), ("--camera", "/dev/video0\nUser=root"),
        ("--score", "0.5 --json /etc/x"), ("--score", "7"), ("--watchdog-s", "1"), ("--threads", "two"),
    ],
)  # fmt: skip
def test_option_that_would_write_something_else_into_the_unit_is_refused(
    option: str, value: str, tmp_path: Path
) -> None:
    said = run_script("service.sh", "--print-unit", option, value, cwd=tmp_path, code=2).stderr
    assert option in said


def test_service_is_installed_enabled_and_started(
    bundle: Path, board: dict[str, str], tmp_path: Path
) -> None:
    for _ in range(2):  # the second time it replaces the first
        run_script("service.sh", bundle, cwd=tmp_path, variables=board)
    place = tmp_path / "board" / "opt" / "qexport"
    assert names_in(place) == {"bundle", "scripts", "venv"}
    assert {"serve.sh", "prelude.sh"} <= names_in(place / "scripts")
    unit = (tmp_path / "board/etc/systemd/system/qexport.service").read_text()
    assert f"ExecStart=/bin/sh {place}/scripts/serve.sh {place}/bundle" in unit
    assert not any("pip" in call or "install.sh" in call for call in calls(tmp_path) if "sudo" in call)
    programs = calls(tmp_path, "calls.programs")
    assert [line for line in programs if line.startswith("useradd")] == [
        "useradd --system --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin qexport"
    ] * 2
    asked = [line for line in programs if line.startswith("systemctl")]
    begun = [
        "systemctl daemon-reload",
        "systemctl enable qexport.service",
        "systemctl restart qexport.service",
    ]
    assert asked == [*begun, "systemctl stop qexport.service", *begun]


def test_service_of_a_board_that_differs_runs_and_says_so(
    bundle: Path, board: dict[str, str], tmp_path: Path
) -> None:
    said = run_script("service.sh", bundle, cwd=tmp_path, variables={**board, "VERIFY_ANSWERS": "1"}).stderr
    assert "does not compute every bit as the workstation did" in said
    assert "systemctl restart qexport.service" in calls(tmp_path, "calls.programs")


@pytest.mark.parametrize("variable", ["VERIFY_ANSWERS", "INSTALL_ANSWERS"])
def test_service_of_a_bundle_that_cannot_be_used_is_not_started(
    variable: str, bundle: Path, board: dict[str, str], tmp_path: Path
) -> None:
    said = run_script("service.sh", bundle, cwd=tmp_path, code=2, variables={**board, variable: "2"}).stderr
    assert "nothing was started" in said
    assert not (tmp_path / "board/etc/systemd/system/qexport.service").exists()


def test_service_of_a_camera_where_qexport_takes_none_is_refused(
    bundle: Path, board: dict[str, str], tmp_path: Path
) -> None:
    words = ("service.sh", bundle, "--camera", "/dev/video0")
    said = run_script(*words, cwd=tmp_path, code=3, variables=board).stderr
    assert "detects in images and folders, not in a camera's frames" in said
    assert calls(tmp_path, "calls.programs") == [
        "useradd --system --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin qexport"
    ]


def test_service_of_a_camera_installs_what_reads_it(
    bundle: Path, board: dict[str, str], tmp_path: Path
) -> None:
    (bundle / "wheel" / "qexport-1-py3-none-any.whl").write_text("")
    make_program(bundle / "wheel", "python", 'echo "python $*" >>"$CALLS"')
    variables = {**board, "DETECT_HELP": "IMAGE|FOLDER|CAMERA"}
    run_script("service.sh", bundle, "--camera", "/dev/video0", cwd=tmp_path, variables=variables)
    place = tmp_path / "board/opt/qexport"
    pip = "python -m pip install --disable-pip-version-check --quiet"
    assert f"{pip} {place}/bundle/wheel/qexport-1-py3-none-any.whl[video]" in calls(tmp_path)
    assert "--camera /dev/video0\n" in (tmp_path / "board/etc/systemd/system/qexport.service").read_text()


def test_service_does_not_replace_another_programs_unit(
    bundle: Path, board: dict[str, str], tmp_path: Path
) -> None:
    unit = tmp_path / "board/etc/systemd/system/cron.service"
    unit.write_text("[Service]\nExecStart=/usr/sbin/cron\n")
    for words in ((bundle,), ("--remove",)):
        said = run_script(
            "service.sh", *words, "--name", "cron", cwd=tmp_path, code=2, variables=board
        ).stderr
        assert "of another program" in said
    assert "cron" in unit.read_text()


def test_service_that_is_removed_leaves_its_images(
    bundle: Path, board: dict[str, str], tmp_path: Path
) -> None:
    run_script("service.sh", bundle, cwd=tmp_path, variables=board)
    said = run_script("service.sh", "--remove", cwd=tmp_path, variables=board).stderr
    assert "/var/lib/qexport stays" in said
    assert not (tmp_path / "board/opt/qexport").exists()
    assert not (tmp_path / "board/etc/systemd/system/qexport.service").exists()


def test_service_dry_run_touches_nothing(bundle: Path, board: dict[str, str], tmp_path: Path) -> None:
    printed = run_script("service.sh", bundle, "--dry-run", cwd=tmp_path, variables=board).stdout
    assert "sudo systemctl restart qexport.service\n" in printed
    assert "Restart=on-failure\n" in printed
    assert calls(tmp_path) == calls(tmp_path, "calls.programs") == []
    assert not (tmp_path / "board/opt").exists()


def test_serve_detects_moves_and_rejects(installed: Path, tmp_path: Path, board: dict[str, str]) -> None:
    state = tmp_path / "state"
    put(state, "a b'c.png", "-z.png", ".part.png", "bad.jpg", "n.PNG", "clip.mp4")
    finished = run_script("serve.sh", installed, "--state", state, "--once", cwd=tmp_path, variables=board)
    assert names_in(state / "inbox") == {".part.png"}
    assert names_in(state / "rejected") == {"bad.jpg", "clip.mp4"}
    assert names_in(state / "done") == {"a b'c.png", "-z.png", "n.PNG"}
    assert "rejected: ./bad.jpg" in finished.stderr
    assert '{"image":"./n.PNG"}\n' in finished.stdout


def test_serve_takes_no_more_than_a_batch_at_a_time(
    installed: Path, tmp_path: Path, board: dict[str, str]
) -> None:
    put(tmp_path / "state", *(f"{number}.png" for number in range(5)))
    run_script(
        "serve.sh", installed, "--state", "state", "--batch", "2", "--once", cwd=tmp_path, variables=board
    )
    images = [call.count("|./") for call in calls(tmp_path)]
    assert images == [0, 2, 2, 1]


@pytest.mark.parametrize("answer", [1, 3])
def test_serve_ends_where_qexport_fails_and_keeps_the_image(
    answer: int, installed: Path, tmp_path: Path, board: dict[str, str]
) -> None:
    put(tmp_path / "state", "crash.png")
    variables = {**board, "DETECT_ANSWERS": str(answer)}
    run_script(
        "serve.sh", installed, "--state", "state", "--once", cwd=tmp_path, code=answer, variables=variables
    )
    assert names_in(tmp_path / "state" / "inbox") == {"crash.png"}


def test_serve_of_a_bundle_that_does_not_run_rejects_no_image(
    bundle: Path, tmp_path: Path, board: dict[str, str]
) -> None:
    broken = bundle.rename(tmp_path / "bad.qbundle")
    run_script("install.sh", broken, cwd=tmp_path, variables=board)
    put(tmp_path / "state", "a.png")
    said = run_script(
        "serve.sh", broken, "--state", "state", "--once", cwd=tmp_path, code=2, variables=board
    ).stderr
    assert "does not detect in its own golden frame" in said
    assert names_in(tmp_path / "state" / "inbox") == {"a.png"}


def test_serve_tells_systemd_that_it_is_ready_and_alive(
    installed: Path, told: list[str], tmp_path: Path, board: dict[str, str]
) -> None:
    put(tmp_path / "state", "a.png")
    variables = {**board, "NOTIFY_SOCKET": f"@{tmp_path}"}
    run_script("serve.sh", installed, "--state", "state", "--once", cwd=tmp_path, variables=variables)
    assert [message for message in told if message != "BARRIER=1"][:3] == [
        "WATCHDOG=1",
        "READY=1",
        "WATCHDOG=1",
    ]


def test_serve_takes_an_image_once_it_is_no_longer_written_to(
    installed: Path, tmp_path: Path, board: dict[str, str]
) -> None:
    put(tmp_path / "state")
    command = ["sh", str(SCRIPTS / "serve.sh"), str(installed), "--state", "state", "--poll-s", "1"]
    environment = {**os.environ, **board}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
    ) as serving:
        put(tmp_path / "state", "later.png")
        assert serving.stdout is not None
        line = serving.stdout.readline()
        serving.terminate()
    assert line == '{"image":"./later.png"}\n'


def test_serve_of_a_camera_passes_its_lines_on_and_fails_when_it_ends(
    installed: Path, tmp_path: Path, board: dict[str, str]
) -> None:
    (tmp_path / "state").mkdir()
    finished = run_script(
        "serve.sh", installed, "--state", "state", "--camera", "/dev/video0",
        cwd=tmp_path, code=1, variables=board,
    )  # fmt: skip
    assert finished.stdout == '{"image":"frame 1"}\n{"image":"frame 2"}\n'
    assert "/dev/video0 gave no more frames" in finished.stderr
