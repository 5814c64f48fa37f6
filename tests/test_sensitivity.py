"""Which layers cost the accuracy, and the search for the fastest configuration inside a budget."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from cli_fixtures import call, copied, place

from qexport import pipeline
from qexport.benchmarks.sensitivity import Unit, make_units, measure_noise
from qexport.benchmarks.trade_off import search
from qexport.encodings import load_encodings
from qexport.errors import QexportError, RunFolderError
from qexport.files import read_json
from qexport.quantization.partial import PartlyQuantized
from qexport.quantization.reference import quantize
from qexport.results import AccuracyReport, Interval, LatencyProfile
from qexport.sensitivity import measure_sensitivity
from qexport.sensitivity_results import Grain, Point, SensitivityReport
from qexport.work import Work

__all__ = ["copied", "place"]

UNITS = tuple(
    Unit(f"unit{index}", "trunk", (f"path{index}",), (f"path{index}",), macs=1, weight_bytes=1)
    for index in range(16)
)
NONE = Interval(low=0.0, high=0.0, level=0.95)


def point_of(units: Sequence[Unit], drop: float) -> Point:
    return Point(
        keep_float=tuple(pattern for unit in units for pattern in unit.patterns),
        units=len(units),
        voc_map50=1 - drop,
        coco_map=1 - drop,
        voc_drop=drop,
        coco_drop=drop / 2,
        voc_drop_interval=NONE,
        coco_drop_interval=NONE,
        float_macs=0.0,
        weight_bytes=0,
        latency_ms=None,
    )


def evaluating(needed: set[str], asked: list[frozenset[str]]) -> Callable[[Sequence[Unit]], Point]:
    """Return an evaluation in which each needed unit that is int8 costs a point."""

    def evaluate(units: Sequence[Unit]) -> Point:
        names = frozenset(unit.name for unit in units)
        asked.append(names)
        return point_of(units, 0.01 * len(needed - names))

    return evaluate


def test_search_keeps_all_int8_where_it_is_inside_the_budget() -> None:
    asked: list[frozenset[str]] = []
    found = search(UNITS, dict.fromkeys((u.name for u in UNITS), 1.0), evaluating(set(), asked), max_drop=0.0)
    assert found.chosen == 0
    assert found.points[0].units == 0
    assert len(asked) == 1


def test_search_finds_what_is_needed_with_few_evaluations() -> None:
    asked: list[frozenset[str]] = []
    costs = {unit.name: float(index + 1) for index, unit in enumerate(UNITS)}
    found = search(UNITS, costs, evaluating({"unit0", "unit4"}, asked), max_drop=0.0)
    assert found.chosen is not None
    floats = set(found.points[found.chosen].keep_float)
    assert floats == {"path0", "path4"}  # 1, 2 and 3 were tried in int8 again
    assert len(asked) == len(set(asked))
    # The ends, the bisection, and each unit that it came to: five, then the two that were left of them.
    assert len(asked) <= 2 + math.ceil(math.log2(len(UNITS))) + 5 + 2


def test_search_tries_again_what_others_that_are_gone_made_needed() -> None:
    """Without unit1, unit0 alone is enough; beside it unit2 is needed, which is the dearer one."""
    costs = {unit.name: float(index + 1) for index, unit in enumerate(UNITS)}

    def evaluate(units: Sequence[Unit]) -> Point:
        names = {unit.name for unit in units}
        inside = "unit0" in names and ("unit1" not in names or "unit2" in names)
        return point_of(units, 0.0 if inside else 0.01)

    order = (UNITS[1], UNITS[0], *UNITS[2:])
    found = search(order, costs, evaluate, max_drop=0.0)
    assert found.chosen is not None
    assert found.points[found.chosen].keep_float == ("path0",)


def test_search_that_cannot_keep_the_budget_chooses_nothing_and_has_the_nearest() -> None:
    asked: list[frozenset[str]] = []
    costs = {unit.name: 1.0 for unit in UNITS}
    found = search(UNITS, costs, lambda units: point_of(units, 0.05 - 0.001 * len(units)), max_drop=0.01)
    assert found.chosen is None
    assert min(point.drop for point in found.points) == pytest.approx(0.05 - 0.016)
    assert not asked


@dataclass(frozen=True, slots=True)
class Sensed:
    """A run whose sensitivity was measured by block; tests only read it."""

    folder: Path
    work: Work
    report: SensitivityReport


@pytest.fixture(scope="module")
def sensed(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Sensed:
    folder = tmp_path_factory.mktemp("sensed")
    shutil.copytree(place, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        work = pipeline.resume(Path("mine"))
        report = measure_sensitivity(
            work, target="onnx", grain="block", split="train", max_drop=1e-4, below_noise=True
        )
    return Sensed(folder, work, report)


def test_units_of_every_grain_hold_each_quantized_layer_once(sensed: Sensed) -> None:
    layers = sensed.work.subject.layers
    wanted = sorted({layer.path for layer in layers if layer.quantized})
    assert {"backbone.fpn", "roi_heads.box_roi_pool", "backbone.body.layer1.0"} <= set(wanted)
    for grain in ("layer", "block", "stage"):
        units = make_units(layers, grain)
        assert sorted(path for unit in units for path in unit.paths) == wanted
    assert (
        len(make_units(layers, "stage")) < len(make_units(layers, "block")) < len(make_units(layers, "layer"))
    )


@pytest.mark.parametrize("grain", ["layer", "block", "stage"])
def test_nothing_is_quantized_with_every_unit_in_float(sensed: Sensed, grain: Grain) -> None:
    units, partly = make_units(sensed.work.subject.layers, grain), PartlyQuantized(sensed.work.quantized)
    assert partly.keys_with([pattern for unit in units for pattern in unit.patterns])[0] == frozenset()


def test_unit_with_layers_of_others_below_it_leaves_only_itself_in_float(sensed: Sensed) -> None:
    partly = PartlyQuantized(sensed.work.quantized)
    fpn = next(
        unit for unit in make_units(sensed.work.subject.layers, "block") if unit.name == "backbone.fpn"
    )
    assert fpn.paths == ("backbone.fpn",)
    kept, plan = partly.keys_with(fpn.patterns)
    assert {row.path for row in plan.float_rows if row.path.startswith("backbone")} == {"backbone.fpn"}
    assert "backbone.fpn.layer_blocks.0.0@0/weight" in kept


def test_rows_of_a_sum_are_what_it_reads_and_what_it_gives(sensed: Sensed) -> None:
    partly = PartlyQuantized(sensed.work.quantized)
    rows = partly.rows_of("backbone.body.layer1.0")
    assert len(rows) == 3
    assert {key.partition("/")[2].partition(":")[0] for key in rows} == {"output"}


def test_noise_of_a_unit_left_float_is_that_of_the_detector_quantized_without_it(sensed: Sensed) -> None:
    work = sensed.work
    partly, outputs = PartlyQuantized(work.quantized), ["rpn.head.cls_logits", "rpn.head.bbox_pred"]
    unit = next(
        each for each in make_units(work.subject.layers, "block") if each.name == "backbone.body.layer1"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(sensed.folder)
        frames = list(work.subject.inputs(work.subject.parity_samples()))
    rows, whole_db = measure_noise(work.quantized, partly, [unit], frames)
    without = quantize(work.subject.static, partly.encodings_with(work.encodings, unit.patterns))
    assert set(outputs) <= set(partly.head_outputs())
    again, _ = measure_noise(without, PartlyQuantized(without), [], frames)
    assert again == ()
    _, left_db = measure_noise(without, PartlyQuantized(without), [], frames)
    assert rows[0].left_float_db == pytest.approx(left_db, abs=1e-6)
    assert whole_db is not None
    assert rows[0].alone_db is not None
    assert rows[0].alone_db > whole_db  # one unit alone is less noise than all


def test_first_point_is_all_int8_and_its_accuracy_is_what_evaluate_says(copied: Path) -> None:
    work = pipeline.resume(Path("mine"))
    report = measure_sensitivity(work, target=None, grain="stage", split="test", max_drop=None)
    accuracy = read_json(Path("mine/accuracy.json"), AccuracyReport, RunFolderError)
    reference = next(each for each in accuracy.subjects if each.subject == "reference")
    assert len(report.points) == 1
    assert (report.points[0].voc_map50, report.points[0].coco_map) == (
        reference.voc_map50,
        reference.coco_map,
    )
    assert report.points[0].latency_ms is None
    assert report.chosen is None


def test_predicted_latency_begins_at_what_was_measured_and_grows_with_float_units(sensed: Sensed) -> None:
    profile = read_json(sensed.folder / "mine/onnx/latency.json", LatencyProfile, RunFolderError)
    first, rest = sensed.report.points[0], sensed.report.points[1:]
    assert first.latency_ms == pytest.approx(profile.whole["artifact"].p50_ms)
    assert all(point.latency_ms is not None and point.latency_ms > first.latency_ms for point in rest)


def test_chosen_table_is_that_of_the_point(sensed: Sensed) -> None:
    report = sensed.report
    assert report.chosen is not None
    table = load_encodings(sensed.folder / "mine/sensitivity/encodings.json")
    assert table.keep_float == report.points[report.chosen].keep_float
    assert report.points[report.chosen].drop <= 1e-4
    assert report.gates[0].passed


def test_measured_points_are_not_measured_again(sensed: Sensed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sensed.folder)
    points = Path("mine/sensitivity/points")
    before = {path.name: path.stat().st_mtime_ns for path in points.iterdir()}
    again = measure_sensitivity(
        sensed.work, target="onnx", grain="block", split="train", max_drop=1e-4, below_noise=True
    )
    assert again == sensed.report
    assert {path.name: path.stat().st_mtime_ns for path in points.iterdir()} == before


def test_budget_below_the_noise_of_the_split_is_refused(copied: Path) -> None:
    answer = call("sensitivity", "mine", "--by", "stage", "--split", "train", "--max-drop", "0.0001")
    assert answer.code == 2
    assert "95 % paired bootstrap" in answer.err
    assert "--below-noise" in answer.err
    assert not Path("mine/sensitivity.json").exists()


def test_sensitivity_without_a_timed_target_names_the_command(copied: Path) -> None:
    answer = call("sensitivity", "mine", "--target", "tflite")
    assert answer.code == 2
    assert "qexport bench mine --target tflite" in answer.err


def test_sensitivity_command_shows_stages_and_says_where_it_wrote(copied: Path) -> None:
    answer = call("sensitivity", "mine", "--by", "stage")
    assert answer.code == 0, answer.err
    for stage in ("trunk", "fpn", "rpn_head", "box_head"):
        assert stage in answer.out
    assert "mine/sensitivity.json" in answer.out


def test_split_that_is_not_there_is_refused(copied: Path) -> None:
    work = pipeline.resume(Path("mine"))
    with pytest.raises(QexportError, match="validate"):
        measure_sensitivity(work, target=None, grain="stage", split="validate", max_drop=None)


def test_table_with_float_rows_enters_a_run_with_them(copied: Path) -> None:
    assert call("calibrate", "mine", "--keep-float", "backbone.body.layer1").code == 0
    words = ("--qat", "mine/encodings.json", "--model", "demo", "--data", "data", "--out", "new")
    answer = call("inspect", *words)
    assert answer.code == 0, answer.err
    assert call("calibrate", "new").code == 0
    kept, taken = (load_encodings(Path(run) / "encodings.json") for run in ("mine", "new"))
    assert taken.keep_float == ("backbone.body.layer1",)
    assert {row.key for row in taken.rows} == {row.key for row in kept.rows}
    assert {row.path for row in taken.float_rows} == {row.path for row in kept.float_rows}
