"""The tables that commands print, and the gates that decide their exit code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from qexport.cross_results import CrossReport
from qexport.devices import has_device
from qexport.diagnosing import FILE as CULPRIT
from qexport.diagnosis_results import Diagnosis
from qexport.engines import FOLDER, load_engines
from qexport.errors import GateFailed, RunFolderError
from qexport.files import read_json
from qexport.layers import STAGES, DetectorReport
from qexport.observer_results import OBSERVERS, ObserverReport
from qexport.results import (
    Accuracy,
    AccuracyReport,
    Gate,
    Interval,
    LatencyProfile,
    ParityReport,
    ProposalCurve,
    ProposalLatency,
)
from qexport.target import TARGETS, Ability, Target, latency_note
from qexport.target_options import describe_options

_ABILITIES: tuple[Ability, ...] = ("export", "run", "measure")


def require_gates(gates: Sequence[Gate], *, run: Path | None = None) -> None:
    """Go on only where every gate holds.

    Args:
        gates: what was promised.
        run: whose culprit is named, where one was found.

    Raises:
        GateFailed: names those that do not, with what was measured and what was asked.
    """
    from qexport.benchmarks.report.verdict import describe_gate  # noqa: PLC0415 - `--help` needs none of it

    failed = [gate for gate in gates if not gate.passed]
    if failed:
        lines = [
            f"{gate.subject}: {describe_gate(gate)}" if gate.subject else describe_gate(gate)
            for gate in failed
        ]
        path = run / CULPRIT if run is not None else None
        culprit = (
            f". {read_json(path, Diagnosis, RunFolderError).sentence}"
            if path is not None and path.is_file()
            else ""
        )
        raise GateFailed(f"{len(failed)} of {len(gates)} gates failed. " + "; ".join(lines) + culprit)


def describe_detector(found: DetectorReport) -> str:
    """Return the detector in one line."""
    (frame_h, frame_w), (padded_h, padded_w) = found.frame_px, found.padded_px
    return (
        f"{found.source}: {found.backbone}, {len(found.labels) - 1} classes, "
        f"{found.parameters:,} parameters, {found.macs / 1e9:.2f} G MACs; frame {frame_h}x{frame_w}, "
        f"image {padded_h}x{padded_w}, {found.proposals} proposals, {found.detections} detections"
    )


def layer_table(found: DetectorReport) -> Table:
    """Return a row for each layer."""
    table = make_table("layer", "call", "kind", "output", ">parameters", ">M MACs", "becomes")
    for layer in found.layers:
        table.add_row(
            layer.path,
            str(layer.call),
            layer.op,
            "x".join(map(str, layer.shape)) or "-",
            f"{layer.parameters:,}" if layer.parameters else "-",
            f"{layer.macs / 1e6:,.1f}" if layer.macs else "-",
            "int8" if layer.quantized else f"float: {layer.reason}",
        )
    return table


def stage_table(found: DetectorReport) -> Table:
    """Return the sums of each stage of the detector."""
    table = make_table("stage", ">layers", ">int8", ">parameters", ">M MACs", ">share")
    for stage in STAGES:
        layers = [layer for layer in found.layers if layer.stage == stage]
        if layers:
            macs = sum(layer.macs for layer in layers)
            table.add_row(
                stage,
                str(len(layers)),
                str(sum(layer.quantized for layer in layers)),
                f"{sum(layer.parameters for layer in layers):,}",
                f"{macs / 1e6:,.1f}",
                f"{100 * macs / found.macs:.1f} %" if found.macs else "-",
            )
    return table


def outcome_table(run: Path, targets: Sequence[str]) -> Table:
    """Return a row for each target of a run: what it costs and what it brings."""
    from qexport.benchmarks.report.formats import smaller, speed  # noqa: PLC0415 - `--help` needs none of it
    from qexport.benchmarks.report.stages import read_run  # noqa: PLC0415
    from qexport.benchmarks.report.tables import speedup, worst_layer  # noqa: PLC0415
    from qexport.benchmarks.report.verdict import parity_verdict  # noqa: PLC0415

    results = read_run(run)
    table = make_table(
        "target", "VOC mAP, float to int8", "worst layer", "latency", "size", "parity", "verdict"
    )
    before = _accuracy(results.accuracy, "eager")
    for one in results.targets:
        if one.target not in targets:
            continue
        after, layer = (
            _accuracy(results.accuracy, one.target),
            worst_layer(one.parity) if one.parity else None,
        )
        size = one.complexity
        gates = [
            *(one.parity.gates if one.parity else ()),
            *(
                gate
                for gate in (results.accuracy.gates if results.accuracy else ())
                if gate.subject == one.target
            ),
            *(one.latency.gates if one.latency else ()),
        ]
        failed = [gate.name for gate in gates if not gate.passed]
        table.add_row(
            one.target,
            f"{100 * before.voc_map50:.1f} to {100 * after.voc_map50:.1f}" if before and after else "-",
            f"{layer.path}, {layer.sqnr_fp32_db:.1f} dB" if layer and layer.sqnr_fp32_db is not None else "-",
            f"{speed(speedup(one.latency, 'eager'))} than eager{_note(one.latency)}" if one.latency else "-",
            smaller(size.float_bytes / size.artifact_bytes) if size else "-",
            parity_verdict(one.parity).text.removeprefix("parity "),
            f"failed: {', '.join(failed)}" if failed else f"ok, {len(gates)} gates",
        )
    return table


def parity_table(parity: ParityReport) -> Table:
    """Return a row for each gate, and one for the worst layer."""
    from qexport.benchmarks.report.tables import status_counts, worst_layer  # noqa: PLC0415

    table = _gate_table(parity.gates)
    worst = worst_layer(parity)
    if worst is not None and worst.sqnr_fp32_db is not None:
        table.add_row("worst layer", f"{worst.sqnr_fp32_db:.1f} dB against float", "", worst.path, "")
    counts = ", ".join(
        f"{count} {status.replace('_', ' ')}" for status, count in status_counts(parity).items()
    )
    table.caption = f"{parity.images} images; layers: {counts}"
    return table


def cross_table(found: CrossReport) -> Table:
    """Return a row for each pair of targets."""
    table = make_table(
        "targets", ">values", ">differ", ">per million", ">max step", "RoIAlign", "first parts at"
    )
    for pair in found.pairs:
        total, form = pair.promised, pair.kinds.get("roi_align")
        table.add_row(
            f"{pair.first} and {pair.second}",
            f"{total.values:,}",
            f"{total.differing:,}",
            f"{total.per_million:.2f}",
            str(total.max_step),
            f"{form.per_million:,.0f} per million, max step {form.max_step}" if form else "-",
            escape(pair.parts_at) or "nowhere",
        )
    table.caption = f"{found.images} images of {found.split}; values of convolutions, linears and adds"
    return table


def latency_table(run: Path, target: str) -> Table:
    """Return a row for each subject that was run in turns; the parity verdict stands in every row."""
    from qexport.benchmarks.report.stages import read_run  # noqa: PLC0415 - `--help` needs none of it
    from qexport.benchmarks.report.verdict import parity_verdict  # noqa: PLC0415

    table = make_table(
        "subject", ">p50 ms", ">p90 ms", ">p99 ms", ">mean ms", ">std ms", ">peak MB", "parity"
    )
    for one in read_run(run).targets:
        if one.target != target or one.latency is None:
            continue
        verdict = parity_verdict(one.parity).text.removeprefix("parity ")
        memory = {use.subject: f"{use.peak_bytes / 1e6:.0f}" for use in one.memory or ()}
        for subject, stats in one.latency.whole.items():
            times = (stats.p50_ms, stats.p90_ms, stats.p99_ms, stats.mean_ms, stats.std_ms)
            shown = verdict if subject == "artifact" else f"baseline; artifact: {verdict}"
            table.add_row(subject, *(f"{time:.2f}" for time in times), memory.get(subject, "-"), shown)
        table.caption = (
            f"{one.latency.machine.processor}, {one.latency.machine.measured_on}, "
            f"{one.latency.threads} threads; layers account for {100 * one.latency.accounted_share:.1f} %"
            f"{_note(one.latency)}"
        )
    return table


def _note(latency: LatencyProfile) -> str:
    """Return what is to be said behind a target's latency."""
    note = latency_note(latency.target, latency.machine.system)
    return f". {note}" if note else ""


def accuracy_table(accuracy: AccuracyReport) -> Table:
    """Return a row for each subject."""
    table = make_table(
        "subject", ">VOC mAP 0.5", ">COCO mAP", ">COCO 0.5", ">COCO 0.75", ">VOC drop", ">COCO drop"
    )
    eager = _accuracy(accuracy, "eager")
    for one in accuracy.subjects:
        figures = (one.voc_map50, one.coco_map, one.coco_map50, one.coco_map75)
        drops = (eager.voc_map50 - one.voc_map50, eager.coco_map - one.coco_map) if eager else ()
        table.add_row(one.subject, *(f"{100 * figure:.2f}" for figure in (*figures, *drops)))
    table.caption = (
        f"{accuracy.dataset}/{accuracy.split}: {accuracy.images} images, {accuracy.objects} objects, "
        f"{accuracy.dropped_boxes} boxes dropped; points of 100"
    )
    return table


def observer_table(run: Path) -> Table:
    """Return a row for each stage in which `--observer auto` found another observer best than min-max."""
    report = read_json(run / OBSERVERS, ObserverReport, RunFolderError)
    table = make_table("stage", ">feature maps", ">at the heads, dB", "taken")
    table.add_row("", "", _decibels(report.min_max_db), "min-max for all")
    for one in report.stages:
        taken = "yes" if one.taken else "no: the heads lose by it"
        table.add_row(one.stage, str(one.tensors), _decibels(one.sqnr_db), taken)
    table.caption = (
        f"feature maps for which another observer is best, and signal to noise with it, on {report.held_out} "
        f"calibration image{'s' if report.held_out != 1 else ''} that no observer saw; each of them: {run / OBSERVERS}"
    )
    return table


def _decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def proposal_table(curve: ProposalCurve, latency: ProposalLatency | None) -> Table:
    """Return a row for each number of proposals; its parity verdict stands beside its latency."""
    from qexport.benchmarks.report import proposals  # noqa: PLC0415 - `--help` needs none of it
    from qexport.benchmarks.report.formats import signed, speed  # noqa: PLC0415

    table = make_table(
        ">proposals", ">VOC mAP 0.5", ">change", "interval", ">COCO mAP", ">change", "interval",
        ">p50 ms", ">std ms", "latency", "parity",
    )  # fmt: skip
    for row in proposals.rows(curve, latency):
        point, stats = row.point, row.stats
        table.add_row(
            str(point.proposals),
            f"{100 * point.voc_map50:.2f}",
            signed(None if row.own else 100 * row.voc_change, 2),
            _interval(point.voc_change_interval),
            f"{100 * point.coco_map:.2f}",
            signed(None if row.own else 100 * row.coco_change, 2),
            _interval(point.coco_change_interval),
            f"{stats.p50_ms:.2f}" if stats else "-",
            f"{stats.std_ms:.2f}" if stats else "-",
            speed(None if row.own else row.speed),
            row.parity.text.removeprefix("parity "),
        )
    where = "not timed: the device is not here"
    if latency is not None:
        where = f"{latency.machine.processor}, {latency.machine.measured_on}, {latency.threads} threads"
    table.caption = (
        f"{curve.target} on {curve.dataset}/{curve.split}, {curve.images} images; changes from {curve.own_proposals} "
        f"proposals, points of 100; {where}"
    )
    return table


def describe_proposals(curve: ProposalCurve) -> tuple[str, ...]:
    """Return what may be said of each number of proposals, given the noise of the split."""
    from qexport.benchmarks.report import proposals  # noqa: PLC0415 - `--help` needs none of it

    return proposals.sentences(curve)


def describe_engines(folder: Path) -> list[str]:
    """Return a sentence for each engine that was built beside an artifact."""
    return [
        f"{folder / FOLDER / engine.name}: {engine.role} engine, {engine.size_bytes / 1e6:.2f} MB, built in "
        f"{engine.build_s:.1f} s by {engine.built_for.library}, "
        + (f"for {engine.built_for.gpu}" if engine.built_for.gpu else "without a GPU: it shows what is built")
        for engine in load_engines(folder).engines
    ]


def target_table() -> Table:
    """Return a row for each target: what can be done with it here."""
    table = make_table("target", *_ABILITIES, "what it is")
    for target in TARGETS:
        table.add_row(target.name, *(_ability(target, ability) for ability in _ABILITIES), target.summary)
    return table


def target_option_table() -> Table:
    """Return a row for each option that one target alone has."""
    table = make_table("-O", "default", "what it chooses")
    for target in TARGETS:
        for name, default, meaning in describe_options(target.options):
            table.add_row(f"{target.name}.{name}", default or "-", meaning)
    return table


def _ability(target: Target, ability: Ability) -> str:
    missing = target.missing(ability)
    if missing:
        # Brackets are the extras of a package, not rich's markup.
        return escape(f"no {', '.join(missing)}: {target.install_command(ability)}")
    if ability == "run" and not has_device(target.name):
        return "no device here"
    return "yes"


def _accuracy(report: AccuracyReport | None, subject: str) -> Accuracy | None:
    return next((one for one in (report.subjects if report else ()) if one.subject == subject), None)


def _interval(interval: Interval | None) -> str:
    from qexport.benchmarks.report.formats import signed  # noqa: PLC0415 - `--help` needs none of it

    return f"{signed(100 * interval.low, 2)} to {signed(100 * interval.high, 2)}" if interval else "-"


def _gate_table(gates: Sequence[Gate]) -> Table:
    table = make_table("gate", "measured", "asked", "where", "")
    for gate in gates:
        table.add_row(gate.name, gate.measured, gate.limit, gate.culprit, "ok" if gate.passed else "failed")
    return table


def make_table(*columns: str) -> Table:
    """Return an empty table; a column whose name begins with `>` is aligned to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    for column in columns:
        table.add_column(
            column.removeprefix(">"), justify="right" if column.startswith(">") else "left", overflow="fold"
        )
    return table


def where_ranges_come_from(calibration: Mapping[str, object]) -> str:
    """Return a clause on the images that the ranges were watched on, by the notes of the encodings."""
    if not calibration["images"]:
        return "every scale is the checkpoint's"
    watched = "{observer} on {images} images of {dataset}/{split}"
    return watched.format_map(calibration)
