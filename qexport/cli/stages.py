"""`calibrate`, `export`, `compare`, `bench` and `evaluate`: one stage of a run at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from qexport.cli import options, qat_options, screen, tables
from qexport.cli.measuring import measure_bundle
from qexport.cli.methods import Methods, show_methods
from qexport.errors import QexportError, RunFolderError

if TYPE_CHECKING:
    from qexport.results import Gate
    from qexport.work import Work

_RUNS = 30
"""Of each point of a curve, as of `bench`."""


def calibrate(
    run: options.Run,
    observer: options.ObserverChange = None,
    percentile: options.Percentile = None,
    scheme: options.SchemeChange = None,
    weight_scales: options.WeightScalesChange = None,
    images: options.ImagesChange = None,
    calibration_data: options.CalibrationData = None,
    calibration_split: options.CalibrationSplit = None,
    keep_float: options.KeepFloat = None,
    qat: qat_options.Qat = None,
    qat_prepare: qat_options.QatPrepare = None,
    strict: qat_options.StrictChange = None,
    seed: options.SeedChange = None,
) -> None:
    """Decide every scale, from images or by a QAT checkpoint, and write the table of encodings.

    An option that is given replaces the run's setting. Artifacts and measurements of the old table are removed.
    With --qat the detector gets the checkpoint's weights too.

      qexport calibrate runs/mine
      qexport calibrate runs/mine --observer auto
      qexport calibrate runs/mine --observer mse --images 128 --keep-float 'backbone.body.conv1'
    """
    from qexport import pipeline  # noqa: PLC0415 - `--help` needs none of it

    work = _resume(
        run,
        {
            "observer": observer,
            "percentile": percentile,
            "scheme": scheme,
            "weight_scales": weight_scales,
            "calibration_images": images,
            "calibration_data": str(calibration_data) if calibration_data else None,
            "calibration_split": calibration_split,
            "keep_float": tuple(keep_float) if keep_float else None,
            "qat": str(qat) if qat else None,
            "qat_prepare": qat_prepare,
            "strict": strict,
            "seed": seed,
        },
    )
    encodings = pipeline.calibrate(work)
    if work.settings.qat:
        screen.show_table(qat_options.origin_table(encodings))
    if work.settings.observer == "auto":
        screen.show_table(tables.observer_table(work.path))
    screen.show(
        f"{len(encodings.rows)} rows, {len(encodings.float_rows)} layers float; "
        f"{tables.where_ranges_come_from(encodings.calibration)}"
    )
    following = f"export {work.path} --target onnx"
    if work.settings.scheme == "activations":
        following = f"evaluate {work.path}"
    screen.show(f"wrote {work.path / 'encodings.json'}; next: qexport {following}")


def export(run: options.Run, target: options.OneTarget, target_option: options.TargetOption = None) -> None:
    """Lower the quantized detector to a runtime; what was written is read back before it is called done.

    Needs the table of encodings: `qexport calibrate` comes first. Options that are given replace the run's.

      qexport export runs/mine --target onnx
      qexport export runs/mine --target tensorrt -O tensorrt.weights=int8
    """
    from qexport import pipeline  # noqa: PLC0415 - `--help` needs none of it

    pipeline.check_targets([target])
    work = _resume(run, {"target_options": tuple(target_option) if target_option else None})
    artifact = pipeline.export(work, target)
    for file in artifact.files:
        screen.show(f"{work.path / target / file.name}: {file.role}, {file.size_bytes / 1e6:.2f} MB")
    for sentence in tables.describe_engines(work.path / target):
        screen.show(sentence)
    integer = sum(layer.integer for layer in artifact.layers)
    reformats = sum(layer.reformats for layer in artifact.layers)
    screen.show(
        f"{integer} of {len(artifact.layers)} layers run on integer kernels"
        + (f"; {reformats} reformats between them" if artifact.rung == "built" else "")
    )
    screen.show(f"next: qexport compare {work.path} --target {target}")


def compare(
    run: options.Run,
    target: options.TargetsOfRun = None,
    cross: options.Cross = False,
    parity_images: options.ParityImagesChange = None,
    tolerance: options.ToleranceChange = None,
    max_unmatched: options.MaxUnmatchedChange = None,
) -> None:
    """Compare an artifact with the integer reference and the float detector, layer by layer.

    Leaves with exit code 1 and names the layer where a gate fails. With --cross all targets are compared with one
    another.

      qexport compare runs/mine --target onnx --parity-images 4
      qexport compare runs/mine --cross
    """
    from qexport import pipeline  # noqa: PLC0415 - `--help` needs none of it

    if cross:
        _compare_all(
            run, target, parity_images, limits_given=tolerance is not None or max_unmatched is not None
        )
        return
    one = _single(target, run)
    pipeline.check_targets([one])
    work = _resume(
        run,
        {"parity_images": parity_images, "tolerance_steps": tolerance, "max_unmatched": max_unmatched},
    )
    parity = pipeline.compare(work, one)
    screen.show_table(tables.parity_table(parity))
    screen.show(f"wrote {work.path / one / 'parity.json'}")
    tables.require_gates(parity.gates)


def _single(targets: Sequence[str] | None, run: Path) -> str:
    """Return the one target that was given."""
    if not targets:
        raise QexportError(
            f"--target is missing: which target of the run {run}? With --cross all are compared."
        )
    if len(targets) > 1:
        raise QexportError(
            f"--target is given {len(targets)} times: one target is compared with its references at a time. To compare "
            "targets with each other: --cross."
        )
    return targets[0]


def _compare_all(
    run: Path, targets: Sequence[str] | None, parity_images: int | None, *, limits_given: bool
) -> None:
    """Compare every target with every other; show each pair."""
    from qexport import pipeline  # noqa: PLC0415 - `--help` needs none of it

    if limits_given:
        raise QexportError(
            "--tolerance and --max-unmatched are for a target and its references; the limits between two targets are "
            "fixed. Leave them out."
        )
    chosen = targets or pipeline.exported_targets(run)
    pipeline.check_cross_targets(chosen)
    work = _resume(run, {"parity_images": parity_images})
    found = pipeline.cross(work, chosen)
    screen.show_table(tables.cross_table(found))
    screen.show(f"wrote {work.path / 'cross.json'}")
    tables.require_gates(found.gates)


def bench(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|BUNDLE", help="Folder of a run; or a bundle, its folder or archive: on a board."
        ),
    ],
    target: Annotated[
        str | None,
        typer.Option(
            "--target", metavar="NAME", show_default=False, help="Of a run: which target. A bundle has one."
        ),
    ] = None,
    runs: options.Runs = 30,
    warmup: options.Warmup = 3,
    threads: options.Threads = 1,
    min_accounted: options.MinAccountedChange = None,
    again: Annotated[
        bool, typer.Option("--again", help="Measure anew what this machine has measured before.")
    ] = False,
    out: options.MeasurementFile = None,
    measured_on: options.MeasuredOnOption = None,
) -> None:
    """Measure latency, whole and by layer, beside PyTorch and the same runtime in float32; and peak memory.

    The contenders run in turns, one frame at a time. The parity verdict stands beside every figure.

    Of a bundle, on a board: no PyTorch; the golden frames are verified first, temperature, clock and throttling are
    read before and after, and all is written for `qexport report RUN --merge`.

      qexport bench runs/mine --target onnx --runs 100 --threads 2
      qexport bench mine.qbundle --runs 100 --out measurement.json
    """
    from qexport.bundle import is_bundle  # noqa: PLC0415 - `--help` needs none of it

    _check_bench_options(
        is_bundle(run), run, target, of_run=again, of_bundle=out is not None or measured_on is not None
    )
    if target is None:
        measure_bundle(
            run,
            out or Path("measurement.json"),
            runs=runs,
            warmup=warmup,
            threads=threads,
            min_accounted=min_accounted,
            given=measured_on,
        )
        return
    from qexport import pipeline  # noqa: PLC0415 - a board has no need of it

    pipeline.check_targets([target])
    work = _resume(run, {"min_accounted": min_accounted})
    profile = pipeline.bench(work, target, runs=runs, warmup=warmup, threads=threads, again=again)
    screen.show_table(tables.latency_table(work.path, target))
    screen.show(f"wrote {work.path / target / 'latency.json'}")
    tables.require_gates(profile.gates)


def _check_bench_options(
    bundle: bool, path: Path, target: str | None, *, of_run: bool, of_bundle: bool
) -> None:
    """Refuse options that nobody would look at."""
    if bundle and (target is not None or of_run):
        raise QexportError(
            f"{path} is a bundle: it has one target and keeps no results. Leave --target and --again out."
        )
    if not bundle and target is None:
        raise QexportError(f"--target is missing: which target of the run {path}? Only a bundle needs none.")
    if not bundle and of_bundle:
        raise QexportError(
            "--out and --measured-on are for a bundle; what is measured of a run lies in its folder. Leave them out."
        )


def evaluate(
    run: options.Run,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            metavar="NAME",
            show_default=False,
            help="Target to measure, may be given several times. Default: every one that was exported.",
        ),
    ] = None,
    max_drop: options.MaxDropChange = None,
    method: Methods = None,
    proposals: options.ProposalNumbers = None,
    runs: options.RunsOfCurve = None,
    threads: options.ThreadsOfCurve = None,
) -> None:
    """Measure VOC and COCO mAP of the float detector, the quantized reference and the artifacts.

    Leaves with exit code 1 where mAP falls by more than --max-drop. With --proposals it measures what fewer
    proposals cost and save: each number is exported with the same encodings, compared, evaluated and timed. With
    --method the detector is also quantized in other ways, to compare with.

      qexport evaluate runs/mine
      qexport evaluate runs/mine --method dynamic --method activations
      qexport evaluate runs/mine --target onnx --proposals 300,200,150,100,64
    """
    from qexport import pipeline  # noqa: PLC0415 - `--help` needs none of it

    numbers = options.parse_proposals(proposals) if proposals is not None else None
    _check_curve_options(numbers is not None, max_drop, runs, threads, methods=bool(method))
    pipeline.check_methods(method or [])
    targets = target or pipeline.exported_targets(run)
    pipeline.check_targets(targets, whole_run=True)
    work = _resume(run, {"max_drop": max_drop})
    if not targets and work.settings.scheme == "int8":
        raise RunFolderError(
            f"{run}: no target was exported. Run `qexport export {run} --target onnx` first."
        )
    if numbers is not None:
        _price_proposals(work, targets, numbers, runs=runs or _RUNS, threads=threads or 1)
        return
    accuracy = pipeline.evaluate(work, targets)
    screen.show_table(tables.accuracy_table(accuracy))
    screen.show(f"wrote {work.path / 'accuracy.json'}")
    if method:
        show_methods(work, method, runs=runs or _RUNS)
    tables.require_gates(accuracy.gates, run=run)


def _check_curve_options(
    curve: bool, max_drop: float | None, runs: int | None, threads: int | None, *, methods: bool
) -> None:
    """Refuse options that nobody would look at."""
    if curve and max_drop is not None:
        raise QexportError(
            "--max-drop is for `qexport evaluate` without --proposals: the curve shows what each number costs "
            "and refuses none. Leave it out."
        )
    if curve and methods:
        raise QexportError(
            "--method and --proposals are two tables: ask for one after the other, in two commands."
        )
    if not curve and ((runs is not None and not methods) or threads is not None):
        raise QexportError(
            "--runs and --threads are for --proposals, whose points are timed; --runs for --method too, which is timed "
            "on one thread. To time the artifact itself: qexport bench."
        )


def _price_proposals(
    work: Work, targets: Sequence[str], numbers: Sequence[int], *, runs: int, threads: int
) -> None:
    """Measure and show each target's curve; gates are asked when all are written."""
    from qexport import pipeline  # noqa: PLC0415 - `--help` needs none of it
    from qexport.devices import why_untimed  # noqa: PLC0415

    gates: list[Gate] = []
    for target in targets:
        curve, latency = pipeline.price_proposals(work, target, numbers, runs=runs, threads=threads)
        screen.show_table(tables.proposal_table(curve, latency))
        for sentence in tables.describe_proposals(curve):
            screen.show(sentence)
        if latency is None:
            screen.show(why_untimed(target, work.path))
        screen.show(f"wrote {work.path / target / 'proposals.json'}")
        gates += [gate for point in curve.points for gate in point.gates]
    tables.require_gates(gates)


def _resume(run: Path, changes: dict[str, object]) -> Work:
    """Open a run; options that were given replace its settings."""
    from qexport import pipeline  # noqa: PLC0415 - `--help` needs none of it
    from qexport.run_folder import open_run  # noqa: PLC0415

    given = {name: value for name, value in changes.items() if value is not None}
    if not given:
        return pipeline.resume(run, progress=screen.progress)
    settings = msgspec.structs.replace(open_run(run).settings, **given)
    options.check_percentile(settings.observer, settings.percentile if "percentile" in given else None)
    return pipeline.resume(run, settings=settings, command=options.exact_command(), progress=screen.progress)
