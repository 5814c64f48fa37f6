"""ExecuTorch artifacts on the CPU. Needs numpy and executorch, whose Python runtime links PyTorch."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexport.errors import ArtifactError, DatasetError, TargetUnavailable
from qexport.layers import Kind
from qexport.runtimes.executorch_library import OpenProgram, call, load_method, open_program, release
from qexport.runtimes.executorch_profile import Timeline, fold_into_rows, kind_of_kernel, read_events
from qexport.runtimes.executorch_table import FORCED, FORWARD, PROBE, PROPOSALS
from qexport.runtimes.runner import OUTPUTS, ForcedRunner, ProfiledRun, ProfilingRunner, SharedKernel
from qexport.sites import codes_of, stored_of


class ExecutorchRunner(ForcedRunner, ProfilingRunner):
    """Runs a `.pte`: layers in XNNPACK, the rest by ExecuTorch's own kernels."""

    _opened: OpenProgram
    _methods: dict[str, Any]
    _timeline: Timeline

    def open(self) -> None:
        """Load the file.

        Raises:
            TargetUnavailable: no ExecuTorch, one without XNNPACK or an operator, or another number of threads in use.
            ArtifactError: the file is cut off, of another ExecuTorch, or another model's.
        """
        self._opened = open_program(self.path, threads=self.threads)
        self._methods = {}
        try:
            self._check_ports()
        except BaseException:
            self.close()
            raise
        self._timeline = Timeline(self._opened.table, self.path)

    def close(self) -> None:
        """Free the program."""
        del self._opened, self._methods
        release(self.threads)

    @property
    def kernel_set(self) -> str:
        """Whose kernels run, for results."""
        calls = self._opened.table.calls
        nodes = sum(len(one.nodes) for one in calls)
        own = sum(1 for one in calls if one.operator)
        return f"XNNPACK for {nodes} of {nodes + own} operators, executorch {self._opened.version}"

    def run(self, array: NDArray[np.generic], tensors: Sequence[str] = ()) -> dict[str, NDArray[np.generic]]:
        """Run once; intermediate tensors come from a method that has them as outputs too.

        Raises:
            DatasetError: the model does not take the array.
            ArtifactError: there is no such tensor.
            TargetUnavailable: the runtime fails.
        """
        if not tensors:
            return _as_declared(self._call(FORWARD, [self._checked(array)]))
        missing = [name for name in tensors if name not in self._outputs(PROBE)]
        if missing:
            raise ArtifactError(f"{self.path}: no tensor {missing[0]} in the program. Export again.")
        found = self._call(PROBE, [self._checked(array)])
        return _as_declared({name: found[name] for name in (*OUTPUTS, *tensors)})

    def run_forced(
        self,
        array: NDArray[np.generic],
        codes: Mapping[str, NDArray[np.int8]],
        proposals: NDArray[np.float32],
    ) -> dict[str, NDArray[np.int8]]:
        """Run every quantized layer on the inputs that are given: a method that is cut at every quantized tensor."""
        sites = {site.key: site for site in self.artifact.sites}
        method = self._method(FORCED)
        metadata = method.method_meta()
        given: list[NDArray[np.generic]] = []
        for place, name in enumerate(self._opened.table.methods[FORCED].inputs):
            if name in sites:
                shape = tuple(int(size) for size in metadata.input_tensor_meta(place).sizes())
                given.append(stored_of(sites[name], codes[name], shape, np.dtype(np.int8)))
            elif name == PROPOSALS:
                given.append(proposals.astype(np.float32))
            else:
                given.append(self._checked(array))
        found = self._call(FORCED, given)
        return {key: codes_of(sites[key], stored) for key, stored in found.items()}

    def profile(self, array: NDArray[np.generic], *, warmup: int, runs: int) -> list[ProfiledRun]:
        """Run with ExecuTorch's event tracer, in a second copy of the program.

        Raises:
            TargetUnavailable: what the tracer wrote does not fit the program.
        """
        given = [self._checked(array)]
        traced = open_program(self.path, threads=self.threads, traced=True)
        try:
            method = load_method(traced, FORWARD, self.path)
            for _ in range(max(1, warmup) + runs):
                outputs = call(method, given, self._outputs(FORWARD), self.path)
            with tempfile.TemporaryDirectory() as folder:
                trace = Path(folder) / "trace.etdp"
                traced.program.write_etdump_result_to_file(str(trace), str(Path(folder) / "tensors.bin"))
                recorded = read_events(trace)
        finally:
            del traced
            release(self.threads)
        if len(recorded) < runs:
            raise TargetUnavailable(
                f"{self.path}: {len(recorded)} runs were traced, {runs} were made: this ExecuTorch was built without "
                "its event tracer. Take the wheel of the package index."
            )
        self._check_same(outputs, given)
        return [self._timeline.read(events) for events in recorded[-runs:]]

    def kernel_owners(self, rows: Collection[str] | None = None) -> Mapping[str, str | SharedKernel]:
        """Take the paths that the exporter noted, of what was timed."""
        owners = self._timeline.owners
        return owners if rows is None else fold_into_rows(owners, rows)

    def kind_of(self, kernel: str) -> Kind:
        """Look up a node of XNNPACK's, or an operator."""
        return kind_of_kernel(kernel)

    def between_kernels_ms(self) -> float:
        """Return nothing: what the tracer takes between instructions stays in the unexplained rest."""
        return 0.0

    def _outputs(self, method: str) -> tuple[str, ...]:
        methods = self._opened.table.methods
        return methods[method].outputs if method in methods else ()

    def _method(self, name: str) -> Any:
        if name not in self._methods:
            self._methods[name] = load_method(self._opened, name, self.path)
        return self._methods[name]

    def _call(self, method: str, given: Sequence[NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        return call(self._method(method), given, self._outputs(method), self.path)

    def _wanted(self) -> tuple[tuple[int, ...], np.dtype[Any]]:
        spec = self.artifact.input
        if spec.preprocess == "outside":
            return (1, 3, spec.padded_height_px, spec.padded_width_px), np.dtype(np.float32)
        return (spec.frame_height_px, spec.frame_width_px, 3), np.dtype(np.uint8)

    def _check_ports(self) -> None:
        """Refuse another model's file."""
        metadata = self._method(FORWARD).method_meta()
        taken = tuple(int(size) for size in metadata.input_tensor_meta(0).sizes())
        wanted, _ = self._wanted()
        names = self._outputs(FORWARD)
        boxes = tuple(int(size) for size in metadata.output_tensor_meta(0).sizes())
        if taken != wanted or names != OUTPUTS or boxes != (self.artifact.detections, 4):
            raise ArtifactError(
                f"{self.path}: another model's file: it takes {taken} and gives {', '.join(names)} for {boxes[0]} "
                f"detections, the artifact {wanted} and {', '.join(OUTPUTS)} for {self.artifact.detections}. "
                "Export again."
            )

    def _checked(self, array: NDArray[np.generic]) -> NDArray[np.generic]:
        shape, dtype = self._wanted()
        if array.shape != shape or array.dtype != dtype:
            raise DatasetError(
                f"{self.path} takes {dtype} of shape {shape}, given {array.dtype} of shape {array.shape}. "
                "Runner.input_of makes it of a frame."
            )
        return array

    def _check_same(
        self, outputs: Mapping[str, NDArray[np.generic]], given: Sequence[NDArray[np.generic]]
    ) -> None:
        reference = self._call(FORWARD, given)
        differing = [name for name in OUTPUTS if reference[name].tobytes() != outputs[name].tobytes()]
        if differing:
            raise TargetUnavailable(
                f"{self.path}: executorch {self._opened.version} computes other {differing[0]} while it is traced: "
                "what it shows there would be of another computation. Use a tested version: constraints.txt."
            )


def has_device() -> bool:
    """Say that a CPU is there."""
    return True


def _as_declared(outputs: dict[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
    """Return outputs with the types that every runtime's have: the count is a scalar."""
    return outputs | {"count": outputs["count"].astype(np.int64).reshape(())}


RUNNER = ExecutorchRunner
