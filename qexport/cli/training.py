"""`qat`: a short fine-tune with fake quantization, from a float checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import typer

from qexport.cli import options, qat_options, screen
from qexport.errors import QexportError
from qexport.settings import Settings

if TYPE_CHECKING:
    from qexport.fine_tuning import FineTuned
    from qexport.training_history import History

_TRAINING = "Training"
_SCALES = "Scales"
_DISTILLATION = "Distillation from the float detector"
_WATCH = "Validation and end"
_PERCENTILE = 99.99
_WEIGHT = 1.0


def qat(
    model: options.Model,
    data: options.Data,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="FOLDER",
            help="Folder of the training. One that holds the same training is taken up where it stopped; another "
            "is refused.",
        ),
    ],
    weights: options.Weights = None,
    train_split: Annotated[
        str | None,
        typer.Option(
            "--train-split",
            metavar="NAME",
            rich_help_panel=_TRAINING,
            help="Split to train on. Default: train.",
            show_default=False,
        ),
    ] = None,
    classes: options.Classes = None,
    seed: options.Seed = 0,
    epochs: Annotated[
        int, typer.Option("--epochs", metavar="N", min=1, rich_help_panel=_TRAINING, help="How often.")
    ] = 2,
    lr: Annotated[
        float,
        typer.Option(
            "--lr",
            metavar="RATE",
            min=1e-9,
            rich_help_panel=_TRAINING,
            help="Learning rate at its peak: it rises over --warm-up and falls as a cosine.",
        ),
    ] = 0.001,
    warm_up: Annotated[
        float,
        typer.Option(
            "--warm-up",
            metavar="SHARE",
            min=0.0,
            max=1.0,
            rich_help_panel=_TRAINING,
            help="Share of all steps.",
        ),
    ] = 0.1,
    batch: Annotated[
        int,
        typer.Option("--batch", metavar="N", min=1, rich_help_panel=_TRAINING, help="Images of one step."),
    ] = 4,
    images: Annotated[
        int | None,
        typer.Option(
            "--images",
            metavar="N",
            min=1,
            rich_help_panel=_TRAINING,
            help="Images of one epoch, drawn anew for each. Default: all of the split.",
            show_default=False,
        ),
    ] = None,
    flip: Annotated[
        bool,
        typer.Option("--flip/--no-flip", rich_help_panel=_TRAINING, help="Mirror images by chance."),
    ] = True,
    clip_norm: Annotated[
        float,
        typer.Option(
            "--clip-norm",
            metavar="X",
            min=1e-6,
            rich_help_panel=_TRAINING,
            help="Largest norm of a gradient.",
        ),
    ] = 10.0,
    freeze: Annotated[
        list[str] | None,
        typer.Option(
            "--freeze",
            metavar="PATH",
            rich_help_panel=_TRAINING,
            help="Module whose weights stay, with what is below it: backbone.body.layer1. May be given several "
            "times.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        Literal["cpu", "cuda"], typer.Option("--device", rich_help_panel=_TRAINING, help="What trains.")
    ] = "cpu",
    freeze_observers_after: Annotated[
        float,
        typer.Option(
            "--freeze-observers-after",
            metavar="EPOCHS",
            min=0.0,
            rich_help_panel=_SCALES,
            help="So long the scales follow what is seen, 0.5 is half an epoch; then they stay. 0: those of the "
            "calibration stay.",
        ),
    ] = 0.5,
    observer: options.ObserverOption = "min-max",
    percentile: options.Percentile = None,
    weight_scales: options.WeightScalesOption = "per-channel",
    calibration_images: Annotated[
        int,
        typer.Option(
            "--calibration-images",
            metavar="N",
            min=1,
            rich_help_panel=_SCALES,
            help="Images for the calibration that training begins with.",
        ),
    ] = 64,
    keep_float: options.KeepFloat = None,
    distill: Annotated[
        bool,
        typer.Option(
            "--distill",
            rich_help_panel=_DISTILLATION,
            help="Besides the detector's own losses: stay near the float detector's feature maps and outputs.",
        ),
    ] = False,
    distill_only: Annotated[
        bool,
        typer.Option(
            "--distill-only",
            rich_help_panel=_DISTILLATION,
            help="Nothing but that: images need no boxes.",
        ),
    ] = False,
    distill_features: Annotated[
        float | None,
        typer.Option(
            "--distill-features",
            metavar="WEIGHT",
            min=0.0,
            rich_help_panel=_DISTILLATION,
            help="Weight of the feature maps. Default: 1.",
            show_default=False,
        ),
    ] = None,
    distill_outputs: Annotated[
        float | None,
        typer.Option(
            "--distill-outputs",
            metavar="WEIGHT",
            min=0.0,
            rich_help_panel=_DISTILLATION,
            help="Weight of objectness, classes and boxes. Default: 1.",
            show_default=False,
        ),
    ] = None,
    val_split: Annotated[
        str | None,
        typer.Option(
            "--val-split",
            metavar="NAME",
            rich_help_panel=_WATCH,
            help="Split that chooses the best epoch. Default: val, else a tenth of the training images, held out. "
            "Never the test split.",
            show_default=False,
        ),
    ] = None,
    val_images: Annotated[
        int | None,
        typer.Option(
            "--val-images",
            metavar="N",
            min=1,
            rich_help_panel=_WATCH,
            help="Images of it, drawn by the seed. Default: all.",
            show_default=False,
        ),
    ] = None,
    patience: Annotated[
        int,
        typer.Option(
            "--patience",
            metavar="N",
            min=1,
            rich_help_panel=_WATCH,
            help="Epochs without a better result after which training stops.",
        ),
    ] = 2,
    max_fall: Annotated[
        float,
        typer.Option(
            "--max-fall",
            metavar="POINTS",
            min=0.0,
            rich_help_panel=_WATCH,
            help="Fall of the COCO mAP below where training began that counts as divergence, as a fraction.",
        ),
    ] = 0.1,
    frame: options.Frame = None,
    preprocess: options.PreprocessOption = "inside",
) -> None:
    """Train a little more, with the quantization of the export inside, where plain calibration costs accuracy.

    Begins with a float checkpoint and its calibration, and trains weights under fake quantization: the same
    scales, the same rounding, the same fused layers as in what is exported, BatchNorm folded (and so frozen).
    FOLDER/qat.pt then holds weights and scales, for every target:

      qexport qat --model model.py:build --weights weights.pt --data dataset/ --distill --out qat/mine
      qexport run --qat qat/mine/qat.pt --model model.py:build --weights weights.pt --data dataset/ --target onnx
        --out runs/mine

    Each epoch is measured by the quantized reference on the validation split; the best one is kept, the
    calibrated detector before training counts as epoch 0. --distill-only needs no annotations at all.

    Killed at any moment, the same command goes on at the last complete epoch and comes to the same bits.
    """
    from qexport.fine_tuning import FineTuning  # noqa: PLC0415 - `--help` needs none of it
    from qexport.training.settings import TrainingSettings  # noqa: PLC0415

    options.check_percentile(observer, percentile)
    features, outputs = _distillation(distill, distill_only, distill_features, distill_outputs)
    settings = Settings(
        model=model,
        weights=str(weights) if weights else None,
        data=str(data),
        classes=options.parse_classes(classes) if classes else (),
        frame_px=options.parse_frame(frame) if frame else None,
        preprocess=preprocess,
        calibration_split=train_split,
        calibration_images=calibration_images,
        observer=observer,
        percentile=_PERCENTILE if percentile is None else percentile,
        weight_scales=weight_scales,
        keep_float=tuple(keep_float or ()),
        split=val_split,
        seed=seed,
    )
    training = TrainingSettings(
        epochs=epochs,
        learning_rate=lr,
        warm_up=warm_up,
        batch=batch,
        images=images,
        flip=flip,
        clip_norm=clip_norm,
        freeze=tuple(freeze or ()),
        freeze_observers_after=freeze_observers_after,
        distill_features=features,
        distill_outputs=outputs,
        distill_only=distill_only,
        validation_images=val_images,
        patience=patience,
        max_fall=max_fall,
        device=device,
    )
    tuning = FineTuning(settings, training, progress=screen.progress)
    said = _Narrator()
    found = tuning.run(out, command=options.exact_command(), on_epoch=said)
    said(found.history)
    _conclude(found, settings)


class _Narrator:
    """Writes a line for each epoch, once; of those that an earlier command trained, too."""

    def __init__(self) -> None:
        self._said = 0

    def __call__(self, history: History) -> None:
        if not self._said and history.float_detector is not None:
            screen.show(f"float:      {history.float_detector}")
        for record in history.epochs[self._said :]:
            title = "calibrated" if record.epoch == 0 else f"epoch {record.epoch}"
            loss = f", loss {sum(record.losses.values()):.4f}" if record.losses else ""
            best = ", the best so far" if record.best and record.epoch else ""
            screen.show(f"{title + ':':<11} {record.measured}{loss}{best}")
        self._said = len(history.epochs)


def _distillation(
    distill: bool, distill_only: bool, features: float | None, outputs: float | None
) -> tuple[float, float]:
    """Return the weights of both distances."""
    if not (distill or distill_only):
        if features is not None or outputs is not None:
            raise QexportError(
                "--distill-features and --distill-outputs are weights of --distill or --distill-only. Give one of "
                "these as well."
            )
        return 0.0, 0.0
    weights = (_WEIGHT if features is None else features, _WEIGHT if outputs is None else outputs)
    if not any(weights):
        raise QexportError("--distill-features 0 and --distill-outputs 0 leave nothing to distill.")
    return weights


def _conclude(found: FineTuned, settings: Settings) -> None:
    history, agreement = found.history, found.agreement
    kept = history.best.epoch
    screen.show(f"{history.status}: {history.message}; kept: epoch {kept}, {history.best.measured}")
    if kept == 0:
        screen.show(
            "Training brought nothing over the calibrated detector on the validation split: plain calibration does. "
            "Another --lr, more --epochs or --distill may."
        )
    screen.show(
        f"training and export: {agreement.differing} of {agreement.values} int8 values differ, "
        f"in {agreement.tensors} tensors of one image"
    )
    screen.show(f"wrote {found.result}, history in {found.picture}")
    settings = msgspec.structs.replace(settings, frame_px=found.frame_px)
    screen.show(f"next: {qat_options.following_run(found.result, settings, out='runs/qat')}")
