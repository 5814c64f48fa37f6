"""The same detector by other methods of quantization, beside float: PyTorch's dynamic one, and feature maps alone."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qexport.benchmarks.accuracy import BASELINE, evaluate
from qexport.benchmarks.detect import Detect, eager
from qexport.benchmarks.eager_profile import infer_eager, torch_threads
from qexport.benchmarks.latency import SETTLE_S, interleave, summarise
from qexport.benchmarks.machine import describe_machine
from qexport.detections import Detections
from qexport.detectors.load import LoadedDetector
from qexport.errors import QexportError, TargetUnavailable
from qexport.method_results import FLOAT, MethodRow, MethodsLatency, MethodsReport
from qexport.quantization.reference import QuantizedDetector
from qexport.results import Accuracy
from qexport.samples import Dataset

DYNAMIC, ACTIVATIONS, PTQ = "dynamic", "activations", "ptq"
_ENGINES = ("x86", "fbgemm", "qnnpack")
"""PyTorch's integer kernels for linears, those first that PyTorch itself would take on this processor."""


def dynamic_linears(detector: nn.Module) -> nn.Module:
    """Return a detector whose linears have int8 weights and quantize what they are given while they run.

    By PyTorch's eager mode: its successor in torchao has the same arithmetic and takes three times as long on a CPU
    (measured on a linear of 12544 to 1024 with 300 rows: 28 ms, this one 9 ms, float 67 ms).

    Raises:
        QexportError: the detector has no linear.
        TargetUnavailable: PyTorch was built without integer kernels.
    """
    linears = [name for name, module in detector.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise QexportError(
            "method dynamic: this detector has no linear layer, and PyTorch's dynamic quantization takes nothing else. "
            "Leave --method dynamic out."
        )
    with _engine(), _deprecations_ignored():
        quantized: nn.Module = torch.ao.quantization.quantize_dynamic(  # type: ignore[no-untyped-call]
            detector, {nn.Linear}, dtype=torch.qint8, inplace=False
        )
    return quantized


def engine_name() -> str:
    """Return the name of PyTorch's integer kernels that dynamic quantization runs on here.

    Raises:
        TargetUnavailable: PyTorch was built without any.
    """
    supported = torch.backends.quantized.supported_engines
    for name in _ENGINES:
        if name in supported:
            return name
    raise TargetUnavailable(
        f"method dynamic: this PyTorch has no integer kernels for linears (it has {', '.join(supported) or 'none'}). "
        "Install: pip install 'qexport[all]'"
    )


def state_bytes(detector: nn.Module) -> int:
    """Return the size of a detector's state dict as torch saves it."""
    written = io.BytesIO()
    with _deprecations_ignored():
        torch.save(detector.state_dict(), written)
    return written.tell()


@contextmanager
def eager_dynamic(detector: LoadedDetector) -> Iterator[Detect]:
    """Detect with a detector of `dynamic_linears`, by the kernels that it was made for."""
    with _engine(), eager(detector) as run:
        yield run


@dataclass(frozen=True, slots=True)
class Method:
    """What one method does, before its accuracy is known."""

    name: str
    what: str
    """What is quantized, in words."""
    runs_in: str
    """What runs it."""
    size_bytes: int
    """Of its saved state dict."""


def describe_float(detector: nn.Module) -> Method:
    """Return the detector as it came."""
    return Method(FLOAT, "nothing", "PyTorch, eager", state_bytes(detector))


def describe_dynamic(detector: nn.Module, quantized: nn.Module) -> Method:
    """Return what PyTorch's dynamic quantization made of a detector."""
    linears = sum(isinstance(module, nn.Linear) for module in detector.modules())
    return Method(
        DYNAMIC,
        f"{linears} linears: weights, and inputs as they come",
        f"PyTorch, {engine_name()} kernels",
        state_bytes(quantized),
    )


def describe_activations(detector: nn.Module) -> Method:
    """Return the detector with its feature maps alone quantized; weights are float, so it is as large as before."""
    return Method(
        ACTIVATIONS,
        "feature maps; weights float32",
        "PyTorch, reference",
        state_bytes(detector),
    )


def describe_ptq(detector: nn.Module, quantized: QuantizedDetector, images: int) -> Method:
    """Return the detector with weights and feature maps quantized by scales that were calibrated on images."""
    saved = state_bytes(detector) - 3 * sum(codes.size for codes in quantized.weight_codes())
    return Method(
        PTQ, f"weights and feature maps, calibrated on {images} images", "PyTorch, reference", saved
    )


def measure_methods(
    dataset: Dataset,
    detections: Mapping[str, Sequence[Detections]],
    methods: Sequence[Method],
    *,
    detector_sha256: str,
    rows_sha256: str,
    seed: int,
) -> MethodsReport:
    """Measure mAP of each method, and its change from float.

    Args:
        dataset: the annotated images.
        detections: by subject, `eager` first, then by method; boxes in pixels of the sample's image.
        methods: float first.
        detector_sha256: of the detector.
        rows_sha256: of the encodings.
        seed: of the bootstrap over images.

    Raises:
        DatasetError: no annotated boxes, or a label that the dataset does not have.
        ParityError: a method has not one result per image.
        TargetUnavailable: pycocotools is not installed.
    """
    # The table compares methods and promises nothing: none falls by more than everything.
    report = evaluate(dataset, detections, seed=seed, max_drop=1.0)
    measured = {subject.subject: subject for subject in report.subjects}
    return MethodsReport(
        detector_sha256=detector_sha256,
        rows_sha256=rows_sha256,
        dataset=report.dataset,
        dataset_sha256=report.dataset_sha256,
        split=report.split,
        images=report.images,
        rows=tuple(_row(one, measured[BASELINE if one.name == FLOAT else one.name]) for one in methods),
    )


def time_methods(
    modules: Mapping[str, nn.Module],
    frame: NDArray[np.uint8],
    *,
    detector_sha256: str,
    warmup: int,
    runs: int,
    threads: int = 1,
    on_run: Callable[[], None] = lambda: None,
) -> MethodsLatency:
    """Time detectors in turns on one frame, the way torchvision documents it.

    Args:
        modules: by method, float among them.
        frame: (H, W, 3) uint8 RGB.
        detector_sha256: of the detector.
        warmup: rounds that are not counted.
        runs: rounds that are.
        threads: of torch.
        on_run: called after each round.

    Raises:
        QexportError: nothing would be measured with these numbers.
    """
    if warmup < 0 or runs < 1:
        raise QexportError(
            f"latency: {runs} runs after {warmup} for warm-up; expected at least 1 run, 0 for warm-up."
        )
    contenders = {name: partial(infer_eager, module, frame) for name, module in modules.items()}
    with torch_threads(threads), _engine(), _deprecations_ignored():
        settle_s = SETTLE_S if threads > 1 else 0.0
        times = interleave(contenders, warmup=warmup, runs=runs, settle_s=settle_s, on_run=on_run)
    return MethodsLatency(
        detector_sha256=detector_sha256,
        machine=describe_machine(),
        threads=threads,
        warmup=warmup,
        measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        whole={name: summarise(values) for name, values in times.items()},
    )


@contextmanager
def _engine() -> Iterator[None]:
    """Let PyTorch take the kernels of `engine_name` inside the block; afterwards as before."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine_name()
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


@contextmanager
def _deprecations_ignored() -> Iterator[None]:
    """Let PyTorch not say that its eager mode will go: its kernels are what this method is, and torch is pinned."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.ao.quantization is deprecated", DeprecationWarning)
        warnings.filterwarnings("ignore", r"torch\.quantize_per_tensor", UserWarning)
        yield


def _row(method: Method, accuracy: Accuracy) -> MethodRow:
    return MethodRow(
        method=method.name,
        what=method.what,
        runs_in=method.runs_in,
        size_bytes=method.size_bytes,
        voc_map50=accuracy.voc_map50,
        coco_map=accuracy.coco_map,
        voc_change_interval=accuracy.voc_drop_interval,
        coco_change_interval=accuracy.coco_drop_interval,
    )
