"""Several runs in one table, and the warnings where rows cannot be compared."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from report_fixtures import Truth, fail_gate, make_dataset, make_run

from qexport.benchmarks.report import build_experiments
from qexport.errors import RunFolderError
from qexport.files import write_json
from qexport.results import (
    ParityReport,
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    root = tmp_path_factory.mktemp("cells")
    return root, make_dataset(root)


def test_experiments_have_a_row_per_run_and_target(dataset: tuple[Path, Truth], tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", dataset[1])
    two = make_run(tmp_path / "two", dataset[1], targets=("onnx", "tflite"))
    fail_gate(two / "tflite" / "parity.json", ParityReport)
    files = build_experiments([one, two], tmp_path / "out")
    rows = list(csv.DictReader(files.csv.read_text().splitlines()))
    assert [(row["run"], row["target"]) for row in rows] == [
        ("one", "onnx"),
        ("two", "onnx"),
        ("two", "tflite"),
    ]
    assert [row["verdict"] for row in rows] == ["ok", "ok", "failed"]
    assert [row["parity"] for row in rows] == ["ok", "ok", "failed"]
    assert rows[0]["method"] == "percentile 99.99"
    assert len(rows[0]["dataset_version"]) == 12
    assert float(rows[0]["size_mb"]) == pytest.approx(28.6)
    assert float(rows[0]["peak_memory_mb"]) == pytest.approx(181)
    assert "may be compared" not in files.html.read_text()


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"dataset_sha256": "f" * 64}, "dataset differs"),
        ({"split": "val"}, "split differs"),
        ({"padded_px": (320, 320)}, "input size differs"),
        ({"labels": ("__background__", "cell")}, "classes differs"),
        ({"images": 10}, "number of images and objects differs"),
    ],
)
def test_experiments_that_cannot_be_compared_are_warned_of(
    dataset: tuple[Path, Truth], tmp_path: Path, change: dict[str, object], warning: str
) -> None:
    runs = [make_run(tmp_path / name, dataset[1]) for name in ("one", "two")]
    path = runs[1] / "run.json"
    record = json.loads(path.read_text())
    record["settings"].update({name: change[name] for name in change if name == "split"})
    record.update({name: change[name] for name in change if name == "dataset_sha256"})
    write_json(path, record)
    for file, names in (("detector.json", ("padded_px", "labels")), ("accuracy.json", ("images",))):
        value = json.loads((runs[1] / file).read_text())
        value.update({name: change[name] for name in change if name in names})
        write_json(runs[1] / file, value)
    page = build_experiments(runs, tmp_path / "out").html.read_text()
    assert "Not every row may be compared" in page
    assert warning in page
    assert page.count("<li>") == 1


def test_experiments_of_no_run_raises_error(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no run folder"):
        build_experiments([], tmp_path)
