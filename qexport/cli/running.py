"""`run`, `demo` and `inspect`: the commands that begin with a detector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from qexport.cli import options, qat_options, screen, tables
from qexport.cli.methods import Methods
from qexport.settings import Settings

DEMO_MODEL = "demo"
DEMO_MAX_DROP = 0.02
"""Two points: on the 64 images of the demo, less is inside the noise of another processor's rounding."""
DEMO_TARGETS = ("onnx", "tflite")
_PERCENTILE = 99.99


def run(
    model: options.Model,
    data: options.Data,
    out: options.Out,
    target: options.Targets = None,
    weights: options.Weights = None,
    split: options.Split = None,
    classes: options.Classes = None,
    seed: options.Seed = 0,
    observer: options.ObserverOption = "min-max",
    percentile: options.Percentile = None,
    scheme: options.SchemeOption = "int8",
    weight_scales: options.WeightScalesOption = "per-channel",
    images: options.Images = 64,
    calibration_data: options.CalibrationData = None,
    calibration_split: options.CalibrationSplit = None,
    keep_float: options.KeepFloat = None,
    qat: qat_options.Qat = None,
    qat_prepare: qat_options.QatPrepare = None,
    strict: qat_options.Strict = False,
    target_option: options.TargetOption = None,
    frame: options.Frame = None,
    proposals: options.Proposals = None,
    detections: options.Detections = None,
    preprocess: options.PreprocessOption = "inside",
    parity_images: options.ParityImages = 8,
    tolerance: options.Tolerance = 1,
    max_unmatched: options.MaxUnmatched = 0.0,
    max_drop: options.MaxDrop = 0.01,
    min_accounted: options.MinAccounted = 0.9,
    method: Methods = None,
    runs: options.Runs = 30,
    warmup: options.Warmup = 3,
    threads: options.Threads = 1,
) -> None:
    """From a checkpoint to a proven int8 artifact and its report: every stage, in order.

    MODEL names a function that returns the detector. A model.py of yours could be

      from torchvision.models.detection import fasterrcnn_resnet50_fpn
      def build():
          return fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4)

    and the command

      qexport run --model model.py:build --weights weights.pt --data dataset/ --target onnx --out runs/mine

    Several targets share one table of scales: --target onnx --target tensorrt. Where a target's device is not
    here, what its builder made is evaluated instead, layer by layer, and not timed. Several targets are also
    compared with one another. --method quantizes the detector in other ways too, to compare with. With --qat the
    weights and the scales are those of quantization-aware training; what it does not say is calibrated.
    --scheme activations quantizes feature maps alone, and measures them without a target.

    The file is run as it is; weights are only read, never executed. A run that was interrupted, and a run that
    is complete, take up where they stand when the same command is given again.
    """
    settings = _settings(
        model, data, weights, split, classes, seed,
        observer, percentile, weight_scales, images, calibration_data, calibration_split, keep_float, target_option,
        frame, proposals, detections, preprocess,
        parity_images, tolerance, max_unmatched, max_drop, min_accounted,
    )  # fmt: skip
    settings = qat_options.with_qat(settings, qat, qat_prepare, strict=strict)
    settings = msgspec.structs.replace(settings, scheme=scheme)
    _run_all(settings, out, target or [], runs, warmup, threads, methods=method or [])


def demo(
    out: options.Out,
    target: options.DemoTargets = None,
    scenes: Annotated[
        int, typer.Option("--scenes", metavar="N", min=2, help="Images to draw for each of train and test.")
    ] = 64,
    min_accounted: options.MinAccounted = 0.9,
    runs: options.Runs = 30,
    warmup: options.Warmup = 3,
    threads: options.Threads = 1,
) -> None:
    """Try everything with a small detector that comes with the package, on images that are drawn for it.

    The images go into a folder beside the run, runs/demo-data. The last line names the report.

      qexport demo --out runs/demo
    """
    from qexport.detectors.demo.scenes import write_scenes  # noqa: PLC0415 - only this command draws
    from qexport.pipeline import check_targets  # noqa: PLC0415 - `--help` needs none of it
    from qexport.run_folder import holds_run  # noqa: PLC0415

    targets = target or list(DEMO_TARGETS)
    check_targets(targets, whole_run=True)
    holds_run(out)  # refuses a file before the images are drawn
    folder = out.with_name(f"{out.name}-data")
    with screen.progress("draw scenes", 2 * scenes + scenes // 2) as step:
        write_scenes(folder, train=scenes, val=scenes // 2, test=scenes, progress=lambda _done, _all: step())
    settings = Settings(
        model=DEMO_MODEL,
        data=str(folder),
        calibration_images=scenes,
        max_drop=DEMO_MAX_DROP,
        min_accounted=min_accounted,
    )
    _run_all(settings, out, targets, runs, warmup, threads)


def inspect(
    model: options.Model,
    data: options.Data,
    out: options.Out,
    weights: options.Weights = None,
    split: options.Split = None,
    classes: options.Classes = None,
    seed: options.Seed = 0,
    observer: options.ObserverOption = "min-max",
    percentile: options.Percentile = None,
    weight_scales: options.WeightScalesOption = "per-channel",
    images: options.Images = 64,
    calibration_data: options.CalibrationData = None,
    calibration_split: options.CalibrationSplit = None,
    keep_float: options.KeepFloat = None,
    qat: qat_options.Qat = None,
    qat_prepare: qat_options.QatPrepare = None,
    strict: qat_options.Strict = False,
    target_option: options.TargetOption = None,
    frame: options.Frame = None,
    proposals: options.Proposals = None,
    detections: options.Detections = None,
    preprocess: options.PreprocessOption = "inside",
    parity_images: options.ParityImages = 8,
    tolerance: options.Tolerance = 1,
    max_unmatched: options.MaxUnmatched = 0.0,
    max_drop: options.MaxDrop = 0.01,
    min_accounted: options.MinAccounted = 0.9,
) -> None:
    """Load the detector, fix its shapes, and list its layers: parameters, MACs, int8 or float and why.

    MODEL names a function without arguments that returns the detector; its file is run as it is, weights are
    only read. The folder can be calibrated, exported and measured afterwards, stage by stage: the settings
    given here are those of the run.

      qexport inspect --model model.py:build --weights weights.pt --data dataset/ --out runs/mine
    """
    from qexport import pipeline  # noqa: PLC0415 - `--help` needs none of it

    settings = _settings(
        model, data, weights, split, classes, seed,
        observer, percentile, weight_scales, images, calibration_data, calibration_split, keep_float, target_option,
        frame, proposals, detections, preprocess,
        parity_images, tolerance, max_unmatched, max_drop, min_accounted,
    )  # fmt: skip
    settings = qat_options.with_qat(settings, qat, qat_prepare, strict=strict)
    work = pipeline.start(out, settings, command=options.exact_command(), progress=screen.progress)
    found = pipeline.inspect(work)
    screen.show(tables.describe_detector(found))
    screen.show_table(tables.layer_table(found))
    screen.show_table(tables.stage_table(found))
    screen.show(f"wrote {work.path / 'detector.json'}; next: qexport calibrate {work.path}")


def _run_all(
    settings: Settings,
    out: Path,
    targets: list[str],
    runs: int,
    warmup: int,
    threads: int,
    *,
    methods: Sequence[str] = (),
) -> None:
    """Run every stage; print what came of it."""
    from qexport import pipeline  # noqa: PLC0415 - `--help` needs none of it

    pipeline.check_targets(targets, whole_run=True)
    pipeline.check_scheme(settings.scheme, targets)
    pipeline.check_methods(methods)
    work = pipeline.start(out, settings, command=options.exact_command(), progress=screen.progress)
    outcome = pipeline.run_all(work, targets, methods=methods, runs=runs, warmup=warmup, threads=threads)
    if settings.qat:
        screen.show_table(qat_options.origin_table(work.encodings))
    if settings.observer == "auto":
        screen.show_table(tables.observer_table(work.path))
    if targets:
        screen.show_table(tables.outcome_table(work.path, targets))
    else:
        screen.show_table(tables.accuracy_table(pipeline.evaluate(work, targets)))
    for sentence in (*outcome.uncrossed, *outcome.untimed):
        screen.show(sentence)
    if targets:
        screen.show(f"artifacts: {', '.join(str(work.path / target) for target in targets)}")
    screen.show(f"figures:   {outcome.report.json}, {outcome.report.timings}")
    screen.show(f"report:    {outcome.report.html}")
    tables.require_gates(outcome.gates, run=out)


def _settings(
    model: str,
    data: Path,
    weights: Path | None,
    split: str | None,
    classes: str | None,
    seed: int,
    observer: options.Observer,
    percentile: float | None,
    weight_scales: options.WeightScales,
    images: int,
    calibration_data: Path | None,
    calibration_split: str | None,
    keep_float: list[str] | None,
    target_option: list[str] | None,
    frame: str | None,
    proposals: int | None,
    detections: int | None,
    preprocess: options.Preprocess,
    parity_images: int,
    tolerance: int,
    max_unmatched: float,
    max_drop: float,
    min_accounted: float,
) -> Settings:
    options.check_percentile(observer, percentile)
    return Settings(
        model=model,
        weights=str(weights) if weights else None,
        data=str(data),
        classes=options.parse_classes(classes) if classes else (),
        frame_px=options.parse_frame(frame) if frame else None,
        proposals=proposals,
        detections=detections,
        preprocess=preprocess,
        calibration_data=str(calibration_data) if calibration_data else None,
        calibration_split=calibration_split,
        calibration_images=images,
        observer=observer,
        percentile=_PERCENTILE if percentile is None else percentile,
        weight_scales=weight_scales,
        keep_float=tuple(keep_float or ()),
        target_options=tuple(target_option or ()),
        split=split,
        parity_images=parity_images,
        tolerance_steps=tolerance,
        max_unmatched=max_unmatched,
        max_drop=max_drop,
        min_accounted=min_accounted,
        seed=seed,
    )
