"""deploy/jetson/board.sh over the files of a made-up board, see jetson_board."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from jetson_board import SCRIPTS, make_root, run_script

from qexport.benchmarks.board import read_board, throttling


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
