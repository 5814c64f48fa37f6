"""Targets against each other in the report: the section, its gates, and results of other artifacts."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import msgspec
import pytest
from report_fixtures import make_dataset, make_run

from qexport.artifact import MANIFEST, Artifact
from qexport.benchmarks.report.build import build_report
from qexport.benchmarks.report.cross import matrix, sentences
from qexport.benchmarks.report.document import ReportDocument
from qexport.benchmarks.report.render import strip_timings
from qexport.cross_results import CrossLayer, CrossPair, CrossReport, CrossSum, CrossTarget
from qexport.errors import ArtifactError, RunFolderError
from qexport.files import read_json, write_json
from qexport.layers import Kind, stage_of
from qexport.results import Gate

TARGETS = ("onnx", "tflite")
LAYERS: tuple[tuple[str, str, Kind], ...] = (
    ("backbone.body.conv1", "output:conv2d", "convolution"),
    ("backbone.body.layer1.0", "output:add", "elementwise"),
    ("roi_heads.box_roi_pool", "output:multiscale_roi_align", "roi_align"),
)


def make_pair(first: str, second: str, differing: int, max_step: int = 1, *, without: str = "") -> CrossPair:
    """Return a pair that differs in its add alone, and in RoIAlign by a thousand values."""
    counts = (0, differing, 1000)
    layers = tuple(
        CrossLayer(
            order=order,
            path=path,
            call=0,
            port=port,
            stage=stage_of(path),
            kind=kind,
            values=1_000_000,
            differing=counts[order],
            max_step=max_step if counts[order] else 0,
        )
        for order, (path, port, kind) in enumerate(LAYERS)
        if path != without
    )
    return CrossPair(
        first=first,
        second=second,
        layers=layers,
        kinds={
            one.kind: CrossSum(values=one.values, differing=one.differing, max_step=one.max_step)
            for one in layers
        },
        promised=CrossSum(values=2_000_000, differing=differing, max_step=max_step if differing else 0),
        parts_at=next(one.path for one in layers if one.differing),
    )


def make_cross(run: Path, targets: tuple[str, ...] = TARGETS, *, passed: bool = True) -> CrossReport:
    named = (
        CrossTarget(name=target, artifact_sha256=sha256_of(run / target), rung="run") for target in targets
    )
    gate = Gate(
        name="targets differ",
        passed=passed,
        measured="7.00 per million (14 of 2,000,000)",
        limit="fewer than 10 per million, over convolutions, linears and adds",
        culprit="backbone.body.layer1.0",
        subject=" and ".join(targets),
    )
    return CrossReport(
        encodings_sha256="0" * 64,
        images=8,
        split="test",
        targets=(CrossTarget(name="reference", artifact_sha256="", rung="run"), *named),
        pairs=tuple(make_pair(*names, 14) for names in combinations(["reference", *targets], 2)),
        gates=(gate,),
    )


def sha256_of(folder: Path) -> str:
    return read_json(folder / MANIFEST, Artifact, ArtifactError).sha256


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made = make_run(tmp_path / "run", make_dataset(tmp_path / "data"), targets=TARGETS)
    write_json(made / "cross.json", make_cross(made))
    return made


def test_report_of_several_targets_has_the_table_where_they_meet(run: Path) -> None:
    files = build_report(run, dataset_root=None)
    page = files.html.read_text()
    for section in ("targets", "cross"):
        assert f'id="{section}"' in page
        assert f'href="#{section}"' in page
    section = page[page.index('id="cross"') : page.index('id="t0-parity"')]
    assert section.count("<details>") == 3
    assert section.count('<th scope="row"') == 3 * (1 + len(LAYERS))
    assert "onnx and tflite: identical: convolution; differing: elementwise 14 of 1,000,000" in section
    assert "<svg" in section and "cross-matrix-" in section
    assert "comparison of onnx and tflite" in page
    document = read_json(files.json, ReportDocument, RunFolderError)
    assert document.cross == make_cross(run)
    assert document.verdict.state == "ok"


def test_report_side_by_side_shows_latency_between_markers_alone(run: Path) -> None:
    page = build_report(run, dataset_root=None).html.read_text()
    start = page.index('id="targets"')
    summary = page[start : page.index("</section>", start)]
    assert "28.60 MB" in summary
    assert summary.count('title="parity ok"') == len(TARGETS)
    assert "\N{MULTIPLICATION SIGN} faster" in summary
    assert "\N{MULTIPLICATION SIGN} faster" not in strip_timings(summary)


def test_report_of_one_target_has_no_table_of_targets(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", make_dataset(tmp_path / "data"))
    page = build_report(made, dataset_root=None).html.read_text()
    assert 'id="cross"' not in page
    assert 'id="targets"' not in page


def test_report_failing_pair_is_the_first_line(run: Path) -> None:
    write_json(run / "cross.json", make_cross(run, passed=False))
    page = build_report(run, dataset_root=None).html.read_text()
    assert (
        "Gate failed on onnx and tflite: targets differ: 7.00 per million" in page[: page.index("</header>")]
    )
    assert "onnx and tflite: targets differ" in page[page.index('id="cross"') :]


def test_report_comparison_of_other_artifacts_counts_as_not_run(run: Path) -> None:
    cross = make_cross(run)
    first, *rest = cross.targets
    strange = [msgspec.structs.replace(rest[0], artifact_sha256="1" * 64), *rest[1:]]
    write_json(run / "cross.json", msgspec.structs.replace(cross, targets=(first, *strange)))
    files = build_report(run, dataset_root=None)
    page = files.html.read_text()
    assert 'id="cross"' not in page
    assert "was measured on other artifacts" in page
    assert f"qexport compare {run} --cross" in page
    assert read_json(files.json, ReportDocument, RunFolderError).verdict.state == "incomplete"


def test_matrix_has_a_cell_for_each_pair_and_says_what_was_not_compared(run: Path) -> None:
    cross = make_cross(run)
    same = make_pair("onnx", "tflite", 0)
    far = make_pair("reference", "onnx", 400, max_step=3, without="roi_heads.box_roi_pool")
    drawn = msgspec.structs.replace(cross, pairs=(far, cross.pairs[1], same))
    svg = matrix(drawn, "m")
    for text in ("200", "3 steps", "7", "identical", "not compared"):
        assert f">{text}</text>" in svg
    assert "var(--bad)" in svg
    assert "var(--bad)" not in matrix(cross, "m")
    assert matrix(drawn, "m") == svg
    assert "of 3 tensors reference and onnx 2 are compared" in sentences(drawn)[-1]
