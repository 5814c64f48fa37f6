"""What a user would do today for the same detector, with the tools that come with PyTorch and ONNX Runtime.

Two peers: torchvision's own ONNX export, and ONNX Runtime's static quantization of it in its best plain
recipe. Both are run as qexport's artifact is: same runtime, same threads, frame in, boxes out.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

from qexport.detections import Detections
from qexport.errors import ExportError
from qexport.files import whole_file
from qexport.runtimes.onnx_session import make_session

QUANTIZED_OPERATORS = ("Conv", "Gemm", "MatMul", "Add", "Relu")
"""The operators that the recipe quantizes: those of the feature maps that have integer kernels."""

_INPUT = "image"
_OUTPUTS = ("boxes", "labels", "scores")


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times faster one contender is than another, with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def export_torchvision(detector: nn.Module, frame_px: tuple[int, int], path: Path) -> Path:
    """Export a detector as torchvision documents it, for frames of one size.

    Args:
        detector: torchvision's own, in eval mode.
        frame_px: height and width of the frame.
        path: file to write: `image` (3, H, W) float32 in 0..1 to `boxes`, `labels`, `scores`.

    Raises:
        ExportError: torch.onnx cannot export it.
    """
    image = torch.zeros(3, *frame_px)
    with whole_file(path) as partial, _quiet(), torch.no_grad():
        try:
            torch.onnx.export(
                detector,
                ([image],),
                str(partial),
                dynamo=False,
                input_names=[_INPUT],
                output_names=list(_OUTPUTS),
            )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            raise ExportError(
                f"{path}: torchvision's own ONNX export fails on this detector: {error}. "
                "Measure without this peer."
            ) from error
    return path


def quantize_recipe(float_model: Path, frames: Iterable[NDArray[np.uint8]], path: Path) -> Path:
    """Quantize an export with ONNX Runtime's static quantization: per-channel weights, uint8 activations.

    Args:
        float_model: what `export_torchvision` wrote.
        frames: (H, W, 3) uint8 RGB, to calibrate with.
        path: file to write.
    """
    with tempfile.TemporaryDirectory() as folder, whole_file(path) as partial, _quiet():
        prepared = Path(folder) / "prepared.onnx"
        # As ONNX Runtime's guide asks, but for symbolic shapes: on torchvision's detectors their inference
        # ends in "Incomplete symbolic shape inference" after up to a minute. The guide says to skip it then.
        quant_pre_process(str(float_model), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(partial),
            _FrameReader(frames),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTIZED_OPERATORS),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    return path


class Peer:
    """Runs a peer's file in ONNX Runtime.

    Raises:
        ArtifactError: ONNX Runtime does not accept the file.
    """

    def __init__(self, path: Path, *, threads: int) -> None:
        self._session = make_session(path, threads=threads)

    def infer(self, frame: NDArray[np.uint8]) -> Detections:
        """Detect on a (H, W, 3) uint8 RGB frame; boxes in pixels of the frame."""
        boxes, labels, scores = self._session.run(list(_OUTPUTS), {_INPUT: image_of(frame)})
        return Detections(boxes, scores, labels)


def image_of(frame: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return (3, H, W) float32 in 0..1 for a (H, W, 3) uint8 frame."""
    return np.ascontiguousarray(frame.transpose(2, 0, 1)).astype(np.float32) / np.float32(255)


def ratio_of_medians(
    reference_ms: Sequence[float], actual_ms: Sequence[float], *, resamples: int = 2000, seed: int = 0
) -> Ratio:
    """Return how many times shorter `actual` is than `reference`, by their medians.

    The interval is a percentile bootstrap over rounds. The two were timed in the same rounds and are drawn
    together, so what slowed a whole round down cancels out.

    Args:
        reference_ms: times of interleaved runs, in their order.
        actual_ms: of the same rounds.
        resamples: of the bootstrap.
        seed: of its random numbers.
    """
    reference, actual = np.asarray(reference_ms), np.asarray(actual_ms)
    drawn = np.random.default_rng(seed).integers(0, len(actual), (resamples, len(actual)))
    ratios = np.median(reference[drawn], axis=1) / np.median(actual[drawn], axis=1)
    low, high = (float(value) for value in np.quantile(ratios, [0.025, 0.975]))
    return Ratio(float(np.median(reference) / np.median(actual)), low, high)


class _FrameReader(CalibrationDataReader):  # type: ignore[misc]
    """Feeds frames to ONNX Runtime's calibration, one at a time."""

    def __init__(self, frames: Iterable[NDArray[np.uint8]]) -> None:
        self._frames: Iterator[NDArray[np.uint8]] = iter(frames)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        frame = next(self._frames, None)
        return None if frame is None else {_INPUT: image_of(frame)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the warnings of the peers' tools back: nothing in them that a user could act on."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
