"""ONNX Runtime on the CPU. Needs numpy and onnxruntime, no torch."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qexport.errors import ArtifactError, TargetUnavailable
from qexport.runtimes.runner import KernelTime, ProfiledRun, Runner

if TYPE_CHECKING:
    import onnxruntime

OUTPUTS = ("boxes", "scores", "labels", "count")
INPUT = "frame"
_KERNEL_SUFFIX = "_kernel_time"


class OnnxRunner(Runner):
    """Runs an ONNX artifact in ONNX Runtime."""

    _session: onnxruntime.InferenceSession
    _probes: dict[tuple[str, ...], onnxruntime.InferenceSession]

    def open(self) -> None:
        """Load the file.

        Raises:
            TargetUnavailable: onnxruntime is not installed.
            ArtifactError: ONNX Runtime does not accept the file.
        """
        self._session = make_session(self.path, threads=self.threads)
        self._probes = {}

    def close(self) -> None:
        """Free the sessions."""
        del self._session
        self._probes.clear()

    def run(self, array: NDArray[np.generic], tensors: Sequence[str] = ()) -> dict[str, NDArray[np.generic]]:
        """Run once; intermediate tensors come from a second session that also outputs them."""
        names = [*OUTPUTS, *tensors]
        session = self._probe(tuple(tensors)) if tensors else self._session
        return dict(zip(names, session.run(names, {INPUT: array}), strict=True))

    def profile(self, array: NDArray[np.generic], *, warmup: int, runs: int) -> list[ProfiledRun]:
        """Run with ONNX Runtime's own profiler."""
        with tempfile.TemporaryDirectory() as folder:
            session = make_session(self.path, threads=self.threads, profile=Path(folder) / "profile")
            for _ in range(warmup + runs):
                session.run(list(OUTPUTS), {INPUT: array})
            events = json.loads(Path(session.end_profiling()).read_text())
        return _profiled_runs(events)[warmup:]

    def _probe(self, tensors: tuple[str, ...]) -> onnxruntime.InferenceSession:
        if tensors not in self._probes:
            self._probes[tensors] = make_session(with_outputs(self.path, tensors), threads=self.threads)
        return self._probes[tensors]


def make_session(
    model: Path | bytes, *, threads: int = 1, profile: Path | None = None, optimized: Path | None = None
) -> onnxruntime.InferenceSession:
    """Return a session on the CPU.

    Args:
        model: a file, or a serialized model.
        threads: threads within an operator.
        profile: prefix of the profile file to write.
        optimized: where to write the graph that will really run.

    Raises:
        TargetUnavailable: onnxruntime is not installed.
        ArtifactError: ONNX Runtime does not accept the model.
    """
    try:
        import onnxruntime  # noqa: PLC0415 - the runtime is imported where it is used
    except ImportError as error:
        raise TargetUnavailable(
            "onnxruntime is not installed: pip install 'qexport[onnx-runtime]' to run artifacts, "
            "'qexport[all]' to make them."
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # warnings are about graph constants that it folds anyway
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    source = str(model) if isinstance(model, Path) else model
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own classes, all of them straight below Exception
        where = model if isinstance(model, Path) else "the model"
        raise ArtifactError(f"{where}: ONNX Runtime refuses it: {error}. Export again.") from error


def with_outputs(path: Path, tensors: Sequence[str]) -> bytes:
    """Return the model with more outputs, serialized. Needs the onnx package: this is for the workstation."""
    import onnx  # noqa: PLC0415 - the workstation has it, a board need not

    model = onnx.load(path)
    present = {output.name for output in model.graph.output}
    for name in tensors:
        if name not in present:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    data: bytes = model.SerializeToString()
    return data


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
