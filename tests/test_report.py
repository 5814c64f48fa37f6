"""The report: one page that says what was measured, and nothing that was not."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import msgspec
import pytest
from report_fixtures import LABELS, Truth, fail_gate, make_dataset, make_run

from qexport.benchmarks.report import ReportFiles, build_report, strip_timings
from qexport.benchmarks.report.document import ReportDocument, TimingsDocument
from qexport.errors import EncodingsError, RunFolderError
from qexport.files import read_json, write_json
from qexport.layers import DetectorReport
from qexport.results import (
    AccuracyReport,
    LatencyProfile,
    ParityReport,
)
from qexport.settings import RunRecord

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    root = tmp_path_factory.mktemp("cells")
    return root, make_dataset(root)


@pytest.fixture(scope="module")
def whole(dataset: tuple[Path, Truth], tmp_path_factory: pytest.TempPathFactory) -> ReportFiles:
    """The report of a run in which every stage ran and every gate is ok; tests only read it."""
    root, truth = dataset
    return build_report(make_run(tmp_path_factory.mktemp("whole"), truth), dataset_root=root)


@pytest.fixture
def run(dataset: tuple[Path, Truth], tmp_path: Path) -> Path:
    """A run folder that a test may change."""
    return make_run(tmp_path / "run", dataset[1])


class _Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs


def _first_verdict(page: str) -> str:
    found = re.search(r'class="verdict[^>]*>(.*?)</(?:h1|p)>', page, re.DOTALL)
    assert found is not None
    return re.sub(r"<!--.*?-->", "", found.group(1))


def test_report_whole_run_says_ok_first_and_holds_every_section(whole: ReportFiles) -> None:
    page = whole.html.read_text()
    assert _first_verdict(page) == "Ok: 4 gates on parity and accuracy, 1 gate on latency"
    assert "Not in this report" not in page
    for section in ("gates", "accuracy", "t0-parity", "t0-latency", "t0-size", "t0-float", "t0-pictures"):
        assert f'id="{section}"' in page
    assert page.count("data:image/jpeg;base64,") == 3
    assert "roi_heads.<wbr>box_head.<wbr>fc7" in page


def test_report_page_is_whole_and_loads_nothing(whole: ReportFiles) -> None:
    page = whole.html.read_text()
    tags = _Tags(page)
    assert "link" not in tags.names
    assert "img" not in tags.names
    links = [value for name, value in tags.attributes if name in ("href", "src", "xlink:href") and value]
    assert links
    assert all(link.startswith(("#", "data:image/jpeg;base64,")) for link in links)
    assert not re.search(r"@import|url\((?!#)", page)


def test_report_identifiers_on_one_page_are_unique_and_resolve(
    dataset: tuple[Path, Truth], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "two", dataset[1], targets=("onnx", "tflite"))
    tags = _Tags(build_report(run, dataset_root=dataset[0]).html.read_text())
    names = [value for name, value in tags.attributes if name == "id"]
    assert len(names) == len(set(names))
    used = {
        str(value)[1:] for name, value in tags.attributes if name.endswith("href") and str(value)[0] == "#"
    }
    assert used <= set(names)


def test_report_two_runs_differ_only_in_timings(dataset: tuple[Path, Truth], tmp_path: Path) -> None:
    root, truth = dataset
    one, other = (
        build_report(make_run(tmp_path / f"run{seed}", truth, timing_seed=seed), dataset_root=root)
        for seed in (0, 1)
    )
    assert strip_timings(one.html.read_text()) == strip_timings(other.html.read_text())
    assert one.html.read_bytes() != other.html.read_bytes()
    for same in ("json", "schema", "layers_csv", "accuracy_csv"):
        assert getattr(one, same).read_bytes() == getattr(other, same).read_bytes()
    for different in ("timings", "latency_csv", "kinds_csv"):
        assert getattr(one, different).read_bytes() != getattr(other, different).read_bytes()


def test_report_built_twice_gives_the_same_bytes(run: Path, dataset: tuple[Path, Truth]) -> None:
    files = build_report(run, dataset_root=dataset[0])
    paths = [getattr(files, name) for name in ReportFiles.__slots__]
    first = [path.read_bytes() for path in paths]
    build_report(run, dataset_root=dataset[0])
    assert [path.read_bytes() for path in paths] == first


def test_report_timings_stand_only_between_markers(whole: ReportFiles) -> None:
    page = whole.html.read_text()
    assert page.count("<!-- timings -->") == page.count("<!-- /timings -->") > 0
    timings = read_json(whole.timings, TimingsDocument, RunFolderError)
    latency = timings.targets[0].latency
    assert latency is not None
    assert timings.targets[0].memory is not None
    stripped = strip_timings(page)
    for text in (
        f"{latency.whole['artifact'].p50_ms:,.2f}",
        f"{latency.layers[3].artifact_ms:.3f}",
        latency.measured_at,
        latency.machine.processor,
        "181.00 MB",
        "2,400 MHz",
    ):
        assert text in page
        assert text not in stripped
    assert not re.search(r"_ms\b|peak_bytes|measured_at", whole.json.read_text())


def test_report_every_latency_table_has_the_parity_verdict_beside_it(run: Path) -> None:
    fail_gate(run / "onnx" / "parity.json", ParityReport)
    files = build_report(run, dataset_root=None)
    page = files.html.read_text()
    section = page[page.index('id="t0-latency"') : page.index('id="t0-size"')]
    assert section.count('class="badge failed"') == 5  # heading, whole run, kinds, stages, paths
    for path in (files.latency_csv, files.kinds_csv):
        rows = list(csv.DictReader(path.read_text().splitlines()))
        assert rows
        assert all(row["parity"].startswith("parity failed: made to fail") for row in rows)


def test_report_json_validates_against_its_published_schema(whole: ReportFiles) -> None:
    schema = json.loads(whole.schema.read_text())
    document = json.loads(whole.json.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(document)
    assert document["format_version"] == 1
    assert document["verdict"]["state"] == "ok"
    assert read_json(whole.json, ReportDocument, RunFolderError).targets[0].target == "onnx"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate({**document, "format_version": 2})
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate({**document, "latency_ms": 3})


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("onnx/parity.json", ParityReport),
        ("accuracy.json", AccuracyReport),
        ("onnx/latency.json", LatencyProfile),
    ],
)
def test_report_failing_gate_is_the_first_line_with_its_culprit(
    run: Path, file: str, kind: type[ParityReport]
) -> None:
    fail_gate(run / file, kind)
    page = build_report(run, dataset_root=None).html.read_text()
    verdict = _first_verdict(page)
    assert verdict.startswith("Gate failed")
    assert "made to fail: 6 steps, asked at most 1 step (backbone.body.x)" in verdict


def test_report_failing_latency_gate_leaves_the_rest_of_the_page_alone(run: Path) -> None:
    before = build_report(run, dataset_root=None).html.read_text()
    fail_gate(run / "onnx" / "latency.json", LatencyProfile)
    after = build_report(run, dataset_root=None).html.read_text()
    assert before != after
    assert strip_timings(before) == strip_timings(after)


@pytest.mark.parametrize(
    ("file", "stage", "command"),
    [
        ("encodings.json", "calibration", "qexport calibrate"),
        ("accuracy.json", "accuracy", "qexport evaluate"),
        ("detections.json", "detections", "qexport evaluate"),
        ("onnx/artifact.json", "export of onnx", "qexport export"),
        ("onnx/parity.json", "parity of onnx", "qexport compare"),
        ("onnx/latency.json", "latency of onnx", "qexport bench"),
        ("onnx/complexity.json", "complexity of onnx", "qexport export"),
        ("onnx/memory.json", "memory of onnx", "qexport bench"),
    ],
)
def test_report_missing_stage_is_named_with_its_command(
    run: Path, file: str, stage: str, command: str
) -> None:
    (run / file).unlink()
    files = build_report(run, dataset_root=None)
    page = files.html.read_text()
    assert _first_verdict(page) == f"Incomplete: no result for {stage}"
    assert f"<b>{stage}</b> has not run" in page
    assert command in page
    assert json.loads(files.json.read_text())["missing"][0]["command"].startswith(command)


def test_report_of_a_bare_run_invents_nothing(run: Path) -> None:
    for path in run.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in ("run.json", "detector.json"):
            path.unlink()
    files = build_report(run, dataset_root=None)
    page = files.html.read_text()
    assert _first_verdict(page) == "Incomplete: no result for calibration, accuracy, detections, export"
    body = page[page.index("<main") :]
    assert "No gate was measured." in body
    assert "figure" not in _Tags(body).names
    for path in (files.layers_csv, files.latency_csv, files.kinds_csv, files.accuracy_csv):
        assert len(path.read_text().splitlines()) == 1


def test_report_result_of_another_artifact_counts_as_not_run(run: Path) -> None:
    path = run / "onnx" / "parity.json"
    parity = read_json(path, ParityReport, RunFolderError)
    write_json(path, msgspec.structs.replace(parity, artifact_sha256="0" * 64))
    page = build_report(run, dataset_root=None).html.read_text()
    assert "<b>parity of onnx</b> was measured on another artifact" in page
    assert "parity not measured" in page
    assert "parity ok" not in page


def test_report_of_another_detectors_encodings_counts_as_not_run(run: Path) -> None:
    path = run / "detector.json"
    detector = read_json(path, DetectorReport, RunFolderError)
    write_json(path, msgspec.structs.replace(detector, detector_sha256="0" * 64))
    page = build_report(run, dataset_root=None).html.read_text()
    assert "<b>calibration</b> was made for another detector" in page
    assert "<b>export of onnx</b> was made from another detector" in page


@pytest.mark.parametrize("file", ["run.json", "detector.json"])
def test_report_without_identity_raises_error_naming_the_file(run: Path, file: str) -> None:
    (run / file).unlink()
    with pytest.raises(RunFolderError, match=re.escape(file)):
        build_report(run, dataset_root=None)


def test_report_of_an_edited_table_raises_error(run: Path) -> None:
    path = run / "encodings.json"
    path.write_text(path.read_text().replace("0.03125", "0.0625"))
    with pytest.raises(EncodingsError, match="edited after calibration"):
        build_report(run, dataset_root=None)


def test_report_of_no_folder_raises_error(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no such folder"):
        build_report(tmp_path / "nowhere", dataset_root=None)


HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "$\\frac{1$ <!-- /timings --> \N{CJK UNIFIED IDEOGRAPH-7EC6}",
)


def test_report_hostile_names_are_shown_as_text(dataset: tuple[Path, Truth], tmp_path: Path) -> None:
    root, truth = dataset
    image = 'images/"><svg onload=alert(1)>.jpg'
    hostile = {image: next(iter(truth.values())), **truth}
    run = make_run(tmp_path / "run", hostile, labels=(LABELS[0], *HOSTILE))
    record = read_json(run / "run.json", RunRecord, RunFolderError)
    command = "qexport run </code><script>alert(2)</script>"
    write_json(run / "run.json", msgspec.structs.replace(record, command=command))
    parity = read_json(run / "onnx" / "parity.json", ParityReport, RunFolderError)
    layer = msgspec.structs.replace(parity.layers[9], path="</table><script>x", status="unmatched")
    layers = (*parity.layers[:9], layer, *parity.layers[10:])
    write_json(run / "onnx" / "parity.json", msgspec.structs.replace(parity, layers=layers))
    page = build_report(run, dataset_root=root).html.read_text()
    tags = _Tags(page)
    assert tags.names.count("script") == 1
    assert "img" not in tags.names
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    assert page.count("<!-- timings -->") == page.count("<!-- /timings -->")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;/table&gt;&lt;script&gt;x" in page.replace("<wbr>", "")


PROBE = """
<script>
const table = document.querySelector("#t0-parity table.filterable");
const heads = Array.from(table.tHead.rows[0].cells);
const head = heads.findIndex((cell) => cell.textContent.includes("SQNR fp32"));
const button = table.tHead.rows[0].cells[head].querySelector("button");
button.click();
document.body.dataset.up = table.tBodies[0].rows[0].cells[1].textContent;
button.click();
document.body.dataset.down = table.tBodies[0].rows[0].cells[1].textContent;
document.body.dataset.last = table.tBodies[0].rows[table.tBodies[0].rows.length - 1].cells[head].textContent;
const search = document.querySelector("#t0-parity input[type=search]");
search.value = "layer4 downsample";
search.dispatchEvent(new Event("input"));
document.body.dataset.shown = document.querySelector("#t0-parity output").textContent;
</script>
</body>
"""
WATCH = (
    "<script>window.onerror = (text) => { document.documentElement.dataset.error = text; };</script>\n<style>"
)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the page with")
def test_report_in_a_browser_sorts_and_filters_without_an_error(whole: ReportFiles, tmp_path: Path) -> None:
    page = whole.html.read_text().replace("<style>", WATCH, 1).replace("</body>", PROBE)
    (tmp_path / "probe.html").write_text(page)
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    quiet = "--disable-background-networking --disable-component-update"
    shown = subprocess.run(
        [
            str(CHROMIUM),
            *options.split(),
            *quiet.split(),
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            f"file://{tmp_path / 'probe.html'}",
        ],
        capture_output=True,
        check=True,
        text=True,
        timeout=120,
    ).stdout
    attributes = dict(_Tags(shown).attributes)
    assert "data-error" not in attributes
    assert attributes["data-script"] == "ready"
    assert attributes["data-up"] == "roi_heads.box_head.fc7"
    assert attributes["data-down"] == "backbone.body.conv1"
    assert attributes["data-last"] == "\N{EN DASH}"  # what was not measured stands last
    assert attributes["data-shown"] == "1 of 69 rows"
