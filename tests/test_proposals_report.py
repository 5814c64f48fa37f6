"""The number of proposals in the report: section, sentences, plots, and what is not shown."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import msgspec
import pytest
from report_fixtures import make_run

from qexport.artifact import Artifact, save_artifact
from qexport.benchmarks.report import build_report, strip_timings
from qexport.benchmarks.report.plots import change_over_latency, change_over_proposals
from qexport.benchmarks.report.proposals import rows, sentences
from qexport.benchmarks.report.stages import read_run
from qexport.errors import RunFolderError
from qexport.files import read_json, write_json
from qexport.results import (
    Gate,
    Interval,
    LatencyProfile,
    LatencyStats,
    ProposalCurve,
    ProposalLatency,
    ProposalPoint,
    ProposalTime,
)

OWN = 300
PASSED = Gate(name="layer parity", passed=True, measured="1 step", limit="at most 1 step")
FAILED = Gate(name="layer parity", passed=False, measured="4 steps", limit="at most 1 step", culprit="fc6")


def interval(low: float, high: float) -> Interval:
    return Interval(low=low, high=high, level=0.95)


def point(
    proposals: int,
    voc: tuple[float, float] | None,
    coco: tuple[float, float] | None,
    *,
    gates: tuple[Gate, ...] = (PASSED,),
    sha256: str = "",
) -> ProposalPoint:
    """Return a point whose mAP lies in the middle of its changes from 0.9 and 0.5."""
    return ProposalPoint(
        proposals=proposals,
        artifact_sha256=sha256 or f"{proposals:064d}",
        int8_bytes=28_000_000 + proposals,
        macs=10_000_000 * proposals,
        voc_map50=0.9 + (sum(voc) / 2 if voc else 0.0),
        coco_map=0.5 + (sum(coco) / 2 if coco else 0.0),
        voc_map50_interval=interval(0.8, 0.95),
        coco_map_interval=interval(0.4, 0.6),
        voc_change_interval=interval(*voc) if voc else None,
        coco_change_interval=interval(*coco) if coco else None,
        gates=gates,
    )


def curve_of(*points: ProposalPoint) -> ProposalCurve:
    own = next(one for one in points if one.proposals == OWN)
    return ProposalCurve(
        target="onnx",
        artifact_sha256=own.artifact_sha256,
        encodings_sha256="e" * 64,
        own_proposals=OWN,
        dataset="cells",
        dataset_sha256="d" * 64,
        split="test",
        images=72,
        points=points,
        rung="run",
    )


def usual(sha256: str = "") -> ProposalCurve:
    return curve_of(
        point(OWN, None, None, sha256=sha256),
        point(150, (-0.004, 0.001), (-0.002, 0.002)),
        point(64, (-0.023, -0.005), (-0.011, 0.001)),
    )


def latency_of(curve: ProposalCurve, run: Path, scale: float = 1.0) -> ProposalLatency:
    profile = read_json(run / "onnx/latency.json", LatencyProfile, RunFolderError)
    times = []
    for one in curve.points:
        median = scale * (20 + one.proposals / 10)
        stats = LatencyStats(
            runs=30, mean_ms=median, std_ms=0.5, min_ms=median, p50_ms=median, p90_ms=median, p99_ms=median
        )
        times.append(ProposalTime(proposals=one.proposals, artifact_sha256=one.artifact_sha256, stats=stats))
    return ProposalLatency(
        target="onnx",
        machine=profile.machine,
        threads=1,
        warmup=3,
        measured_at="2026-01-01T00:00:00+00:00",
        points=tuple(times),
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run with a curve and its latency."""
    made = make_run(tmp_path / "run", {})
    curve = usual(artifact_digest(made))
    write_json(made / "onnx/proposals.json", curve)
    write_json(made / "onnx/proposals_latency.json", latency_of(curve, made))
    return made


def artifact_digest(run: Path) -> str:
    return read_json(run / "onnx/artifact.json", Artifact, RunFolderError).sha256


def test_report_shows_each_number_with_its_price_its_time_and_its_parity(run: Path) -> None:
    page = build_report(run, dataset_root=None).html.read_text()
    section = page.partition('<section id="t0-proposals">')[2].partition("</section>")[0]
    assert '<a href="#t0-proposals">' in page
    row = section.partition('data-value="64">64</td>')[2].partition("</tr>")[0]
    assert "88.60" in row
    assert "\N{MINUS SIGN}2.30 to \N{MINUS SIGN}0.50" in row
    assert "parity ok" in row
    assert "26.40" in row
    assert "1.89\N{MULTIPLICATION SIGN} faster" in row
    assert section.count("<svg") == 2
    assert "150 proposals: inside the noise of 72 images" in section


def test_report_without_its_times_is_equal_whatever_was_timed(run: Path) -> None:
    pages, documents = [], []
    for scale in (1.0, 1.7):
        curve = usual(artifact_digest(run))
        write_json(run / "onnx/proposals_latency.json", latency_of(curve, run, scale))
        files = build_report(run, dataset_root=None)
        pages.append(files.html.read_text())
        documents.append(files.json.read_bytes())
    assert pages[0] != pages[1]
    assert strip_timings(pages[0]) == strip_timings(pages[1])
    assert documents[0] == documents[1]


def test_report_json_holds_the_curve_and_timings_json_its_latency(run: Path) -> None:
    files = build_report(run, dataset_root=None)
    document = json.loads(files.json.read_bytes())
    jsonschema.Draft202012Validator(json.loads(files.schema.read_bytes())).validate(document)
    points = document["targets"][0]["proposals"]["points"]
    assert [one["proposals"] for one in points] == [OWN, 150, 64]
    assert "p50_ms" not in json.dumps(document)
    timings = json.loads(files.timings.read_bytes())
    assert [one["stats"]["p50_ms"] for one in timings["targets"][0]["proposals"]["points"]] == [50, 35, 26.4]


def test_report_of_a_run_without_a_curve_has_no_section_and_misses_nothing(run: Path) -> None:
    (run / "onnx/proposals.json").unlink()
    page = build_report(run, dataset_root=None).html.read_text()
    assert "t0-proposals" not in page
    assert read_run(run).missing == ()


def test_curve_of_another_artifact_is_named_with_the_command_that_measures_it(run: Path) -> None:
    artifact = read_json(run / "onnx/artifact.json", Artifact, RunFolderError)
    save_artifact(msgspec.structs.replace(artifact, forms={"nms": "other"}), run / "onnx")
    results = read_run(run)
    assert results.targets[0].proposals is None
    missing = next(one for one in results.missing if one.stage == "proposals")
    assert missing.command == f"qexport evaluate {run} --target onnx --proposals 300,150,64"
    assert missing.why == "was measured on another artifact"


@pytest.mark.parametrize("left", ["none", "of another curve"])
def test_curve_without_times_of_its_own_says_that_it_was_not_timed(left: str, run: Path) -> None:
    path = run / "onnx/proposals_latency.json"
    if left == "none":
        path.unlink()
    else:
        shorter = usual(artifact_digest(run))
        shorter = msgspec.structs.replace(shorter, points=shorter.points[:2])
        write_json(path, latency_of(shorter, run))
    page = build_report(run, dataset_root=None).html.read_text()
    section = page.partition('<section id="t0-proposals">')[2].partition("</section>")[0]
    assert "Not timed" in section
    assert section.count("<svg") == 1
    assert "p50" not in section


def test_rows_take_changes_and_speed_from_the_run_s_own_number(run: Path) -> None:
    curve = usual()
    own, _, least = rows(curve, latency_of(curve, run))
    assert (own.own, own.voc_change, own.speed) == (True, 0.0, 1.0)
    assert least.voc_change == pytest.approx(-0.014)
    assert least.coco_change == pytest.approx(-0.005)
    assert least.speed == pytest.approx(50 / 26.4)
    assert rows(curve, None)[2].stats is None


def test_sentences_tell_noise_from_loss() -> None:
    said = sentences(
        curve_of(
            point(OWN, None, None),
            point(200, (-0.002, 0.001), (-0.001, 0.001)),
            point(150, (-0.002, 0.0), (-0.001, 0.001)),
            point(100, (-0.02, -0.004), (-0.001, 0.001)),
            point(64, (-0.03, -0.01), (-0.02, -0.005)),
        )
    )
    assert said == (
        "200 and 150 proposals: inside the noise of 72 images. No loss is seen on them, which does not show that "
        "there is none.",
        "100 proposals: VOC mAP is 0.40 to 2.00 points below that with 300, more than the noise of 72 images.",
        "64 proposals: VOC mAP is 1.00 to 3.00 points below and COCO mAP is 0.50 to 2.00 points below that with "
        "300, more than the noise of 72 images.",
    )


def test_sentences_hold_a_change_that_rounds_to_zero_for_zero() -> None:
    said = sentences(curve_of(point(OWN, None, None), point(64, (-0.01, -0.00001), (-0.01, 0.01))))
    assert said[0].startswith("64 proposals: inside the noise")


def test_sentences_of_more_proposals_than_calibrated_say_what_may_saturate() -> None:
    said = sentences(curve_of(point(500, (0.001, 0.004), (-0.001, 0.001)), point(OWN, None, None)))
    assert "VOC mAP is 0.10 to 0.40 points above that with 300" in said[0]
    assert said[1].startswith("The encodings were calibrated with 300 proposals")


def test_plot_over_latency_names_the_points_whose_parity_failed(run: Path) -> None:
    curve = curve_of(point(OWN, None, None), point(64, (-0.02, 0.01), (-0.02, 0.01), gates=(FAILED,)))
    plot = change_over_latency(curve, latency_of(curve, run), "p")
    assert "64 (parity failed)" in plot
    assert "300 (parity" not in plot


def test_plots_of_the_run_s_own_number_alone_are_drawn(run: Path) -> None:
    curve = curve_of(point(OWN, None, None))
    assert change_over_proposals(curve, "p", alone=True).startswith("<svg")
    assert change_over_latency(curve, latency_of(curve, run), "p").startswith("<svg")


def test_plot_is_the_same_every_time_and_takes_its_colours_from_the_page() -> None:
    first, second = (change_over_proposals(usual(), "p", alone=False) for _ in range(2))
    assert first == second
    assert "var(--series-3)" in first
    assert "#01" not in first
