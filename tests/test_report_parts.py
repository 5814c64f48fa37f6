"""The parts of the report: CSV files, sums, sentences, pictures."""

from __future__ import annotations

import csv
from pathlib import Path

import msgspec
import pytest
from PIL import Image
from report_fixtures import Truth, make_dataset, make_run

from qexport.benchmarks.report import ReportFiles, build_report
from qexport.benchmarks.report.csvs import (
    ACCURACY_COLUMNS,
    KIND_COLUMNS,
    LATENCY_COLUMNS,
    LAYER_COLUMNS,
)
from qexport.benchmarks.report.pictures import MAX_WIDTH_PX, Picture, embed, largest_differences
from qexport.benchmarks.report.stages import read_run
from qexport.benchmarks.report.tables import noise_sentences, sum_layers, worst_layer
from qexport.benchmarks.report.training import history_plot
from qexport.errors import RunFolderError
from qexport.files import read_json
from qexport.results import (
    AccuracyReport,
    DetectionsRecord,
    ImageDetections,
    LatencyProfile,
    ParityReport,
)
from qexport.training_history import EpochRecord, History, Measured


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    root = tmp_path_factory.mktemp("cells")
    return root, make_dataset(root)


@pytest.fixture(scope="module")
def whole(dataset: tuple[Path, Truth], tmp_path_factory: pytest.TempPathFactory) -> ReportFiles:
    """The report of a run in which every stage ran and every gate is ok; tests only read it."""
    root, truth = dataset
    return build_report(make_run(tmp_path_factory.mktemp("whole"), truth), dataset_root=root)


def test_csv_files_have_their_columns_and_a_row_per_measurement(whole: ReportFiles) -> None:
    expected = {
        whole.layers_csv: LAYER_COLUMNS,
        whole.latency_csv: LATENCY_COLUMNS,
        whole.kinds_csv: KIND_COLUMNS,
        whole.accuracy_csv: ACCURACY_COLUMNS,
    }
    tables = {}
    for path, columns in expected.items():
        header, *rows = csv.reader(path.read_text().splitlines())
        assert tuple(header) == columns
        assert rows
        assert all(len(row) == len(columns) for row in rows)
        tables[path] = rows
    results = read_run(whole.html.parent)
    target = results.targets[0]
    assert target.parity is not None
    assert target.latency is not None
    assert len(tables[whole.layers_csv]) == len(target.parity.layers)
    assert len(tables[whole.latency_csv]) == len(target.latency.layers)


def test_kind_sums_add_up_to_the_sum_of_the_layers(whole: ReportFiles) -> None:
    rows = list(csv.DictReader(whole.kinds_csv.read_text().splitlines()))
    layers = list(csv.DictReader(whole.latency_csv.read_text().splitlines()))
    total = sum(float(row["artifact_ms"]) for row in layers)
    for by in ("kind", "stage"):
        group = [row for row in rows if row["by"] == by]
        assert sum(float(row["artifact_ms"]) for row in group) == pytest.approx(total)
        assert sum(float(row["share"]) for row in group) == pytest.approx(1)
        assert sum(int(row["paths"]) for row in group) == len(layers)


def test_sum_over_unmeasured_eager_gives_no_reduction(whole: ReportFiles) -> None:
    profile = read_json(whole.html.parent / "onnx" / "latency.json", LatencyProfile, RunFolderError)
    sums = {row.name: row for row in sum_layers(profile.layers, lambda layer: layer.kind)}
    assert sums["pooling"].eager_paths == 1
    assert sums["pooling"].paths == 2
    assert sums["pooling"].reduction_percent is None
    assert sums["convolution"].reduction_percent == pytest.approx(
        100 * (1 - sums["convolution"].artifact_ms / (sums["convolution"].eager_ms or 0))
    )


def test_noise_sentence_says_inside_only_where_the_interval_holds_zero(whole: ReportFiles) -> None:
    accuracy = read_json(whole.html.parent / "accuracy.json", AccuracyReport, RunFolderError)
    sentences = noise_sentences(accuracy)
    assert [sentence.split(":")[0] for sentence in sentences] == [
        "VOC mAP of reference",
        "COCO mAP of reference",
        "VOC mAP of onnx",
        "COCO mAP of onnx",
    ]
    assert "inside the noise of 72 images" in sentences[2]
    assert "below eager by more than the noise" in sentences[3]


def test_worst_layer_prefers_a_failing_layer_over_a_low_sqnr(whole: ReportFiles) -> None:
    parity = read_json(whole.html.parent / "onnx" / "parity.json", ParityReport, RunFolderError)
    lowest = worst_layer(parity)
    assert lowest is not None
    assert lowest.sqnr_fp32_db == min(layer.sqnr_fp32_db or 99.0 for layer in parity.layers)
    failing = msgspec.structs.replace(parity.layers[1], status="over_tolerance", max_step=3)
    worse = msgspec.structs.replace(parity, layers=(parity.layers[0], failing, *parity.layers[2:]))
    assert worst_layer(worse) == failing


def _detections(image: str, *boxes: tuple[float, float, float, float, float]) -> ImageDetections:
    return ImageDetections(
        image=image,
        boxes=tuple((left, top, right, bottom) for left, top, right, bottom, _ in boxes),
        scores=tuple(box[4] for box in boxes),
        labels=(1,) * len(boxes),
    )


def test_pictures_rank_by_unmatched_boxes_then_by_score() -> None:
    box, far = (0.0, 0.0, 10.0, 10.0), (50.0, 50.0, 60.0, 60.0)
    record = DetectionsRecord(
        subjects={
            "eager": (
                _detections("same.jpg", (*box, 0.9)),
                _detections("score.jpg", (*box, 0.9)),
                _detections("lost.jpg", (*box, 0.9), (*far, 0.8)),
                _detections("faint.jpg", (*box, 0.6)),
            ),
            "onnx": (
                _detections("same.jpg", (*box, 0.9)),
                _detections("score.jpg", (*box, 0.7)),
                _detections("lost.jpg", (*box, 0.9)),
                _detections("faint.jpg", (*box, 0.45)),
            ),
        }
    )
    found = largest_differences(record, "onnx")
    assert [one.image for one in found] == ["lost.jpg", "score.jpg", "faint.jpg", "same.jpg"]
    assert [one.unmatched for one in found] == [1, 0, 0, 0]
    assert found[2].eager[0].matched  # its partner is too faint to be drawn, yet it is there
    assert found[2].actual == ()
    assert largest_differences(record, "tflite") == ()
    assert len(largest_differences(record, "onnx", limit=2)) == 2


def test_picture_is_shrunk_and_never_read_from_outside_the_dataset(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for path in (root / "in.png", tmp_path / "out.png"):
        Image.new("RGB", (960, 480), (10, 200, 30)).save(path)
    (root / "broken.jpg").write_text("not an image")
    inside = embed(root, "in.png")
    assert isinstance(inside, Picture)
    assert (inside.width_px, inside.height_px) == (960, 480)
    assert inside.data_uri.startswith("data:image/jpeg;base64,")
    assert MAX_WIDTH_PX == 480
    assert "leads out of the dataset" in str(embed(root, "../out.png"))
    assert "no such file" in str(embed(root, "gone.jpg"))
    assert "cannot be read" in str(embed(root, "broken.jpg"))
    assert "not at hand" in str(embed(None, "in.png"))


@pytest.mark.parametrize("boxes", [True, False])
def test_history_of_a_training_is_drawn_with_what_was_measured(boxes: bool) -> None:
    figures = {"voc_map50": (0.90, 0.93), "coco_map": (0.50, 0.52)} if boxes else {"distance": (0.02, 0.01)}
    measured = [Measured(**{name: values[epoch] for name, values in figures.items()}) for epoch in range(2)]
    epochs = tuple(
        EpochRecord(
            epoch=epoch,
            steps=4 * epoch,
            learning_rate=0.001,
            losses={"a term": 0.5} if epoch else {},
            scales_follow=False,
            measured=measured[epoch],
            best=True,
        )
        for epoch in range(2)
    )
    drawn = history_plot(History(float_detector=measured[1], epochs=epochs), "training")
    assert "a term" in drawn
    assert ("int8 less float, points" in drawn) == boxes
    assert ("distance to float" in drawn) != boxes
    assert drawn == history_plot(History(float_detector=measured[1], epochs=epochs), "training")
