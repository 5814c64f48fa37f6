"""A bundle measured: the file that a board brings back, the state it was in, and how a run takes it up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from bundle_fixtures import bundled, edit_file, spoilt
from cli_fixtures import Answer, call, copied, edit_json, place
from test_device_side import run_command_hidden

from qexport.artifact import load_artifact
from qexport.board_state import held_back, hottest_c, read_identity, read_state
from qexport.bundle import open_bundle
from qexport.bundling import WrittenBundle
from qexport.errors import QexportError
from qexport.measurement import Measurement, read_measurement
from qexport.measuring import measure, where_measured
from qexport.results import LatencyProfile

__all__ = ["bundled", "copied", "place", "spoilt"]

PI_FILES = {
    "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    "proc/cpuinfo": "processor\t: 0\nBogoMIPS\t: 108.00\n\nprocessor\t: 1\n\nModel\t: Raspberry Pi 5 Model B\n",
    "proc/meminfo": "MemTotal:        8245680 kB\nMemFree: 1 kB\nMemAvailable:    7012340 kB\n",
    "etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nNAME="Debian GNU/Linux"\n',
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "48850\n",
    "sys/class/thermal/thermal_zone1/type": "rp1\n",
    "sys/class/thermal/thermal_zone1/temp": "not a number\n",
    "sys/class/thermal/cooling_device0/type": "pwm-fan\n",
    "sys/class/thermal/cooling_device0/cur_state": "2\n",
    "sys/class/thermal/cooling_device1/type": "cpufreq-cpu0\n",
    "sys/class/thermal/cooling_device1/cur_state": "0\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1500000\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq": "2400000\n",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "2400000\n",
    "sys/devices/platform/soc/soc:firmware/get_throttled": "0\n",
    "sys/class/hwmon/hwmon1/name": "rpi_volt\n",
    "sys/class/hwmon/hwmon1/in0_lcrit_alarm": "0\n",
    "sys/class/hwmon/hwmon0/name": "cpu_thermal\n",
}
FAST = {"runs": 3, "warmup": 1, "threads": 1, "min_accounted": 0.01}


def make_board(root: Path) -> Path:
    for name, text in PI_FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def board(tmp_path: Path) -> Path:
    """The files of a Raspberry Pi 5 that tell of it."""
    return make_board(tmp_path / "root")


@pytest.fixture(scope="module")
def measured(bundled: WrittenBundle, tmp_path_factory: pytest.TempPathFactory) -> Measurement:
    """The bundle measured on that board; not to be changed."""
    root = make_board(tmp_path_factory.mktemp("root"))
    with open_bundle(bundled.folder) as bundle:
        return measure(bundle, measured_on="device", root=root, **FAST)  # type: ignore[arg-type]


def save(measurement: Measurement, path: Path) -> Path:
    path.write_bytes(msgspec.json.encode(measurement))
    return path


def refused(answer: Answer, *said: str, code: int = 2) -> None:
    assert answer.code == code, answer.err
    assert "Traceback" not in answer.err
    assert [text for text in said if text not in answer.err] == []


# The state of a board


def test_board_tells_its_model_memory_clocks_and_temperature(board: Path) -> None:
    identity, state = read_identity(board), read_state(board)
    assert (identity.model, identity.cores, identity.memory_kib) == (
        "Raspberry Pi 5 Model B Rev 1.0",
        2,
        8245680,
    )
    assert identity.system == "Debian GNU/Linux 12 (bookworm)"
    assert state.temperatures_c == {"thermal_zone0 cpu-thermal": 48.85}
    assert state.clocks_mhz == {"cpu0": 1500.0, "cpu0 limit": 2400.0, "cpu1": 2400.0}
    assert state.cooling == {"cooling_device1 cpufreq-cpu0": 0}
    assert (state.throttled, state.low_voltage, state.memory_available_kib) == ("0x0", False, 7012340)
    assert held_back(state, state) == ()


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ("0", "50005", ("under-voltage", "throttled", "under-voltage in between", "throttled in between")),
        ("80000", "80000", ()),
        ("0", "80000", ("soft temperature limit in between",)),
        ("8", "80008", ("soft temperature limit", "soft temperature limit in between")),
        ("2", "2", ("Arm frequency capped",)),
    ],
)
def test_throttling_flags_are_read_as_the_firmware_means_them(
    before: str, after: str, found: tuple[str, ...], board: Path
) -> None:
    flags = board / "sys/devices/platform/soc/soc:firmware/get_throttled"
    flags.write_text(before + "\n")
    first = read_state(board)
    flags.write_text(after + "\n")
    assert held_back(first, read_state(board)) == found


def test_board_held_back_by_heat_or_voltage_says_so(board: Path) -> None:
    before = read_state(board)
    (board / "sys/class/thermal/cooling_device1/cur_state").write_text("3\n")
    (board / "sys/class/hwmon/hwmon1/in0_lcrit_alarm").write_text("1\n")
    after = read_state(board)
    assert held_back(before, after) == ("low voltage", "cooling_device1 cpufreq-cpu0 in state 3")
    assert hottest_c(before, after) == 48.85


def test_machine_that_tells_nothing_has_empty_answers(tmp_path: Path) -> None:
    state, identity = read_state(tmp_path), read_identity(tmp_path)
    assert (state.temperatures_c, state.clocks_mhz, state.cooling) == ({}, {}, {})
    assert (state.throttled, state.low_voltage, state.memory_available_kib) == (None, None, None)
    assert (identity.model, identity.memory_kib) == ("", None)
    assert hottest_c(state) is None


@pytest.mark.parametrize(
    ("given", "machine", "tree", "expected"),
    [
        (None, "x86_64", False, "host"),
        (None, "aarch64", True, "device"),
        (None, "armv7l", True, "device"),
        ("emulated", "aarch64", True, "emulated"),
        ("device", "x86_64", False, "device"),
    ],
)
def test_place_of_a_measurement_is_what_is_said_or_what_is_plain(
    given: Any, machine: str, tree: bool, expected: str, board: Path, tmp_path: Path
) -> None:
    assert where_measured(given, board if tree else tmp_path, machine) == expected


def test_place_of_a_measurement_that_is_not_plain_has_to_be_said(tmp_path: Path) -> None:
    with pytest.raises(QexportError, match="--measured-on"):
        where_measured(None, tmp_path, "aarch64")


# The measurement


def test_measurement_has_latency_by_layer_memory_and_the_board_before_and_after(
    measured: Measurement, bundled: WrittenBundle, copied: Path
) -> None:
    profile = measured.profile
    assert set(profile.whole) == {"artifact", "fp32"}
    assert profile.whole["artifact"].runs == FAST["runs"]
    assert profile.machine.measured_on == "device"
    assert profile.machine.processor == "Raspberry Pi 5 Model B Rev 1.0"
    assert (profile.machine.clock_mhz, profile.machine.temperature_c) == (2400.0, 48.85)
    assert "onnxruntime" in profile.machine.versions
    assert "torch" not in profile.machine.versions
    assert {row.path for row in profile.layers} >= {"backbone.body.conv1", "roi_heads.box_roi_pool"}
    assert [use.subject for use in measured.memory] == ["artifact", "fp32"]
    assert all(10e6 < use.peak_bytes < 1e9 for use in measured.memory)
    assert 0 < measured.cold_start_s < 60
    assert measured.golden.startswith("identical")
    assert measured.verdicts == bundled.manifest.verdicts
    assert (measured.before.throttled, measured.after.throttled) == ("0x0", "0x0")
    assert measured.artifact_sha256 == load_artifact(Path("mine/onnx"))[0].sha256
    gates = {gate.name: gate for gate in profile.gates}
    assert set(gates) == {"latency accounted", "golden detections", "not throttled"}
    assert all(gate.passed and gate.subject == "onnx" for gate in gates.values())
    assert gates["not throttled"].measured == "nothing held back, hottest 49 °C"


def test_measurement_of_a_throttled_board_fails_its_gate(bundled: WrittenBundle, board: Path) -> None:
    (board / "sys/devices/platform/soc/soc:firmware/get_throttled").write_text("50005\n")
    with open_bundle(bundled.folder) as bundle:
        found = measure(bundle, measured_on="device", root=board, **FAST)  # type: ignore[arg-type]
    gate = next(gate for gate in found.profile.gates if gate.name == "not throttled")
    assert not gate.passed
    assert gate.measured.startswith("under-voltage; throttled")


def test_bench_command_writes_the_file_and_says_what_it_is_marked_as(
    bundled: WrittenBundle, tmp_path: Path
) -> None:
    out = tmp_path / "measurement.json"
    words = ("--runs", "2", "--warmup", "1", "--threads", "2", "--min-accounted", "0.01", "--out", out)
    answer = call("bench", bundled.archive, *words, "--measured-on", "emulated")
    assert answer.code == 0, answer.err
    assert "measured on: emulated" in answer.err
    assert "identical" in answer.out
    assert "parity ok" in answer.out
    found = read_measurement(out)
    assert found.profile.machine.measured_on == "emulated"
    assert found.profile.threads == 2


def test_bench_command_without_torch_and_onnx_measures_layers(bundled: WrittenBundle, tmp_path: Path) -> None:
    words = ("--runs", "2", "--warmup", "1", "--min-accounted", "0.01", "--measured-on", "host")
    text = run_command_hidden("bench", bundled.folder, *words, cwd=tmp_path)
    assert "slowest layers" in text
    found = read_measurement(tmp_path / "measurement.json")
    assert len(found.profile.layers) > 20


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--target", "onnx"), "--target and --again"),
        (("--again",), "--target and --again"),
        (("--out", "BUNDLE/measurement.json"), "lies in the bundle"),
    ],
)
def test_bench_of_a_bundle_refuses_what_is_for_a_run(words: tuple[str, ...], said: str, spoilt: Path) -> None:
    refused(call("bench", spoilt, *(word.replace("BUNDLE", str(spoilt)) for word in words)), said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--target is missing"),
        (("--target", "onnx", "--out", "m.json"), "are for a bundle"),
        (("--target", "onnx", "--measured-on", "device"), "are for a bundle"),
    ],
)
def test_bench_of_a_run_refuses_what_is_for_a_bundle(words: tuple[str, ...], said: str, copied: Path) -> None:
    refused(call("bench", "mine", *words), said)


# Taken up into the run


def test_measurement_merged_stands_in_the_report_beside_the_parity_verdict(
    measured: Measurement, copied: Path
) -> None:
    answer = call("report", "mine", "--merge", save(measured, copied / "measurement.json"))
    assert answer.code == 0, answer.err
    written = Path("mine/onnx/measurements/raspberry-pi-5-model-b-rev-1-0-1-thread.json")
    assert str(written) in answer.out
    profile = msgspec.json.decode(written.read_bytes(), type=LatencyProfile)
    assert profile == measured.profile
    html = Path("mine/report.html").read_text()
    assert "Raspberry Pi 5 Model B Rev 1.0" in html
    assert "golden detections" in html
    rows = Path("mine/latency.csv").read_text().splitlines()
    assert any("device" in row and "Raspberry Pi 5" in row for row in rows)


def test_measurements_with_other_threads_stand_side_by_side(measured: Measurement, copied: Path) -> None:
    for threads in (1, 2):
        profile = msgspec.structs.replace(measured.profile, threads=threads)
        file = save(msgspec.structs.replace(measured, profile=profile), copied / f"{threads}.json")
        assert call("report", "mine", "--merge", file).code == 0
    assert len(list(Path("mine/onnx/measurements").glob("*.json"))) == 2


def test_measurement_of_another_artifact_is_refused_with_both_digests(
    spoilt: Path, board: Path, copied: Path
) -> None:
    edit_file(
        spoilt / "artifact/detector.int8.onnx", lambda data: data + b"\x3a\x00"
    )  # an empty piece of graph
    with open_bundle(spoilt) as bundle:
        other = measure(bundle, measured_on="device", root=board, **FAST)  # type: ignore[arg-type]
    own = load_artifact(Path("mine/onnx"))[0].file("int8").sha256
    answer = call("report", "mine", "--merge", save(other, copied / "other.json"))
    refused(answer, "another artifact", own, other.file_sha256)
    assert not Path("mine/onnx/measurements").exists()


def test_measurement_of_a_target_that_the_run_has_not_is_refused(measured: Measurement, copied: Path) -> None:
    file = save(msgspec.structs.replace(measured, target="tflite"), copied / "m.json")
    refused(call("report", "mine", "--merge", file), "qexport export mine --target tflite")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format_version": 2, "qexport_version": "9.0.0"}, "format 2, made by qexport 9.0.0"),
        ({"board": 3}, "not a Measurement file"),
        ({"kind": "something-else"}, "not a file that can be merged"),
    ],
)
def test_measurement_that_cannot_be_taken_is_refused(
    change: dict[str, Any], said: str, measured: Measurement, copied: Path
) -> None:
    file = save(measured, copied / "m.json")
    edit_json(file, lambda value: value.update(change))
    refused(call("report", "mine", "--merge", file), said)


def test_measurement_that_is_cut_off_is_refused(measured: Measurement, copied: Path) -> None:
    file = save(measured, copied / "m.json")
    file.write_bytes(file.read_bytes()[:-20])
    refused(call("report", "mine", "--merge", file), "m.json")


def test_measurement_among_other_files_is_refused(measured: Measurement, copied: Path) -> None:
    file = save(measured, copied / "m.json")
    (copied / "times.json").write_text(json.dumps([]))
    refused(call("report", "mine", "--merge", file, copied / "times.json"), "one measurement at a time")
