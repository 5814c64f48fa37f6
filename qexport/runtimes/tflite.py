"""TFLite artifacts on the CPU. Needs numpy and ai-edge-litert or tflite-runtime, no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from qexport.errors import ArtifactError, DatasetError, TargetUnavailable
from qexport.layers import Kind
from qexport.runtimes.runner import OUTPUTS, ForcedRunner, ProfiledRun, ProfilingRunner, SharedKernel
from qexport.runtimes.tflite_chain import time_between_kernels_ms
from qexport.runtimes.tflite_forced import ForcedInterpreter
from qexport.runtimes.tflite_kernels import Timeline, make_timeline, owners_of_operators
from qexport.runtimes.tflite_library import (
    OperatorGraph,
    TfliteLibrary,
    load_library,
    open_interpreter,
    read_graph,
)
from qexport.runtimes.tflite_operators import kind_of_kernel
from qexport.runtimes.tflite_profiler import Port, ProfiledModel, version_refusal

Kernels = Literal["xnnpack", "builtin"]


class TfliteRunner(ProfilingRunner, ForcedRunner):
    """Runs a `.tflite` with XNNPACK's kernels where it has them, TFLite's own elsewhere."""

    kernels: ClassVar[Kernels] = "xnnpack"
    """Which kernels are asked for. The two sets round differently: they are never compared as one."""

    _library: TfliteLibrary
    _interpreter: Any
    _kept: Any
    """An interpreter that keeps every tensor; None until one is asked for."""
    _forced: ForcedInterpreter | None
    _graph: OperatorGraph
    _timeline: Timeline | None
    _refusal: str | None

    def open(self) -> None:
        """Load the file.

        Raises:
            TargetUnavailable: neither ai-edge-litert nor tflite-runtime is installed, or memory is short.
            ArtifactError: the file is cut off or another model's, or has an operator that is newer than the runtime.
        """
        self._library = load_library()
        self._interpreter = self._open(self.path, keep=False)
        self._check_ports()
        self._graph = read_graph(self._interpreter)
        self._kept, self._forced, self._timeline, self._refusal = None, None, None, None

    def close(self) -> None:
        """Free the interpreters."""
        del self._interpreter, self._kept, self._forced

    @property
    def kernel_set(self) -> str:
        """Which kernels really run, for results: tflite-runtime gives XNNPACK nothing of an int8 file."""
        taken, every = self._graph.delegated, len(self._graph.operators)
        own = f"{self._library.package} {self._library.version}"
        return f"XNNPACK for {taken} of {every} operators, {own}" if taken else f"builtin kernels, {own}"

    def run(self, array: NDArray[np.generic], tensors: Sequence[str] = ()) -> dict[str, NDArray[np.generic]]:
        """Run once; intermediate tensors come from a second interpreter that keeps them all.

        Raises:
            DatasetError: the model does not take the array.
            ArtifactError: there is no such tensor.
            TargetUnavailable: the runtime fails, or computes other outputs while it keeps tensors.
        """
        found = self._invoke(self._interpreter, array)
        if tensors:
            if self._kept is None:
                self._kept = self._open(self.path, keep=True)
            kept = self._invoke(self._kept, array)
            self._check_same(found, kept, "while it keeps intermediate tensors")
            found |= self._read(self._kept, tensors)
        return found

    def run_forced(
        self,
        array: NDArray[np.generic],
        codes: Mapping[str, NDArray[np.int8]],
        proposals: NDArray[np.float32],
    ) -> dict[str, NDArray[np.int8]]:
        """Run every layer on the codes that are given, in an interpreter of the file cut at each of them."""
        if self._forced is None:
            self._forced = ForcedInterpreter(self.path, self.artifact, partial(self._open, keep=False))
        return self._forced.run(self._checked(array), codes, proposals)

    def profile_refusal(self) -> str:
        """Return why operators cannot be timed here; empty where they can. The first call tries it on a blank frame."""
        if self._refusal is None:
            self._refusal = version_refusal(self._library) or self._try_profiler()
        return self._refusal

    def profile(self, array: NDArray[np.generic], *, warmup: int, runs: int) -> list[ProfiledRun]:
        """Run in LiteRT's own executor, which has the profiler, with the kernels that `run` has.

        Raises:
            TargetUnavailable: `profile_refusal` says why.
        """
        with self._profiled() as model:
            model.write([self._checked(array)])
            for _ in range(max(1, warmup)):
                model.run()
            recorded = [model.record() for _ in range(runs)]
            names = [self._name(detail) for detail in self._interpreter.get_output_details()]
            outputs = _as_declared(dict(zip(names, model.read(), strict=True)))
        self._check_same(self._invoke(self._interpreter, array), outputs, "in its profiling executor")
        self._timeline = make_timeline(self._graph, recorded[0])
        return [self._timeline.profiled(run) for run in recorded]

    def kernel_owners(self, rows: Collection[str] | None = None) -> Mapping[str, str | SharedKernel]:
        """Take the paths that the exporter gave to the operators' outputs; after `profile`, of what it timed too."""
        return self._timeline.owners(rows) if self._timeline else owners_of_operators(self._graph, rows)

    def kind_of(self, kernel: str) -> Kind:
        """Look up an operator, or a node of XNNPACK's."""
        return kind_of_kernel(kernel)

    def between_kernels_ms(self) -> float:
        """Measure on a chain of operators that do next to nothing."""
        return time_between_kernels_ms(self._library)

    def _open(self, path: Path, *, keep: bool) -> Any:
        return open_interpreter(
            self._library, path, threads=self.threads, builtin=self.kernels == "builtin", keep=keep
        )

    def _check_ports(self) -> None:
        """Refuse another model's file."""
        spec = self.artifact.input
        outside = (1, 3, spec.padded_height_px, spec.padded_width_px)
        inside = (spec.frame_height_px, spec.frame_width_px, 3)
        wanted = (outside, "float32") if spec.preprocess == "outside" else (inside, "uint8")
        taken = [_port(detail) for detail in self._interpreter.get_input_details()]
        if [(port.shape, port.dtype.name) for port in taken] != [wanted]:
            given = ", ".join(f"{port.dtype} of {port.shape}" for port in taken) or "nothing"
            raise ArtifactError(
                f"{self.path}: another model's file: it takes {given}, the artifact {wanted[1]} of {wanted[0]}. "
                "Export again."
            )
        detections = self.artifact.detections
        shapes = {"boxes": (detections, 4), "scores": (detections,), "labels": (detections,)}
        for name in OUTPUTS:
            ports = {self._name(detail): _port(detail) for detail in self._interpreter.get_output_details()}
            if name not in ports or ports[name].shape != shapes.get(name, ports[name].shape):
                found = ", ".join(f"{own} {port.shape}" for own, port in ports.items())
                raise ArtifactError(
                    f"{self.path}: another model's file: expected outputs {', '.join(OUTPUTS)} for {detections} "
                    f"detections, found {found}. Export again."
                )

    def _invoke(self, interpreter: Any, array: NDArray[np.generic]) -> dict[str, NDArray[np.generic]]:
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], self._checked(array))
        try:
            interpreter.invoke()
        except RuntimeError as error:
            raise TargetUnavailable(f"{self.path}: {self._library.package} fails: {error}") from error
        details = interpreter.get_output_details()
        return _as_declared({self._name(each): interpreter.get_tensor(each["index"]) for each in details})

    def _checked(self, array: NDArray[np.generic]) -> NDArray[np.generic]:
        wanted = _port(self._interpreter.get_input_details()[0])
        if array.shape != wanted.shape or array.dtype != wanted.dtype:
            raise DatasetError(
                f"{self.path} takes {wanted.dtype} of shape {wanted.shape}, given {array.dtype} of shape "
                f"{array.shape}. Runner.input_of makes it of a frame."
            )
        return array

    def _read(self, interpreter: Any, tensors: Sequence[str]) -> dict[str, NDArray[np.generic]]:
        places = {self._name(detail): detail["index"] for detail in interpreter.get_tensor_details()}
        found = {}
        for name in tensors:
            if name not in places:
                raise ArtifactError(
                    f"{self.path}: no tensor {name} in the file ({len(places)} others). Export again."
                )
            try:
                found[name] = np.asarray(interpreter.get_tensor(places[name]))
            except ValueError as error:
                raise ArtifactError(f"{self.path}: tensor {name} was not kept: {error}") from error
        return found

    def _check_same(
        self,
        reference: Mapping[str, NDArray[np.generic]],
        actual: Mapping[str, NDArray[np.generic]],
        where: str,
    ) -> None:
        differing = [name for name in OUTPUTS if reference[name].tobytes() != actual[name].tobytes()]
        if differing:
            raise TargetUnavailable(
                f"{self.path}: {self._library.package} {self._library.version} computes other {differing[0]} {where} "
                "than otherwise: what it shows there would be of another computation. Use a tested version: "
                "constraints.txt."
            )

    def _profiled(self) -> ProfiledModel:
        return ProfiledModel(
            self._library,
            self.path,
            threads=self.threads,
            builtin=self.kernels == "builtin",
            inputs=[_port(detail) for detail in self._interpreter.get_input_details()],
            outputs=[_port(detail) for detail in self._interpreter.get_output_details()],
        )

    def _try_profiler(self) -> str:
        port = _port(self._interpreter.get_input_details()[0])
        try:
            self.profile(np.zeros(port.shape, port.dtype), warmup=1, runs=1)
        except TargetUnavailable as error:
            return str(error)
        return ""

    @staticmethod
    def _name(detail: Mapping[str, Any]) -> str:
        return str(detail["name"])


class BuiltinTfliteRunner(TfliteRunner):
    """Runs a `.tflite` with TFLite's own kernels alone."""

    kernels: ClassVar[Kernels] = "builtin"


def has_device() -> bool:
    """Say that a CPU is there."""
    return True


def _port(detail: Mapping[str, Any]) -> Port:
    return Port(tuple(int(size) for size in detail["shape"]), np.dtype(detail["dtype"]))


def _as_declared(outputs: dict[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
    """Return outputs with the types that every runtime's have: labels and count are int64, the count a scalar."""
    return outputs | {
        "labels": outputs["labels"].astype(np.int64),
        "count": outputs["count"].astype(np.int64).reshape(()),
    }


RUNNER = TfliteRunner
OTHER_RUNNERS = (BuiltinTfliteRunner,)
