"""ONNX Runtime on the CPU. Needs numpy and onnxruntime, no torch."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qexport.layers import Kind
from qexport.runtimes import onnx_kernels
from qexport.runtimes.onnx_forced import ForcedSession
from qexport.runtimes.onnx_session import make_session, with_outputs
from qexport.runtimes.runner import OUTPUTS, ForcedRunner, KernelTime, ProfiledRun, ProfilingRunner

if TYPE_CHECKING:
    import onnxruntime

INPUT = "frame"
_KERNEL_SUFFIX = "_kernel_time"


class OnnxRunner(ProfilingRunner, ForcedRunner):
    """Runs an ONNX artifact in ONNX Runtime."""

    _session: onnxruntime.InferenceSession
    _probes: dict[tuple[str, ...], onnxruntime.InferenceSession]
    _forced: ForcedSession | None

    def open(self) -> None:
        """Load the file.

        Raises:
            TargetUnavailable: onnxruntime is not installed.
            ArtifactError: ONNX Runtime does not accept the file.
        """
        self._session = make_session(self.path, threads=self.threads)
        self._probes, self._forced = {}, None

    def close(self) -> None:
        """Free the sessions."""
        del self._session, self._forced
        self._probes.clear()

    def run(self, array: NDArray[np.generic], tensors: Sequence[str] = ()) -> dict[str, NDArray[np.generic]]:
        """Run once; intermediate tensors come from a second session that also outputs them."""
        names = [*OUTPUTS, *tensors]
        session = self._probe(tuple(tensors)) if tensors else self._session
        return dict(zip(names, session.run(names, {INPUT: array}), strict=True))

    def run_forced(
        self,
        array: NDArray[np.generic],
        codes: Mapping[str, NDArray[np.int8]],
        proposals: NDArray[np.float32],
    ) -> dict[str, NDArray[np.int8]]:
        """Run every layer on the codes that are given, in a session of the file cut at each of them."""
        if self._forced is None:
            self._forced = ForcedSession(self.path, self.artifact, threads=self.threads)
        return self._forced.run(array, codes, proposals)

    def profile(self, array: NDArray[np.generic], *, warmup: int, runs: int) -> list[ProfiledRun]:
        """Run with ONNX Runtime's own profiler."""
        with tempfile.TemporaryDirectory() as folder:
            session = make_session(self.path, threads=self.threads, profile=Path(folder) / "profile")
            for _ in range(warmup + runs):
                session.run(list(OUTPUTS), {INPUT: array})
            events = json.loads(Path(session.end_profiling()).read_text())
        return _profiled_runs(events)[warmup:]

    def kernel_owners(self, rows: Collection[str] | None = None) -> dict[str, str]:
        """Ask the graph that ONNX Runtime really runs."""
        return onnx_kernels.kernel_owners(self.path, rows)

    def kind_of(self, kernel: str) -> Kind:
        """Look the kernel type up."""
        return onnx_kernels.kind_of_kernel(kernel)

    def between_kernels_ms(self) -> float:
        """Measure on a chain of operators that do nothing."""
        return onnx_kernels.time_between_kernels_ms(self.threads)

    def _probe(self, tensors: tuple[str, ...]) -> onnxruntime.InferenceSession:
        if tensors not in self._probes:
            self._probes[tensors] = make_session(with_outputs(self.path, tensors), threads=self.threads)
        return self._probes[tensors]


def has_device() -> bool:
    """Say that a CPU is there."""
    return True


def _profiled_runs(events: list[dict[str, Any]]) -> list[ProfiledRun]:
    """Split a profile into runs: kernels belong to the model_run whose time span holds them."""
    wholes = sorted(
        (event for event in events if event.get("name") == "model_run"), key=lambda event: float(event["ts"])
    )
    kernels = sorted(
        (
            event
            for event in events
            if event.get("cat") == "Node" and str(event["name"]).endswith(_KERNEL_SUFFIX)
        ),
        key=lambda event: float(event["ts"]),
    )
    runs, at = [], 0
    for whole in wholes:
        end = whole["ts"] + whole["dur"]
        own = []
        while at < len(kernels) and kernels[at]["ts"] <= end:
            event = kernels[at]
            name = str(event["name"]).removesuffix(_KERNEL_SUFFIX)
            own.append(KernelTime(name, str(event["args"]["op_name"]), event["dur"] / 1000))
            at += 1
        runs.append(ProfiledRun(whole["dur"] / 1000, tuple(own)))
    return runs


RUNNER = OnnxRunner
