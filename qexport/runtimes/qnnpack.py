"""QNNPACK artifacts on the CPU, by PyTorch. Needs numpy, torch and torchvision, nothing else of a workstation."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexport.artifact import TensorSite
from qexport.errors import ArtifactError, DatasetError, TargetUnavailable
from qexport.layers import Kind
from qexport.runtimes import qnnpack_profiler
from qexport.runtimes.qnnpack_library import ENGINE, as_exported, import_torch, load_module, require_engine
from qexport.runtimes.qnnpack_program import Program, module_of
from qexport.runtimes.runner import OUTPUTS, ForcedRunner, ProfiledRun, ProfilingRunner
from qexport.sites import codes_of, stored_of

ENGINE_FORM = "engine"
"""In the artifact's forms: the engine that it was exported for."""


class QnnpackRunner(ForcedRunner, ProfilingRunner):
    """Runs a TorchScript file of quantized modules with the kernels of the engine that it was exported for."""

    _module: Any
    _program: Program
    _threads_before: int
    _owners: dict[str, str]

    def open(self) -> None:
        """Load the file under the engine.

        Raises:
            TargetUnavailable: no torch, no torchvision, a torch without the engine, or an operator that none has.
            ArtifactError: exported for another engine; cut off, or another model's file.
        """
        require_engine(self.artifact.forms.get(ENGINE_FORM, ""), asked_by=str(self.folder))
        self._module = load_module(self.path)
        self._program = Program(self._module, self.path)
        self._owners = {}
        self._check_parts()
        torch = import_torch()
        self._threads_before = torch.get_num_threads()
        if self._threads_before != self.threads:
            torch.set_num_threads(self.threads)

    def close(self) -> None:
        """Free the file, and give torch back the threads that it had."""
        torch = import_torch()
        if torch.get_num_threads() != self._threads_before:
            torch.set_num_threads(self._threads_before)
        del self._module, self._program

    @property
    def kernel_set(self) -> str:
        """Which engine computes, for results."""
        return f"{ENGINE} engine, torch {import_torch().__version__}"

    def run(self, array: NDArray[np.generic], tensors: Sequence[str] = ()) -> dict[str, NDArray[np.generic]]:
        """Run once; for intermediate tensors part by part.

        Raises:
            DatasetError: the model does not take the array.
            ArtifactError: there is no such tensor, or what comes out is not what the artifact says.
            TargetUnavailable: PyTorch fails.
        """
        missing = sorted(set(tensors) - set(self._program.tensors))
        if missing:
            raise ArtifactError(f"{self.path}: no tensor {missing[0]} in the file. Export again.")
        given = self._given(array)
        with as_exported():
            try:
                if not tensors:
                    return self._as_declared(self._module(given))
                wanted = {*tensors, *self._program.results}
                kept = {name: value for name, value, _ in self._program.run(given) if name in wanted}
            except RuntimeError as error:
                raise self._failure(error) from error
            found = self._as_declared([kept[name] for name in self._program.results])
            return found | {name: _stored(kept[name]) for name in tensors}

    def run_forced(
        self,
        array: NDArray[np.generic],
        codes: Mapping[str, NDArray[np.int8]],
        proposals: NDArray[np.float32],
    ) -> dict[str, NDArray[np.int8]]:
        """Run part by part; each reads the codes that are given, in the scale of those that they replace."""
        torch = import_torch()
        sites = {site.tensor: site for site in self.artifact.sites}
        boxes = self.artifact.float_sites["proposals"]
        given, found = self._given(array), dict[str, NDArray[np.int8]]()
        with as_exported():
            try:
                for name, value, replace in self._program.run(given):
                    if name == boxes:
                        replace(torch.from_numpy(np.array(proposals)))
                    if name not in sites:
                        continue
                    site = sites[name]
                    found[name] = codes_of(site, _stored(value))
                    replace(_quantized_like(value, site, codes[site.key]))
                    if len(found) == len(sites):
                        break  # what is left decides on boxes
            except RuntimeError as error:
                raise self._failure(error) from error
        return {site.key: found[site.tensor] for site in self.artifact.sites}

    def profile(self, array: NDArray[np.generic], *, warmup: int, runs: int) -> list[ProfiledRun]:
        """Run with torch's own profiler.

        Raises:
            TargetUnavailable: the profiler shows other operators than the file has.
        """
        given = self._given(array)
        with as_exported():
            for _ in range(max(1, warmup)):
                self._module(given)
            recorded = [qnnpack_profiler.record(self._module, self._program, given) for _ in range(runs)]
        self._owners = {kernel.name: module_of(kernel.part) for one in recorded for kernel in one.kernels}
        return [one.profiled() for one in recorded]

    def kernel_owners(self, rows: Collection[str] | None = None) -> Mapping[str, str]:
        """Take the paths that the exporter gave to the parts, of the operators that `profile` timed."""
        del rows  # an activation lies below the module that it is fused into
        return self._owners

    def kind_of(self, kernel: str) -> Kind:
        """Look an operator up."""
        return qnnpack_profiler.kind_of_operator(kernel)

    def between_kernels_ms(self) -> float:
        """Measure on a chain of operators that do next to nothing."""
        with as_exported():
            return qnnpack_profiler.time_between_operators_ms()

    def _check_parts(self) -> None:
        """Refuse another model's file."""
        if len(self._program.results) != len(OUTPUTS):
            raise ArtifactError(
                f"{self.path}: another model's file: it gives {len(self._program.results)} tensors, expected "
                f"{', '.join(OUTPUTS)}. Export again."
            )
        if self.role != "int8":
            return
        there = set(self._program.tensors)
        wanted = [*(site.tensor for site in self.artifact.sites), *self.artifact.float_sites.values()]
        missing = [name for name in wanted if name not in there]
        if missing:
            raise ArtifactError(
                f"{self.path}: another model's file: {len(missing)} of {len(wanted)} tensors of the artifact are not "
                f"in it, first {missing[0]}. Export again."
            )

    def _given(self, array: NDArray[np.generic]) -> Any:
        spec = self.artifact.input
        shape, dtype = (spec.frame_height_px, spec.frame_width_px, 3), np.dtype(np.uint8)
        if spec.preprocess == "outside":
            shape, dtype = (1, 3, spec.padded_height_px, spec.padded_width_px), np.dtype(np.float32)  # type: ignore[assignment]
        if array.shape != shape or array.dtype != dtype:
            raise DatasetError(
                f"{self.path} takes {dtype} of shape {shape}, given {array.dtype} of shape {array.shape}. "
                "Runner.input_of makes it of a frame."
            )
        # torch shares the memory, and says so where it may not write there.
        own = array if array.flags.writeable and array.flags.c_contiguous else np.array(array)
        return import_torch().from_numpy(own)

    def _as_declared(self, outputs: Sequence[Any]) -> dict[str, NDArray[np.generic]]:
        found: dict[str, NDArray[np.generic]] = {
            name: value.numpy() for name, value in zip(OUTPUTS, outputs, strict=True)
        }
        rows = self.artifact.detections
        shapes = {"boxes": (rows, 4), "scores": (rows,), "labels": (rows,), "count": ()}
        for name, array in found.items():
            if array.shape != shapes[name]:
                raise ArtifactError(
                    f"{self.path}: another model's file: it gives {name} of shape {array.shape}, the artifact has "
                    f"{shapes[name]}. Export again."
                )
        return found

    def _failure(self, error: RuntimeError) -> TargetUnavailable:
        last = str(error).strip().rpartition("\n")[2]
        return TargetUnavailable(
            f"{self.path}: torch {import_torch().__version__} fails: {last}. Versions that it was tested with are in "
            "constraints.txt."
        )


def has_device() -> bool:
    """Say that a CPU is there."""
    return True


def _stored(value: Any) -> NDArray[np.generic]:
    """Return a tensor as an array, a quantized one's integers."""
    plain = value.int_repr() if value.is_quantized else value
    array: NDArray[np.generic] = plain.contiguous().numpy()
    return array


def _quantized_like(value: Any, site: TensorSite, codes: NDArray[np.int8]) -> Any:
    """Return codes as a quantized tensor with the scale, zero point and layout in memory of another."""
    torch = import_torch()
    stored = stored_of(site, codes, tuple(value.shape), np.dtype(np.uint8))
    made = torch._make_per_tensor_quantized_tensor(
        torch.from_numpy(stored), value.q_scale(), value.q_zero_point()
    )
    if value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last):
        made = made.contiguous(memory_format=torch.channels_last)
    return made


RUNNER = QnnpackRunner
