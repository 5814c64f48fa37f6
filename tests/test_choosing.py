"""The choice of observers by error: what is measured, when another than min-max is taken, and where it is written."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from cli_fixtures import call, copied, place
from conftest import Frame

from qexport.benchmarks.report import build_report
from qexport.calibration.calibrator import Observed, calibrate, show, show_and_choose, watch
from qexport.calibration.choosing import (
    HELD_OUT,
    MARGIN_DB,
    Tensors,
    choose_observers,
    is_held_out,
    take_stages,
)
from qexport.detectors.static import StaticDetector
from qexport.encodings import load_encodings
from qexport.errors import CalibrationError, RunFolderError
from qexport.files import read_json
from qexport.observer_results import MIN_MAX, OBSERVERS, ObserverReport
from qexport.quantization.local import Recorder
from qexport.settings import ObserverName

__all__ = ["copied", "place"]
STEM, SECOND = "backbone.0@0/output:conv2d", "backbone.3@0/output:conv2d"
HEADS = ("rpn.head.cls_logits", "rpn.head.bbox_pred", "roi_heads.box_predictor.")


@pytest.fixture
def observed(small_static: StaticDetector, small_frames: list[Frame]) -> Observed:
    found = watch(small_static, observer="auto", percentile=99.99, keep_float=())
    show(found, small_frames[:2])
    return found


def test_every_fourth_frame_is_held_out_until_there_are_enough() -> None:
    held = [place for place in range(1000) if is_held_out(place)]
    assert len(held) == HELD_OUT
    assert held[:3] == [1, 5, 9]


def test_table_of_auto_holds_the_scales_of_the_observers_that_it_names(
    small_static: StaticDetector, small_frames: list[Frame]
) -> None:
    found: list[ObserverReport] = []
    table = calibrate(small_static, small_frames, observer="auto", on_choice=found.append)
    assert table.calibration == {"observer": "auto", "images": len(small_frames)}
    ways: dict[str, tuple[ObserverName, float]] = {
        "min-max": ("min-max", 99.99),
        "mse": ("mse", 99.99),
        "percentile 99.99": ("percentile", 99.99),
        "percentile 99.999": ("percentile", 99.999),
    }
    by_way = {
        name: calibrate(small_static, small_frames, observer=observer, percentile=percentile).by_key()
        for name, (observer, percentile) in ways.items()
    }
    rows = table.by_key()
    chosen = {tensor.key: tensor.chosen for tensor in found[0].tensors}
    assert len(set(chosen.values())) > 1
    for key, name in chosen.items():
        assert rows[key].source == name
        assert rows[key].params == by_way[name][key].params
    again: list[ObserverReport] = []
    assert calibrate(small_static, small_frames, observer="auto", on_choice=again.append) == table
    assert again == found


def test_error_is_that_of_the_layer_that_reads_the_tensor(
    observed: Observed, small_static: StaticDetector, small_frames: list[Frame]
) -> None:
    tensors = Tensors(observed.graph, tuple(observed.activations()))
    scale = float(tensors.observers[STEM].scale_by("mse", 100.0))
    frame = small_frames[2]
    report = choose_observers(tensors, [frame], images=2)
    recorder = Recorder(observed.graph, {"relu": "stem"})
    with torch.no_grad():
        recorder.run(torch.from_numpy(frame))
        stem = recorder.values["stem"]
        reader = small_static.get_submodule("backbone.3")
        wanted, found = (
            torch.relu(reader(value))
            for value in (stem, torch.fake_quantize_per_tensor_affine(stem, scale, 0, -128, 127))
        )
    ratio = float((wanted - found).double().square().sum() / wanted.double().square().sum())
    measured = next(tensor for tensor in report.tensors if tensor.key == STEM).sqnr_db["mse"]
    assert measured == pytest.approx(-10 * math.log10(ratio), abs=1e-3)


def test_another_observer_is_taken_for_a_clear_gain_alone_and_never_at_the_heads(
    observed: Observed, small_frames: list[Frame]
) -> None:
    report = choose_observers(
        Tensors(observed.graph, tuple(observed.activations())), small_frames[2:], images=2
    )
    assert {tensor.key for tensor in report.tensors} >= {STEM, SECOND}
    for tensor in report.tensors:
        before, after = tensor.sqnr_db.get(MIN_MAX), tensor.sqnr_db.get(tensor.best)
        if tensor.best != MIN_MAX:
            assert before is not None and after is not None
            assert after - before >= MARGIN_DB
        if tensor.key.startswith(HEADS):
            assert (tensor.chosen, tensor.sqnr_db) == (MIN_MAX, {})
    assert report.chosen_db is not None and report.min_max_db is not None
    assert report.chosen_db >= report.min_max_db
    assert any(stage.taken for stage in report.stages)


def test_choices_of_a_stage_that_the_heads_lose_by_are_left(
    observed: Observed, small_frames: list[Frame]
) -> None:
    tensors = Tensors(observed.graph, tuple(observed.activations()))
    scales = {key: {MIN_MAX: float(one.scale_by("min-max", 100.0))} for key, one in tensors.observers.items()}
    scales[STEM]["much too small"] = scales[STEM][MIN_MAX] / 50
    stages, taken, (before, after) = take_stages(tensors, scales, {STEM: "much too small"}, small_frames[2:])
    assert [(stage.stage, stage.taken) for stage in stages] == [("trunk", False)]
    assert not taken
    assert before == after


def test_tensors_with_a_scale_from_elsewhere_are_not_chosen_and_count_with_that_scale(
    small_static: StaticDetector, small_frames: list[Frame]
) -> None:
    reports = []
    for fixed in ({STEM: 0.05}, {STEM: 5.0}):
        watched = watch(small_static, observer="auto", percentile=99.99, keep_float=())
        images, report = show_and_choose(watched, small_frames, fixed=fixed)
        assert images == len(small_frames)
        assert STEM not in {tensor.key for tensor in report.tensors}
        reports.append(report.min_max_db)
    fine, coarse = reports
    assert fine is not None and coarse is not None
    assert fine > coarse + 10


def test_auto_of_one_image_is_refused(small_static: StaticDetector, small_frames: list[Frame]) -> None:
    with pytest.raises(CalibrationError, match=r"there is 1 calibration image.*--images 64"):
        calibrate(small_static, small_frames[:1], observer="auto")


def test_calibrate_command_writes_the_choice_shows_it_and_takes_it_away_again(copied: Path) -> None:
    run = copied / "mine"
    answer = call("calibrate", run, "--observer", "auto")
    assert answer.code == 0, answer.err
    report = read_json(run / OBSERVERS, ObserverReport, RunFolderError)
    assert report.rows_sha256 == load_encodings(run / "encodings.json").rows_sha256
    assert "min-max for all" in answer.out
    assert f"{report.chosen_db:.2f}" in answer.out
    page = build_report(run, dataset_root=None).html.read_text()
    section = page[page.index('id="observers"') :]
    assert f"{report.chosen_db:.1f} dB" in section
    assert "box arithmetic reads it" in section
    assert call("calibrate", run, "--observer", "min-max").code == 0
    assert not (run / OBSERVERS).exists()
    assert 'id="observers"' not in build_report(run, dataset_root=None).html.read_text()
