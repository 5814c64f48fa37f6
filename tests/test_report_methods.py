"""Methods of quantization in the report: a row for each, times between markers, other encodings left out."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from report_fixtures import make_dataset, make_run

from qexport.benchmarks.report.build import build_report
from qexport.benchmarks.report.document import ReportDocument, TimingsDocument
from qexport.benchmarks.report.methods import lines
from qexport.benchmarks.report.render import strip_timings
from qexport.benchmarks.report.stages import read_run
from qexport.encodings import load_encodings
from qexport.errors import RunFolderError
from qexport.files import read_json, write_json
from qexport.method_results import MethodRow, MethodsLatency, MethodsReport
from qexport.results import Interval, LatencyProfile, LatencyStats

CHANGE = Interval(low=-0.0123, high=0.004, level=0.95)


def make_row(method: str, voc: float, *, size_bytes: int = 113_000_000) -> MethodRow:
    change = None if method == "fp32" else CHANGE
    return MethodRow(
        method=method,
        what=f"what {method} quantizes",
        runs_in="PyTorch",
        size_bytes=size_bytes,
        voc_map50=voc,
        coco_map=voc / 2,
        voc_change_interval=change,
        coco_change_interval=change,
    )


def make_stats(p50_ms: float) -> LatencyStats:
    return LatencyStats(
        runs=5, mean_ms=p50_ms, std_ms=1.0, min_ms=p50_ms, p50_ms=p50_ms, p90_ms=p50_ms, p99_ms=p50_ms
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made = make_run(tmp_path / "run", make_dataset(tmp_path / "data"))
    encodings = load_encodings(made / "encodings.json")
    rows = (
        make_row("fp32", 0.9),
        make_row("dynamic", 0.893, size_bytes=71_000_000),
        make_row("activations", 0.9),
    )
    report = MethodsReport(
        detector_sha256=encodings.detector_sha256,
        rows_sha256=encodings.rows_sha256,
        dataset="cells",
        dataset_sha256="0" * 64,
        split="test",
        images=72,
        rows=rows,
    )
    machine = read_json(made / "onnx" / "latency.json", LatencyProfile, RunFolderError).machine
    latency = MethodsLatency(
        detector_sha256=encodings.detector_sha256,
        machine=machine,
        threads=1,
        warmup=1,
        measured_at="2026-01-02T03:04:05+00:00",
        whole={"fp32": make_stats(321.5), "dynamic": make_stats(160.75)},
    )
    write_json(made / "methods.json", report)
    write_json(made / "methods_latency.json", latency)
    return made


def test_methods_table_has_float_first_and_static_on_each_target_last(run: Path) -> None:
    results = read_run(run)
    assert results.methods is not None
    rows = lines(results, results.methods)
    assert [row.method for row in rows] == ["fp32", "dynamic", "activations", "static"]
    fp32, dynamic, activations, static = rows
    assert (fp32.speed, fp32.voc_change) == (None, None)
    assert dynamic.speed == 2.0
    assert dynamic.voc_change == pytest.approx(-0.007)
    assert (activations.stats, activations.untimed) == (None, "no kernel runs it")
    assert static.parity is not None
    assert static.parity.state == "ok"
    assert static.runs_in == "target onnx"
    assert static.speed is not None and static.size_bytes is not None


def test_methods_section_shows_times_between_markers_alone(run: Path) -> None:
    files = build_report(run, dataset_root=None)
    page = files.html.read_text()
    section = page[page.index('id="methods"') : page.index('id="t0-parity"')]
    minus = "\N{MINUS SIGN}"
    assert f"{minus}0.70 <span" in section
    assert f"({minus}1.23 to +0.40)" in section
    assert "71.00 MB" in section
    for text in ("160.8", "2.00\N{MULTIPLICATION SIGN} faster", "2026-01-02T03:04:05"):
        assert text in section
        assert text not in strip_timings(section)
    document = read_json(files.json, ReportDocument, RunFolderError)
    assert document.methods is not None
    assert document.methods.rows[1].method == "dynamic"
    timings = read_json(files.timings, TimingsDocument, RunFolderError)
    assert timings.methods is not None


def test_methods_of_other_encodings_count_as_not_run(run: Path) -> None:
    report = read_json(run / "methods.json", MethodsReport, RunFolderError)
    write_json(run / "methods.json", msgspec.structs.replace(report, rows_sha256="1" * 64))
    files = build_report(run, dataset_root=None)
    page = files.html.read_text()
    assert 'id="methods"' not in page
    assert f"qexport evaluate {run} --method dynamic --method activations" in page
    assert read_json(files.timings, TimingsDocument, RunFolderError).methods is None


def test_methods_times_of_a_method_that_is_not_in_the_table_are_left_out(run: Path) -> None:
    report = read_json(run / "methods.json", MethodsReport, RunFolderError)
    fewer = tuple(row for row in report.rows if row.method != "dynamic")
    write_json(run / "methods.json", msgspec.structs.replace(report, rows=fewer))
    files = build_report(run, dataset_root=None)
    assert read_json(files.timings, TimingsDocument, RunFolderError).methods is None
    assert 'id="methods"' in files.html.read_text()
