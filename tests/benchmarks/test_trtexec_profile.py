"""From trtexec's files to a LatencyProfile; the samples are written by hand, see trtexec_samples."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from trtexec_samples import (
    ADD,
    BOX,
    CLS,
    CONV1,
    CONV2,
    NAMED_MS,
    UNNAMED_MS,
    artifact,
    board,
    detector_layers,
    write_layers,
    write_measurement,
)

from qexport.artifact import Artifact
from qexport.benchmarks.trtexec_profile import MATCH_GATE, latency_profile, read_measurement
from qexport.errors import ArtifactError
from qexport.results import Gate, LatencyProfile
from qexport.runtimes.runner import NOWHERE


def profile_of(
    files: list[Path], given: Artifact | None = None, min_accounted: float = 0.9
) -> LatencyProfile:
    return latency_profile(
        read_measurement(files),
        artifact=given or artifact(),
        detector_layers=detector_layers(),
        min_accounted=min_accounted,
    )


def gate(profile: LatencyProfile, name: str) -> Gate:
    return next(gate for gate in profile.gates if gate.name == name)


def changed(**changes: object) -> dict[str, object]:
    """Return the state of the board after the measurement, with changes."""
    after = board()["after"]
    assert isinstance(after, dict)
    return after | changes


def test_profile_times_each_module(tmp_path: Path) -> None:
    rows = {row.path: row for row in profile_of(write_measurement(tmp_path)).layers}
    assert {path: row.artifact_ms for path, row in rows.items()} == pytest.approx(
        {"preprocess": 0.1, CONV1: 1.1, CONV2: 0.65, ADD: 0.05, BOX: 0.06, CLS: 0.03, NOWHERE: UNNAMED_MS}
    )
    assert rows[CONV2].kernels == ("correlation", f"kgen (shared with {ADD})")
    assert rows[ADD].kernels == (f"kgen (shared with {CONV2})",)
    assert [rows[path].kind for path in (CONV1, CLS)] == ["convolution", "linear"]
    assert [row.order for row in rows.values()] == list(range(7))


def test_profile_reconciles_layers_with_the_whole_and_states_the_gap(tmp_path: Path) -> None:
    profile = profile_of(write_measurement(tmp_path))
    assert profile.whole["artifact"].runs == 5
    assert profile.whole["artifact"].p50_ms == profile.profiled_whole_ms == 2.2
    assert sum(row.artifact_ms for row in profile.layers) == pytest.approx(NAMED_MS + UNNAMED_MS)
    assert profile.accounted_share == pytest.approx((NAMED_MS + UNNAMED_MS) / 2.2)
    accounted = gate(profile, "latency accounted")
    assert accounted.passed
    assert "gap +0.200 ms" in accounted.measured
    assert f"{UNNAMED_MS:.3f} ms of them in layers that name no module" in accounted.measured


def test_profile_below_the_limit_fails_its_gate(tmp_path: Path) -> None:
    assert not gate(profile_of(write_measurement(tmp_path), min_accounted=0.95), "latency accounted").passed


def test_profile_is_of_the_device(tmp_path: Path) -> None:
    profile = profile_of(write_measurement(tmp_path))
    machine = profile.machine
    assert machine.measured_on == "device"
    assert machine.processor == "NVIDIA Jetson Orin Nano Developer Kit"
    assert machine.versions == {"jetpack": "6.2", "l4t": "36.4.3", "tensorrt": "10.3.0.30", "cuda": "12.6.68"}
    assert (machine.clock_mhz, machine.temperature_c) == (624.75, 55.5)
    assert "power mode 15W (0)" in machine.system
    assert profile.measured_at == "2026-05-04T10:00:09+00:00"
    assert profile.artifact_sha256 == artifact().sha256
    assert gate(profile, "not throttled").passed


def test_profile_saves_and_reads_back(tmp_path: Path) -> None:
    profile = profile_of(write_measurement(tmp_path))
    assert msgspec.json.decode(msgspec.json.encode(profile), type=LatencyProfile) == profile


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"power_events": {"oc1": 0, "oc3": 30}}, "3 power events (oc3)"),
        ({"cooling": {"cooling_device0 gpu-throttle-alert": 1}}, "gpu-throttle-alert in state 1"),
        ({"power_mode": "7W (1)"}, "went from 15W (0) to 7W (1)"),
    ],
)
def test_throttled_board_fails_its_gate(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    held = gate(profile_of(write_measurement(tmp_path, after=changed(**changes))), "not throttled")
    assert not held.passed
    assert said in held.measured


def test_board_that_throttled_while_it_measured_fails_its_gate(tmp_path: Path) -> None:
    watched = board()["watched"]
    assert isinstance(watched, dict)
    files = write_measurement(tmp_path, watched=watched | {"throttled_samples": 2})
    assert "2 of 4 s" in gate(profile_of(files), "not throttled").measured


def test_board_that_does_not_tell_has_no_throttle_gate(tmp_path: Path) -> None:
    silent = changed(power_events={}, cooling={})
    profile = profile_of(write_measurement(tmp_path, before=silent, after=silent, watched=None))
    assert "not throttled" not in [gate.name for gate in profile.gates]
    assert profile.machine.clock_mhz == 624.75  # the limit of the power mode


def test_engine_of_another_onnx_file_is_refused(tmp_path: Path) -> None:
    files = write_measurement(tmp_path)
    with pytest.raises(ArtifactError, match=r"SHA-256 abababababab.*int8\.onnx has efefefefefef"):
        profile_of(files, artifact(sha256="ef" * 32))


def test_engine_of_another_precision_is_refused(tmp_path: Path) -> None:
    engine = board()["engine"]
    assert isinstance(engine, dict)
    files = write_measurement(tmp_path, engine=engine | {"precision": "fp32"})
    with pytest.raises(ArtifactError, match=r"the fp32 engine was measured"):
        profile_of(files)


def test_engine_of_another_network_names_what_differs_first(tmp_path: Path) -> None:
    files = write_measurement(tmp_path, engine=None)
    with pytest.raises(
        ArtifactError,
        match=r"no layer names a module.*begins with '__myl_CastMulAdd.*artifact with 'stem\.0'",
    ):
        latency_profile(
            read_measurement(files), artifact=artifact(("stem.0",)), detector_layers=(), min_accounted=0.9
        )


def test_engine_of_another_detector_names_the_layer_that_is_too_many(tmp_path: Path) -> None:
    files = write_measurement(tmp_path, engine=None)
    with pytest.raises(ArtifactError, match=rf"'{CONV2}/Conv_myl0_15' computes '{CONV2}'.*does not have"):
        latency_profile(
            read_measurement(files), artifact=artifact((CONV1,)), detector_layers=(), min_accounted=0.9
        )


def test_layer_that_the_engine_lacks_is_the_culprit(tmp_path: Path) -> None:
    files = write_measurement(tmp_path)
    write_layers(tmp_path / "layers.json", without_metadata=True)
    found = gate(profile_of(files), MATCH_GATE)
    assert (found.passed, found.measured, found.culprit) == (False, "3 of 4", CLS)


def test_profile_and_layers_of_two_engines_are_refused(tmp_path: Path) -> None:
    files = write_measurement(tmp_path)
    write_layers(tmp_path / "layers.json", rename=(CONV1, "backbone.body.stem"))
    with pytest.raises(ArtifactError, match=rf"not of one engine.*'{CONV1}/Conv_myl0_10'"):
        read_measurement(files)


def test_board_cut_off_after_its_kind_is_refused(tmp_path: Path) -> None:
    files = write_measurement(tmp_path)
    (tmp_path / "board.json").write_text(json.dumps({"kind": "qexport-board", "format_version": 1}))
    with pytest.raises(ArtifactError, match=r"board\.json: not a Board file"):
        read_measurement(files)
