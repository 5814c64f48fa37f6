"""The options that several commands share, each with the text that `--help` shows."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

from qexport.errors import QexportError

_DETECTOR = "Detector and data"
_CALIBRATION = "Calibration"
_SHAPE = "Shapes, fixed at export"
_GATES = "Gates: what has to hold"
_BENCH = "Latency"
_CURVE = "Number of proposals"


def parse_frame(text: str) -> tuple[int, int]:
    """Return height and width of `480x640`."""
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise QexportError(f"--frame {text}: no frame size; expected HEIGHTxWIDTH in pixels, as in 480x640.")
    return int(height), int(width)


def parse_classes(text: str) -> tuple[str, ...]:
    """Return the names in `bolt,nut,washer`."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise QexportError(f"--classes {text}: an empty name; expected names with commas between them.")
    return names


def parse_proposals(text: str) -> tuple[int, ...]:
    """Return the numbers in `300,200,100`."""
    numbers = tuple(number.strip() for number in text.split(","))
    for number in numbers:
        # Nine digits are more than any RPN ranks, and fewer than Python refuses to read.
        if not (number.removeprefix("-").isdecimal() and len(number) <= 9):
            raise QexportError(
                f"--proposals {text}: {number!r} is no whole number; expected numbers with commas between them, "
                "as in 300,200,100."
            )
    return tuple(int(number) for number in numbers)


def check_percentile(observer: str, percentile: float | None) -> None:
    """Refuse a percentile that nobody would look at."""
    if percentile is not None and observer != "percentile":
        raise QexportError(
            f"--percentile is for --observer percentile; the observer is {observer}. Give both, or neither."
        )


def exact_command() -> str:
    """Return the command as the user gave it."""
    return shlex.join(["qexport", *sys.argv[1:]])


Observer: TypeAlias = Literal["min-max", "percentile", "mse", "auto"]
Scheme: TypeAlias = Literal["int8", "activations"]
WeightScales: TypeAlias = Literal["per-channel", "per-tensor"]
Preprocess: TypeAlias = Literal["inside", "outside"]

Model: TypeAlias = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="SOURCE",
        rich_help_panel=_DETECTOR,
        help="The detector: path/to/file.py:function, package.module:function, torchvision:NAME or demo. "
        "The function takes no arguments and returns a torchvision Faster R-CNN. [bold]Your file is run[/bold], "
        "with your rights; weights are only read.",
    ),
]
Weights: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        metavar="FILE",
        rich_help_panel=_DETECTOR,
        help="Its state dict, .pt, .pth or .safetensors. Without it the weights are those that the function "
        "leaves in the detector.",
        show_default=False,
    ),
]
Data: TypeAlias = Annotated[
    Path,
    typer.Option(
        "--data",
        metavar="FOLDER",
        rich_help_panel=_DETECTOR,
        help="Data set in COCO JSON or Pascal VOC layout, recognised by itself; or one COCO .json file.",
    ),
]
Split: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--split",
        metavar="NAME",
        rich_help_panel=_DETECTOR,
        help="Split that accuracy and parity are measured on. Default: test, else val.",
        show_default=False,
    ),
]
Classes: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--classes",
        metavar="A,B,C",
        rich_help_panel=_DETECTOR,
        help="Class names in label order, without the background, where the data set gives no order (Pascal VOC).",
        show_default=False,
    ),
]
_SEED = typer.Option(
    "--seed",
    metavar="N",
    min=0,
    rich_help_panel=_DETECTOR,
    help="Of every random choice: which images, which resamples.",
)
Seed: TypeAlias = Annotated[int, _SEED]
SeedChange: TypeAlias = Annotated[int | None, _SEED]
Out: TypeAlias = Annotated[
    Path,
    typer.Option(
        "--out",
        metavar="RUN",
        help="Folder of the run. One that holds the same run is taken up where it stopped; another is refused.",
    ),
]
Targets: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        metavar="NAME",
        show_default=False,
        help="Runtime to lower to, may be given several times; see `qexport targets`. With --scheme activations none.",
    ),
]
DemoTargets: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        metavar="NAME",
        show_default=False,
        help="Runtime to lower to, may be given several times. Default: onnx and tflite.",
    ),
]
OneTarget: TypeAlias = Annotated[
    str, typer.Option("--target", metavar="NAME", help="Runtime to lower to; see `qexport targets`.")
]
TargetsOfRun: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        metavar="NAME",
        show_default=False,
        help="Runtime to compare; with --cross it may be given several times, the default is every one that was "
        "exported.",
    ),
]
Cross: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--cross",
        help="Instead: every target against every other, each layer given what the quantized reference computes.",
    ),
]
Run: TypeAlias = Annotated[
    Path, typer.Argument(metavar="RUN", help="Folder that `qexport run` or `qexport inspect` made.")
]

Frame: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--frame",
        metavar="HxW",
        rich_help_panel=_SHAPE,
        help="Height and width of the camera frame, 480x640. Default: the commonest size in the data set.",
        show_default=False,
    ),
]
Proposals: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--proposals",
        metavar="N",
        min=1,
        rich_help_panel=_SHAPE,
        help="Proposals that the box head sees. Default: the detector's own number.",
        show_default=False,
    ),
]
Detections: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--detections",
        metavar="N",
        min=1,
        rich_help_panel=_SHAPE,
        help="Boxes that come out at most. Default: the detector's own number.",
        show_default=False,
    ),
]
PreprocessOption: TypeAlias = Annotated[
    Preprocess,
    typer.Option(
        "--preprocess",
        rich_help_panel=_SHAPE,
        help="Resizing and normalisation inside the artifact, which then takes the uint8 frame; or outside, "
        "in numpy.",
    ),
]

_OBSERVER = typer.Option(
    "--observer",
    rich_help_panel=_CALIBRATION,
    help="How the range of a tensor is chosen: [bold]min-max[/bold], the largest value seen; [bold]percentile[/bold], "
    "all but few of the values; [bold]mse[/bold], with the least squared error; [bold]auto[/bold], of these for each "
    "tensor the one by which the layers that read it lose least, on calibration images that no observer saw, and "
    "min-max where no gain is clear.",
)
ObserverOption: TypeAlias = Annotated[Observer, _OBSERVER]
ObserverChange: TypeAlias = Annotated[Observer | None, _OBSERVER]
Percentile: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--percentile",
        metavar="P",
        min=50.0,
        max=100.0,
        rich_help_panel=_CALIBRATION,
        help="Share of magnitudes inside the range, for --observer percentile. Default: 99.99.",
        show_default=False,
    ),
]
_SCHEME = typer.Option(
    "--scheme",
    rich_help_panel=_CALIBRATION,
    help="What becomes int8: [bold]int8[/bold], weights and feature maps; [bold]activations[/bold], feature maps "
    "alone, weights stay float: the quantized reference measures that, no target runs it, and --target is left out.",
)
SchemeOption: TypeAlias = Annotated[Scheme, _SCHEME]
SchemeChange: TypeAlias = Annotated[Scheme | None, _SCHEME]
_WEIGHT_SCALES = typer.Option(
    "--weight-scales",
    rich_help_panel=_CALIBRATION,
    help="A scale for each output channel of a weight, or one for the whole weight, as older runtimes force it.",
)
WeightScalesOption: TypeAlias = Annotated[WeightScales, _WEIGHT_SCALES]
WeightScalesChange: TypeAlias = Annotated[WeightScales | None, _WEIGHT_SCALES]
_IMAGES = typer.Option(
    "--images", metavar="N", min=1, rich_help_panel=_CALIBRATION, help="How many images calibrate."
)
Images: TypeAlias = Annotated[int, _IMAGES]
ImagesChange: TypeAlias = Annotated[int | None, _IMAGES]
CalibrationData: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--calibration-data",
        metavar="FOLDER",
        rich_help_panel=_CALIBRATION,
        help="Images to calibrate with, where they are not those of --data; they need no boxes.",
        show_default=False,
    ),
]
CalibrationSplit: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--calibration-split",
        metavar="NAME",
        rich_help_panel=_CALIBRATION,
        help="Split to calibrate on. Default: train.",
        show_default=False,
    ),
]
KeepFloat: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--keep-float",
        metavar="PATH",
        rich_help_panel=_CALIBRATION,
        help="Layer that stays float: its module path, * matches any text. May be given several times.",
        show_default=False,
    ),
]
TargetOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "-O",
        "--option",
        metavar="TARGET.NAME=VALUE",
        rich_help_panel=_DETECTOR,
        help="What one target alone can choose, tensorrt.workspace_mb=512. `qexport targets` lists all. "
        "May be given several times.",
        show_default=False,
    ),
]

_PARITY_IMAGES = typer.Option(
    "--parity-images", metavar="N", min=1, rich_help_panel=_GATES, help="Images to compare layers on."
)
ParityImages: TypeAlias = Annotated[int, _PARITY_IMAGES]
ParityImagesChange: TypeAlias = Annotated[int | None, _PARITY_IMAGES]
_TOLERANCE = typer.Option(
    "--tolerance",
    metavar="STEPS",
    min=0,
    rich_help_panel=_GATES,
    help="Largest difference of a layer from the integer reference, in quantization steps.",
)
Tolerance: TypeAlias = Annotated[int, _TOLERANCE]
ToleranceChange: TypeAlias = Annotated[int | None, _TOLERANCE]
_MAX_UNMATCHED = typer.Option(
    "--max-unmatched",
    metavar="SHARE",
    min=0.0,
    max=1.0,
    rich_help_panel=_GATES,
    help="Largest share of layers that may not be found in the artifact.",
)
MaxUnmatched: TypeAlias = Annotated[float, _MAX_UNMATCHED]
MaxUnmatchedChange: TypeAlias = Annotated[float | None, _MAX_UNMATCHED]
_MAX_DROP = typer.Option(
    "--max-drop",
    metavar="MAP",
    min=0.0,
    max=1.0,
    rich_help_panel=_GATES,
    help="Largest fall of VOC and of COCO mAP; 0.01 is one point of a hundred.",
)
MaxDrop: TypeAlias = Annotated[float, _MAX_DROP]
MaxDropChange: TypeAlias = Annotated[float | None, _MAX_DROP]
_MIN_ACCOUNTED = typer.Option(
    "--min-accounted",
    metavar="SHARE",
    min=0.0,
    max=1.0,
    rich_help_panel=_GATES,
    help="Smallest share of the whole latency that the layers must add up to.",
)
MinAccounted: TypeAlias = Annotated[float, _MIN_ACCOUNTED]
MinAccountedChange: TypeAlias = Annotated[float | None, _MIN_ACCOUNTED]

Runs: TypeAlias = Annotated[
    int, typer.Option("--runs", metavar="N", min=1, rich_help_panel=_BENCH, help="Measured runs.")
]
Warmup: TypeAlias = Annotated[
    int,
    typer.Option(
        "--warmup", metavar="N", min=0, rich_help_panel=_BENCH, help="Runs before them that do not count."
    ),
]
Threads: TypeAlias = Annotated[
    int, typer.Option("--threads", metavar="N", min=1, rich_help_panel=_BENCH, help="Threads of the runtime.")
]

ProposalNumbers: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--proposals",
        metavar="N,N,...",
        rich_help_panel=_CURVE,
        help="Instead: mAP and latency over the number of proposals, 300,200,150,100,64. Weights and encodings "
        "stay the same; the run's own number is always measured too.",
        show_default=False,
    ),
]
RunsOfCurve: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--runs",
        metavar="N",
        min=1,
        rich_help_panel=_CURVE,
        help="Measured runs of each number. Default: 30.",
        show_default=False,
    ),
]
ThreadsOfCurve: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        min=1,
        rich_help_panel=_CURVE,
        help="Threads of the runtime. Default: 1.",
        show_default=False,
    ),
]

_BOARD = "On a board"
MeasurementFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FILE",
        rich_help_panel=_BOARD,
        help="Of a bundle: where the measurement goes. Default: measurement.json.",
        show_default=False,
    ),
]
MeasuredOnOption: TypeAlias = Annotated[
    Literal["device", "host", "emulated"] | None,
    typer.Option(
        "--measured-on",
        rich_help_panel=_BOARD,
        help="Of a bundle: what the figures are marked as. Default: device on an Arm board with a device tree, host on "
        "other processors.",
        show_default=False,
    ),
]
