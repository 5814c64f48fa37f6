"""Reading what trtexec writes; the samples are written by hand after NVIDIA's sources, see trtexec_samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from trtexec_samples import ENGINE, board, write_layers, write_measurement, write_profile, write_times

from qexport.benchmarks.board import read_board
from qexport.benchmarks.trtexec import (
    FILE_KINDS,
    check_same_engine,
    read_layer_info,
    read_profile,
    read_times,
    recognise,
    sort_files,
)
from qexport.errors import ArtifactError


def test_recognise_each_file_by_its_content(tmp_path: Path) -> None:
    files = write_measurement(tmp_path)
    renamed = [file.rename(file.with_suffix(f".{number}")) for number, file in enumerate(files)]
    assert [recognise(file) for file in renamed] == ["board", "layers", "profile", "times"]


@pytest.mark.parametrize("text", ["{}", "[1, 2]", '"times"', '[{"name": "conv"}]'])
def test_recognise_other_file_says_what_was_expected(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(
        ArtifactError, match=r"other\.json: not a file that can be merged.*exportTimes.*measure\.sh"
    ):
        recognise(tmp_path / "other.json")


@pytest.mark.parametrize("name", ["times.json", "profile.json", "layers.json", "board.json"])
def test_file_cut_off_is_refused_by_name(tmp_path: Path, name: str) -> None:
    files = write_measurement(tmp_path)
    path = tmp_path / name
    path.write_text(path.read_text()[:-40])
    with pytest.raises(ArtifactError, match=rf"{name}: no complete JSON .*cut off"):
        sort_files(files)


def test_layer_info_cut_off_when_read_alone_is_refused_by_name(tmp_path: Path) -> None:
    path = write_layers(tmp_path / "layers.json")
    path.write_text(path.read_text()[:100])
    with pytest.raises(ArtifactError, match=r"layers\.json: .*cut off"):
        read_layer_info(path)


def test_sort_files_missing_kind_is_named(tmp_path: Path) -> None:
    files = write_measurement(tmp_path)
    with pytest.raises(
        ArtifactError, match=r"missing: times \(trtexec --exportTimes\); given: .*board\.json"
    ):
        sort_files(files[:3])


def test_sort_files_two_of_a_kind_names_both(tmp_path: Path) -> None:
    files = write_measurement(tmp_path)
    again = write_times(tmp_path / "again.json", [1.0])
    with pytest.raises(ArtifactError, match=r"times\.json and .*again\.json are both times files"):
        sort_files([*files, again])


def test_sort_files_any_order_gives_every_kind(tmp_path: Path) -> None:
    files = write_measurement(tmp_path)
    assert sort_files(files[::-1]) == sort_files(files)
    assert set(sort_files(files)) == set(FILE_KINDS)


def test_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"times\.json: no such file"):
        recognise(tmp_path / "times.json")


def test_read_times_keeps_every_run(tmp_path: Path) -> None:
    times = read_times(write_times(tmp_path / "times.json", [2.5, 2.25]))
    assert [run.latency_ms for run in times.runs] == [2.5, 2.25]
    assert [run.start_compute_ms for run in times.runs] == [0.0, 2.5]
    assert times.counted(1000.0) == times.runs  # from 8.5 on, the warm-up is not in the file


def test_read_times_of_release_8_2_leaves_the_warmup_out(tmp_path: Path) -> None:
    times = read_times(write_times(tmp_path / "times.json", [9.0, 3.0, 2.0, 2.0], release_8_2=True))
    assert times.has_warmup
    assert [run.latency_ms for run in times.counted(10.0)] == [2.0, 2.0]


def test_read_times_of_release_8_2_with_the_warmup_alone_is_refused(tmp_path: Path) -> None:
    times = read_times(write_times(tmp_path / "times.json", [9.0, 3.0], release_8_2=True))
    with pytest.raises(ArtifactError, match=r"all 2 runs belong to the warm-up of 200 ms"):
        times.counted(200.0)


def test_read_times_without_a_run_is_refused(tmp_path: Path) -> None:
    path = write_times(tmp_path / "times.json", [])
    assert recognise(path) == "times"
    with pytest.raises(ArtifactError, match=r"times\.json: no run was timed"):
        read_times(path)


def test_read_times_of_a_run_of_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"run 1 took 0 ms"):
        read_times(write_times(tmp_path / "times.json", [2.0, 0.0]))


def test_read_times_without_a_key_names_it(tmp_path: Path) -> None:
    (tmp_path / "times.json").write_text('[{"latencyMs": 1.0, "computeMs": 1.0}]')
    with pytest.raises(ArtifactError, match=r"run 0: startComputeMs is None"):
        read_times(tmp_path / "times.json")


def test_read_profile_keeps_order_medians_and_means(tmp_path: Path) -> None:
    profile = read_profile(write_profile(tmp_path / "profile.json", count=50))
    expected = [(name, ms) for name, _, _, ms in ENGINE if ms is not None]
    assert profile.runs == 50
    assert [(layer.name, layer.median_ms) for layer in profile.layers] == expected
    assert profile.layers[1].mean_ms == pytest.approx(1.1 * profile.layers[1].median_ms)


def test_read_profile_of_release_8_2_takes_the_mean_for_the_median(tmp_path: Path) -> None:
    profile = read_profile(write_profile(tmp_path / "profile.json", release_8_2=True))
    assert all(layer.median_ms == layer.mean_ms for layer in profile.layers)


def test_read_profile_without_layers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text('[\n  { "count" : 0 }\n]\n')
    with pytest.raises(ArtifactError, match=r"0 runs of 0 layers"):
        read_profile(tmp_path / "profile.json")


def test_read_profile_of_the_times_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"does not begin with the count"):
        read_profile(write_times(tmp_path / "times.json", [1.0]))


def test_read_layer_info_names_the_nodes_behind_a_layer(tmp_path: Path) -> None:
    info = read_layer_info(write_layers(tmp_path / "layers.json"))
    assert [(layer.name, layer.kernel, layer.nodes) for layer in info.layers] == [row[:3] for row in ENGINE]


def test_read_layer_info_with_control_characters_as_they_are_is_read(tmp_path: Path) -> None:
    path = write_layers(tmp_path / "layers.json")
    path.write_text(path.read_text().replace("\\u001e", "\x1e"))
    assert read_layer_info(path).layers[-1].nodes == ENGINE[-1][2]


def test_read_layer_info_of_names_alone_says_which_flag(tmp_path: Path) -> None:
    (tmp_path / "layers.json").write_text(json.dumps({"Layers": ["conv1/Conv"], "Bindings": []}))
    with pytest.raises(ArtifactError, match=r"layers\.json: .*--profilingVerbosity=detailed"):
        read_layer_info(tmp_path / "layers.json")


def test_profile_of_another_engine_names_both_files_and_the_first_layer(tmp_path: Path) -> None:
    profile = read_profile(write_profile(tmp_path / "profile.json", first_name="layer4/Conv_myl0_3"))
    info = read_layer_info(write_layers(tmp_path / "layers.json"))
    with pytest.raises(
        ArtifactError, match=r"profile\.json and .*layers\.json.* 1 of 6 .*'layer4/Conv_myl0_3'"
    ):
        check_same_engine(profile, info)


def test_board_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "board.json").write_text(json.dumps(board(format_version=2)))
    with pytest.raises(ArtifactError, match=r"format 2, this qexport reads 1"):
        read_board(tmp_path / "board.json")
