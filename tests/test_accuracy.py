from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.benchmarks import voc
from qexport.benchmarks.accuracy import evaluate
from qexport.benchmarks.coco import average_precision, coco_evaluator, match_coco
from qexport.benchmarks.matches import draw_images
from qexport.dataset import load_dataset
from qexport.detections import Detections
from qexport.errors import DatasetError, ParityError
from qexport.results import Accuracy
from qexport.samples import Box, Dataset, Sample

BCCD = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "bccd"
SIZE = 250.0
NEAR = (10.0, 10.0, 50.0, 50.0)
FAR = (100.0, 100.0, 160.0, 160.0)
ELSEWHERE = (60.0, 10.0, 90.0, 40.0)


def dataset_of(*images: list[Box], classes: tuple[str, ...] = ("cat",)) -> Dataset:
    samples = tuple(
        Sample(Path(f"{number}.png"), number, int(SIZE), int(SIZE), tuple(boxes))
        for number, boxes in enumerate(images, start=1)
    )
    return Dataset("d", Path("d"), "test", "coco", ("__background__", *classes), samples, (), "0")


def found(*rows: tuple[tuple[float, float, float, float], float, int]) -> Detections:
    return Detections(
        boxes=np.array([row[0] for row in rows], dtype=np.float32).reshape(-1, 4),
        scores=np.array([row[1] for row in rows], dtype=np.float32),
        labels=np.array([row[2] for row in rows], dtype=np.int64),
    )


def perfect(dataset: Dataset) -> list[Detections]:
    return [found(*((box.xyxy, 0.9, box.label) for box in sample.boxes)) for sample in dataset.samples]


def measure(dataset: Dataset, detections: list[Detections]) -> Accuracy:
    report = evaluate(dataset, {"eager": detections}, bootstrap=20, max_drop=0.01)
    return report.subjects[0]


def random_case(seed: int, images: int = 12, classes: int = 3) -> tuple[Dataset, list[Detections]]:
    """Objects of all three COCO sizes, some difficult, some crowds; detections near them and elsewhere."""
    random = np.random.default_rng(seed)
    truth, answers = [], []
    for _ in range(images):
        corners = random.uniform(0, SIZE / 2, (random.integers(0, 6), 2))
        sides = random.choice([12, 50, 125], (len(corners), 1)) * random.uniform(0.8, 1.0, (len(corners), 2))
        boxes = np.hstack([corners, corners + sides])
        labels = random.integers(1, classes + 1, len(boxes))
        flags = random.random((len(boxes), 2)) < (0.0, 0.1)
        truth.append(
            [
                Box(int(label), tuple(box.tolist()), bool(difficult), bool(crowd))
                for label, box, (difficult, crowd) in zip(labels, boxes, flags, strict=True)
            ]
        )
        copies = np.repeat(np.arange(len(boxes)), random.integers(0, 4, len(boxes)))
        shifted = boxes[copies] + random.normal(0, 3, (len(copies), 4))
        strays = random.uniform(0, SIZE / 2, (3, 2))
        near = np.vstack([shifted, np.hstack([strays, strays + 30])])
        near_labels = np.concatenate([labels[copies], random.integers(1, classes + 1, 3)])
        # Two decimals, so that equal scores occur.
        scores = random.random(len(near)).round(2)
        answers.append(found(*zip(map(tuple, near.tolist()), scores, near_labels, strict=True)))
    return dataset_of(*truth, classes=tuple("abcdefgh"[:classes])), answers


def test_voc_perfect_detections_give_one() -> None:
    dataset = dataset_of([Box(1, NEAR), Box(1, FAR)], [Box(1, NEAR)])
    result = measure(dataset, perfect(dataset))
    assert (result.voc_map50, result.voc_map50_11point) == (1.0, 1.0)
    assert result.coco_map == pytest.approx(1.0, abs=1e-12)
    assert result.classes[0].objects == 3


def test_voc_hand_computed_curve() -> None:
    # By falling score: hit, miss, hit; the third object is never found.
    # Precision at the hits 1 and 2/3, recall 1/3 and 2/3.
    dataset = dataset_of([Box(1, NEAR), Box(1, FAR)], [Box(1, NEAR)])
    answers = [found((NEAR, 0.9, 1), (ELSEWHERE, 0.8, 1), (FAR, 0.7, 1)), found()]
    row = measure(dataset, answers).classes[0]
    assert row.voc_ap50 == pytest.approx(1 / 3 * 1 + 1 / 3 * 2 / 3)
    # Recalls 0 to 0.3 see precision 1, 0.4 to 0.6 see 2/3, 0.7 to 1 are not reached.
    assert row.voc_ap50_11point == pytest.approx((4 * 1 + 3 * 2 / 3) / 11)
    assert row.precision == pytest.approx((1.0, 2 / 3))
    assert row.recall == pytest.approx((1 / 3, 2 / 3))
    # 101 recalls: 0 to 0.33 (34 of them) see 1, 0.34 to 0.66 (33) see 2/3; the boxes fit at every threshold.
    assert row.coco_ap == pytest.approx((34 * 1 + 33 * 2 / 3) / 101)


def test_voc_duplicate_detection_is_a_miss() -> None:
    dataset = dataset_of([Box(1, NEAR), Box(1, FAR)])
    row = measure(dataset, [found((NEAR, 0.9, 1), (NEAR, 0.8, 1), (FAR, 0.7, 1))]).classes[0]
    assert row.voc_ap50 == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_voc_later_duplicate_does_not_take_a_worse_object() -> None:
    # The second detection overlaps NEAR most; the devkit gives it no other object.
    beside = (14.0, 10.0, 54.0, 50.0)
    dataset = dataset_of([Box(1, NEAR), Box(1, beside)])
    row = measure(dataset, [found((NEAR, 0.9, 1), (NEAR, 0.8, 1))]).classes[0]
    assert row.voc_ap50 == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("flags", "expected"), [((True, False), 1.0), ((False, True), 1.0), ((False, False), 0.5)]
)
def test_voc_difficult_object_is_ignored_found_or_not(flags: tuple[bool, bool], expected: float) -> None:
    dataset = dataset_of([Box(1, NEAR), Box(1, FAR, *flags)])
    not_found = measure(dataset, [found((NEAR, 0.9, 1))]).classes[0]
    assert not_found.voc_ap50 == pytest.approx(expected)
    # Found, and found again: neither hits nor misses.
    twice = found((FAR, 0.99, 1), (FAR, 0.98, 1), (NEAR, 0.9, 1))
    if expected == 1.0:
        assert measure(dataset, [twice]).classes[0].voc_ap50 == 1.0
        assert measure(dataset, [found((FAR, 0.99, 1), (NEAR, 0.9, 1))]).coco_map == pytest.approx(1.0)


@pytest.mark.parametrize(("width", "expected"), [(20.0, 1.0), (19.9, 0.0)])
def test_voc_iou_of_exactly_half_is_a_hit(width: float, expected: float) -> None:
    dataset = dataset_of([Box(1, (0.0, 0.0, 40.0, 40.0))])
    assert measure(dataset, [found(((0.0, 0.0, width, 40.0), 0.9, 1))]).voc_map50 == expected


def test_voc_11_points_reach_a_recall_of_three_tenths() -> None:
    # 3/10 as a float is below 3 * 0.1.
    boxes = [Box(1, (20.0 * k, 0.0, 20.0 * k + 10, 10.0)) for k in range(10)]
    answers = found(*((box.xyxy, 0.9, 1) for box in boxes[:3]))
    assert measure(dataset_of(boxes), [answers]).voc_map50_11point == pytest.approx(4 / 11)


def test_evaluate_no_detections_gives_zero() -> None:
    dataset = dataset_of([Box(1, NEAR)], [Box(1, FAR)])
    result = measure(dataset, [found(), found()])
    assert (result.voc_map50, result.voc_map50_11point, result.coco_map) == (0.0, 0.0, 0.0)
    assert (result.classes[0].precision, result.classes[0].recall) == ((), ())


def test_evaluate_class_without_objects_is_none_and_not_in_the_mean() -> None:
    dataset = dataset_of([Box(1, NEAR)], classes=("cat", "N/A", "dog"))
    result = measure(dataset, [found((NEAR, 0.9, 1), (FAR, 0.9, 3))])
    assert [row.label for row in result.classes] == ["cat", "dog"]
    dog = result.classes[1]
    assert (dog.objects, dog.voc_ap50, dog.voc_ap50_11point, dog.coco_ap, dog.coco_ap50) == (0, *[None] * 4)
    assert (dog.precision, dog.recall) == ((), ())
    assert result.voc_map50 == 1.0
    assert (result.coco_map_small, result.coco_map_large) == (None, None)
    assert result.coco_map_medium == pytest.approx(1.0)


def test_evaluate_declared_area_decides_the_size_range() -> None:
    dataset = dataset_of([Box(1, NEAR, area_px=100.0)])
    result = measure(dataset, perfect(dataset))
    assert result.coco_map_small == pytest.approx(1.0)
    assert result.coco_map_medium is None


@pytest.mark.parametrize("seed", range(4))
def test_coco_figures_equal_pycocotools_summary(seed: int) -> None:
    dataset, answers = random_case(seed)
    result = measure(dataset, answers)
    evaluator = coco_evaluator(dataset, answers)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.accumulate()
        evaluator.summarize()
    ours = [
        result.coco_map,
        result.coco_map50,
        result.coco_map75,
        result.coco_map_small,
        result.coco_map_medium,
        result.coco_map_large,
    ]
    assert 0.05 < result.coco_map < 0.95
    np.testing.assert_allclose(ours, evaluator.stats[:6], atol=1e-12)
    per_class = evaluator.eval["precision"][:, :, :, 0, 2].mean(axis=(0, 1))
    np.testing.assert_allclose([row.coco_ap for row in result.classes], per_class, atol=1e-12)


def test_resampled_images_equal_evaluating_the_copies() -> None:
    dataset, answers = random_case(5, images=6)
    weights = draw_images(6, 5, seed=1)
    coco_matches = match_coco(dataset, answers)
    for row, counts in enumerate(weights):
        # Copies of an image stand beside each other, as they do in the order of equal scores.
        drawn = np.repeat(np.arange(6), counts)
        copies = dataset_of(*(list(dataset.samples[i].boxes) for i in drawn), classes=("a", "b", "c"))
        copied = [answers[i] for i in drawn]
        evaluator = coco_evaluator(copies, copied)
        with contextlib.redirect_stdout(io.StringIO()):
            evaluator.accumulate()
        for k, label in enumerate((1, 2, 3)):
            expected = evaluator.eval["precision"][:, :, k, 0, 2].mean(axis=1)
            ours = average_precision(coco_matches.everything[k], weights)[:, row]
            np.testing.assert_allclose(np.nan_to_num(ours, nan=-1.0), expected, atol=1e-12)
            again = voc.match_voc(copies, copied, label)
            once = voc.match_voc(dataset, answers, label)
            for average in (voc.ap_all_points, voc.ap_11_points):
                np.testing.assert_allclose(average(once, weights)[row], average(again, again.whole)[0])


def test_evaluate_intervals_hold_the_figure_and_pair_the_drops() -> None:
    dataset, answers = random_case(7, images=30)
    worse = [Detections(a.boxes + 4, a.scores, a.labels) for a in answers]
    report = evaluate(dataset, {"eager": answers, "same": answers, "onnx": worse}, max_drop=0.01)
    eager, same, onnx = report.subjects
    for low_high, value in (
        (eager.voc_map50_interval, eager.voc_map50),
        (eager.coco_map_interval, eager.coco_map),
    ):
        assert low_high.low < value < low_high.high
        assert low_high.level == 0.95
    assert eager.voc_drop_interval is None
    assert same.voc_drop_interval is not None
    assert (same.voc_drop_interval.low, same.voc_drop_interval.high) == (0.0, 0.0)
    assert onnx.coco_drop_interval is not None
    assert onnx.coco_drop_interval.low < onnx.coco_map - eager.coco_map < onnx.coco_drop_interval.high < 0
    assert [(gate.name, gate.passed) for gate in report.gates] == [
        ("VOC mAP drop", True),
        ("COCO mAP drop", True),
        ("VOC mAP drop", False),
        ("COCO mAP drop", False),
    ]
    drop = eager.coco_map - onnx.coco_map
    assert report.gates[3].measured == f"{drop:.4f} ({eager.coco_map:.4f} -> {onnx.coco_map:.4f}), onnx"
    assert report.gates[3].limit == "at most 0.01"


def test_evaluate_drop_of_exactly_the_limit_passes() -> None:
    dataset = dataset_of(*([Box(1, NEAR)] for _ in range(10)))
    answers = perfect(dataset)
    fewer = [*answers[:9], found()]
    gates = evaluate(dataset, {"eager": answers, "onnx": fewer}, max_drop=0.1, bootstrap=5).gates
    assert [gate.passed for gate in gates] == [True, True]
    gates = evaluate(dataset, {"eager": answers, "onnx": fewer}, max_drop=0.09, bootstrap=5).gates
    assert [gate.passed for gate in gates] == [False, False]


def test_evaluate_seed_decides_the_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    dataset, answers = random_case(8)
    first, again, other = (
        evaluate(dataset, {"eager": answers}, bootstrap=30, seed=seed, max_drop=0.0) for seed in (0, 0, 1)
    )
    assert first == again
    assert first.subjects[0].voc_map50_interval != other.subjects[0].voc_map50_interval
    assert first.subjects[0].voc_map50 == other.subjects[0].voc_map50
    assert capsys.readouterr().out == ""


def test_evaluate_long_curve_is_thinned_to_101_points() -> None:
    dataset = dataset_of(*([Box(1, NEAR)] for _ in range(150)))
    row = measure(dataset, perfect(dataset)).classes[0]
    assert len(row.precision) == len(row.recall) == 101
    assert row.recall == tuple(sorted(row.recall))
    assert (row.recall[0], row.recall[-1]) == (1 / 150, 1.0)


@pytest.mark.parametrize(
    ("subjects", "message"),
    [
        ({}, "'eager' first"),
        ({"onnx": [found()]}, "'eager' first"),
        ({"eager": []}, "eager has results for 0 images, split 'test' has 1"),
        (
            {"eager": [found((NEAR, float("nan"), 1))]},
            r"eager gives a box or a score that is not finite on 1\.png",
        ),
    ],
)
def test_evaluate_unusable_results_raise_error(subjects: dict[str, list[Detections]], message: str) -> None:
    with pytest.raises(ParityError, match=message):
        evaluate(dataset_of([Box(1, NEAR)]), subjects, max_drop=0.01)


def test_evaluate_unusable_dataset_raises_error() -> None:
    with pytest.raises(DatasetError, match="no usable box"):
        evaluate(dataset_of([]), {"eager": [found()]}, max_drop=0.01)
    with pytest.raises(DatasetError, match=r"label 2 on 1\.png"):
        evaluate(dataset_of([Box(1, NEAR)]), {"eager": [found((NEAR, 0.5, 2))]}, max_drop=0.01)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1))
def test_average_precision_any_detections_stays_between_zero_and_one(seed: int) -> None:
    dataset, answers = random_case(seed, images=5)
    weights = draw_images(5, 8, seed=0)
    for label in (1, 2, 3):
        matches = voc.match_voc(dataset, answers, label)
        for values in (voc.ap_all_points(matches, weights), voc.ap_11_points(matches, weights)):
            known = ~np.isnan(values)
            np.testing.assert_array_equal(known, weights @ matches.objects > 0)
            assert ((values[known] >= 0) & (values[known] <= 1)).all()
    for matches in match_coco(dataset, answers).everything:
        values = average_precision(matches, weights)
        known = ~np.isnan(values)
        assert ((values[known] >= 0) & (values[known] <= 1)).all()


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1))
def test_average_precision_does_not_depend_on_the_order(seed: int) -> None:
    dataset, answers = random_case(seed, images=5)
    random = np.random.default_rng(seed)
    # Different scores: equal ones are ranked by their order, by VOC and COCO alike.
    scores = iter(random.permutation(sum(len(a) for a in answers)) / 1000)
    answers = [
        Detections(a.boxes, np.array([next(scores) for _ in a.scores], dtype=np.float32), a.labels)
        for a in answers
    ]
    order = random.permutation(5)
    within = [random.permutation(len(answers[i])) for i in order]
    shuffled = [
        Detections(answers[i].boxes[p], answers[i].scores[p], answers[i].labels[p])
        for i, p in zip(order, within, strict=True)
    ]
    other = dataset_of(*(list(dataset.samples[i].boxes) for i in order), classes=("a", "b", "c"))
    for label in (1, 2, 3):
        one, two = voc.match_voc(dataset, answers, label), voc.match_voc(other, shuffled, label)
        np.testing.assert_array_equal(voc.ap_all_points(one, one.whole), voc.ap_all_points(two, two.whole))
    for one, two in zip(
        match_coco(dataset, answers).everything, match_coco(other, shuffled).everything, strict=True
    ):
        np.testing.assert_array_equal(average_precision(one, one.whole), average_precision(two, two.whole))


@settings(max_examples=25)
@given(
    boxes=st.lists(
        st.tuples(st.integers(1, 3), st.integers(0, 9), st.integers(0, 9)),
        min_size=1,
        max_size=20,
        unique=True,
    )
)
def test_average_precision_perfect_detections_give_one(boxes: list[tuple[int, int, int]]) -> None:
    objects = [Box(label, (20.0 * x, 20.0 * y, 20.0 * x + 15, 20.0 * y + 15)) for label, x, y in boxes]
    dataset = dataset_of(objects, objects[:3], classes=("a", "b", "c"))
    answers = perfect(dataset)
    for label in {label for label, _, _ in boxes}:
        matches = voc.match_voc(dataset, answers, label)
        assert voc.ap_all_points(matches, matches.whole)[0] == pytest.approx(1.0)
        assert voc.ap_11_points(matches, matches.whole)[0] == pytest.approx(1.0)
    for matches in match_coco(dataset, answers).everything:
        values = average_precision(matches, matches.whole)
        np.testing.assert_allclose(values[~np.isnan(values)], 1.0)


@pytest.mark.skipif(not BCCD.is_dir(), reason="shared/data/bccd is not beside the repository")
def test_evaluate_bccd_annotations_as_detections_give_one() -> None:
    dataset = load_dataset(BCCD, "test")
    result = measure(dataset, perfect(dataset))
    assert [row.objects for row in result.classes] == [805, 71, 69]
    assert result.voc_map50 > 0.99
    assert result.coco_map > 0.99
