"""The run's detector by other methods of quantization, for the table that compares methods.

    RUN/detections/dynamic.json, activations.json, ptq.json
    RUN/methods.json            size and mAP of each, beside float
    RUN/methods_latency.json    latency of those that have kernels

`static`, what qexport exports, is always in that table: its figures are those of the targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np

from qexport import steps
from qexport.encodings import without_weights
from qexport.errors import QexportError, RunFolderError
from qexport.files import read_json, sha256_json, write_json
from qexport.method_results import FLOAT, METHODS, MethodName, MethodsLatency, MethodsReport
from qexport.work import Work

if TYPE_CHECKING:
    from torch import nn

    from qexport.benchmarks.detect import Detect
    from qexport.benchmarks.methods import Method
    from qexport.quantization.reference import QuantizedDetector

REPORT, LATENCY = "methods.json", "methods_latency.json"
_DYNAMIC: MethodName = "dynamic"
_PTQ: MethodName = "ptq"


def check_methods(names: Sequence[str]) -> tuple[MethodName, ...]:
    """Return methods by their names.

    Raises:
        QexportError: there is no such method, or one is given twice; the message says what there is.
    """
    known = {str(method): method for method in METHODS}
    for name in names:
        if name not in known:
            raise QexportError(
                f"no method {name!r}; there is {', '.join(known)}, and static, what qexport exports, which is always "
                "in the table."
            )
        if names.count(name) > 1:
            raise QexportError(f"--method {name} is given more than once; give each method once.")
    return tuple(known[name] for name in names)


def measure_methods(
    work: Work, methods: Sequence[MethodName], *, runs: int, warmup: int
) -> tuple[MethodsReport, MethodsLatency | None]:
    """Measure the run's detector by each method; what was measured before is taken as it is.

    Args:
        work: the run.
        methods: as `check_methods` lets them pass.
        runs: measured runs of each method that is timed.
        warmup: runs before them that do not count.

    Returns:
        The methods, and the latency of those that have kernels; None where none of them has.
    """
    forms = _Forms(work)
    report = _report(work, methods, forms)
    if _DYNAMIC not in methods:
        work.folder.discard("bench.methods")  # times of a method that is no longer in the table
        return report, None
    return report, _latency(work, forms, runs=runs, warmup=warmup)


class _Forms:
    """The detector by each method; made when a stage needs it."""

    def __init__(self, work: Work) -> None:
        self._work = work

    @cached_property
    def eager(self) -> nn.Module:
        module: nn.Module = self._work.subject.baseline.module  # torchvision ships no types
        return module

    @cached_property
    def dynamic(self) -> nn.Module:
        from qexport.benchmarks.methods import dynamic_linears  # noqa: PLC0415 - torch begins here

        return dynamic_linears(self.eager)

    @cached_property
    def calibrated(self) -> QuantizedDetector:
        """The float detector with scales that are calibrated on images, whatever the run's come from."""
        from qexport.calibration.calibrator import calibrate  # noqa: PLC0415 - torch begins here
        from qexport.quantization.reference import quantize  # noqa: PLC0415

        subject, settings = self._work.subject, self._work.settings
        samples = subject.calibration_samples()
        with self._work.progress("calibrate ptq", len(samples)) as step:
            encodings = calibrate(
                subject.baseline_static,
                subject.inputs(samples),
                observer=settings.observer,
                percentile=settings.percentile,
                scheme=settings.scheme,
                weight_scales=settings.weight_scales,
                keep_float=settings.keep_float,
                on_image=step,
            )
        return quantize(subject.baseline_static, encodings)

    def identity(self, method: MethodName) -> list[str | None]:
        """Return digests of what a method's detections are made of."""
        folder, settings = self._work.folder, self._work.settings
        weights = [self._work.subject.baseline.weights_sha256, folder.digest("detector.json")]
        if method == _PTQ:
            images = self._work.subject.calibration_samples()
            how: list[object] = [settings.observer, settings.percentile, settings.keep_float, settings.seed]
            how += (
                [len(images)]
                if settings.weight_scales == "per-channel"
                else [len(images), settings.weight_scales]
            )
            how += [] if settings.scheme == "int8" else [settings.scheme]
            return [*weights, sha256_json([self._work.subject.calibration.sha256, *how])]
        if method == _DYNAMIC:
            return weights
        return [folder.record.weights_sha256, weights[1], self._work.encodings.rows_sha256]

    def open(self, method: MethodName) -> AbstractContextManager[Detect]:
        """Open what detects by a method."""
        from qexport.benchmarks import detect  # noqa: PLC0415 - torch begins here
        from qexport.benchmarks.methods import eager_dynamic  # noqa: PLC0415
        from qexport.quantization.reference import quantize  # noqa: PLC0415

        if method == _PTQ:
            return detect.reference(self.calibrated)
        if method == _DYNAMIC:
            return eager_dynamic(replace(self._work.subject.baseline, module=self.dynamic))
        feature_maps = without_weights(self._work.encodings)
        return detect.reference(quantize(self._work.subject.static, feature_maps))

    def describe(self, methods: Sequence[MethodName]) -> list[Method]:
        """Return what each method does, float first."""
        from qexport.benchmarks import methods as known  # noqa: PLC0415 - torch begins here

        described: dict[MethodName, Callable[[], Method]] = {
            "dynamic": lambda: known.describe_dynamic(self.eager, self.dynamic),
            "activations": lambda: known.describe_activations(self.eager),
            "ptq": lambda: known.describe_ptq(
                self.eager, self.calibrated, len(self._work.subject.calibration_samples())
            ),
        }
        return [known.describe_float(self.eager), *(described[name]() for name in methods)]


def _report(work: Work, methods: Sequence[MethodName], forms: _Forms) -> MethodsReport:
    from qexport.benchmarks.detect import to_arrays  # noqa: PLC0415 - torch begins here
    from qexport.benchmarks.methods import measure_methods as measure  # noqa: PLC0415

    folder, dataset = work.folder, work.subject.evaluation
    found = {steps.EAGER: steps.detect_floats(work)[steps.EAGER]}
    for name in methods:
        found[name] = steps.detect_split(work, name, forms.identity(name), partial(forms.open, name))

    def write() -> None:
        with work.progress("compare methods", 1) as step:
            boxes = {name: [to_arrays(image) for image in images] for name, images in found.items()}
            report = measure(
                dataset,
                boxes,
                forms.describe(methods),
                detector_sha256=work.encodings.detector_sha256,
                rows_sha256=work.encodings.rows_sha256,
                seed=work.settings.seed,
            )
            step()
        write_json(folder.file(REPORT), report)

    inputs = {
        "detections": [[name, folder.digest(steps.detections_file(name))] for name in found],
        "encodings": work.encodings.rows_sha256,
        "options": [dataset.sha256, work.settings.seed],
    }
    folder.stage("evaluate.methods", inputs, [REPORT], write)
    return read_json(folder.file(REPORT), MethodsReport, RunFolderError)


def _latency(work: Work, forms: _Forms, *, runs: int, warmup: int) -> MethodsLatency:
    from qexport.benchmarks.methods import time_methods  # noqa: PLC0415 - torch begins here

    def write() -> None:
        frame = next(work.subject.frames(work.subject.parity_samples()))
        with work.progress("bench methods", warmup + runs) as step:
            latency = time_methods(
                {FLOAT: forms.eager, _DYNAMIC: forms.dynamic},
                np.ascontiguousarray(frame),
                detector_sha256=work.encodings.detector_sha256,
                warmup=warmup,
                runs=runs,
                on_run=step,
            )
        write_json(work.folder.file(LATENCY), latency)

    inputs = {
        "detector": [work.subject.baseline.weights_sha256, work.folder.digest("detector.json")],
        "options": [runs, warmup],
    }
    work.folder.stage("bench.methods", inputs, [LATENCY], write)
    return read_json(work.folder.file(LATENCY), MethodsLatency, RunFolderError)
