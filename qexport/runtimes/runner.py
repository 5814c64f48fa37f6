"""What every runtime offers: frame in, detections out, and a look inside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from qexport.artifact import Artifact, InputSpec, Rung, load_artifact
from qexport.detections import Detections
from qexport.errors import ArtifactError, DatasetError
from qexport.layers import Kind
from qexport.runtimes.preprocess import normalised_image

OUTPUTS = ("boxes", "scores", "labels", "count")
"""Names of every artifact's outputs."""

NOWHERE = "detector"
"""Path of a kernel that no module can be found for."""


@dataclass(frozen=True, slots=True)
class KernelTime:
    """One kernel of one run."""

    name: str
    """The kernel's name in the runtime, `backbone.body.conv1/Conv`."""
    kernel: str
    """Its type, `QLinearConv`."""
    duration_ms: float


@dataclass(frozen=True, slots=True)
class SharedKernel:
    """To which modules a kernel belongs that computes for several."""

    paths: tuple[str, ...]
    """Those that divide its time among them."""
    by_macs: bool = False
    """They divide it by their multiply-accumulates, else equally."""
    fused: tuple[str, ...] = ()
    """Those whose work is fused into it, and that have no time of it."""


@dataclass(frozen=True, slots=True)
class ProfiledRun:
    """One run with every kernel timed."""

    whole_ms: float
    """The run as the runtime itself timed it."""
    kernels: tuple[KernelTime, ...]


class Runner(ABC):
    """Runs one file of an artifact. A context manager: what the runtime holds is freed at the end.

    Args:
        artifact: the artifact's folder, its manifest or a file in it.
        role: which file, `int8` or its float baseline `fp32`.
        threads: threads of the runtime.

    Raises:
        ArtifactError: the artifact is missing or edited, has no such file, or it was left out.
    """

    rung: ClassVar[Rung] = "run"
    """What its answers stand on."""

    def __init__(self, artifact: Path, *, role: str = "int8", threads: int = 1) -> None:
        self.artifact: Artifact
        self.artifact, self.folder = load_artifact(artifact)
        self.role = role
        self.path = self.folder / self.artifact.file(role).name
        if not self.path.is_file():
            raise ArtifactError(
                f"{self.path}: the {role} file was left out of this folder. Take it along: "
                "qexport bundle RUN --with-baseline"
            )
        self.threads = threads

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def infer(self, frame: NDArray[np.uint8]) -> Detections:
        """Detect on one frame.

        Args:
            frame: (H, W, 3) uint8 RGB, of the size that the artifact declares.

        Returns:
            Detections in pixels of the frame.

        Raises:
            DatasetError: the frame is of another size or type.
        """
        return self.detections(self.run(self.input_of(frame)))

    def input_of(self, frame: NDArray[np.uint8]) -> NDArray[np.generic]:
        """Return what the artifact takes for a frame: the frame, or the normalised image."""
        check_frame(frame, self.artifact.input)
        return input_of(frame, self.artifact.input)

    def detections(self, outputs: Mapping[str, NDArray[np.generic]]) -> Detections:
        """Cut the padding off the outputs of a run."""
        count = int(outputs["count"])
        return Detections(
            outputs["boxes"][:count].astype(np.float32),
            outputs["scores"][:count].astype(np.float32),
            outputs["labels"][:count].astype(np.int64),
        )

    @property
    def kernel_set(self) -> str:
        """Which kernels run, where the runtime has several sets of them; asked while it is open."""
        return ""

    @abstractmethod
    def open(self) -> None:
        """Load the file into the runtime."""

    @abstractmethod
    def close(self) -> None:
        """Free what the runtime holds."""

    @abstractmethod
    def run(self, array: NDArray[np.generic], tensors: Sequence[str] = ()) -> dict[str, NDArray[np.generic]]:
        """Run once; return `boxes`, `scores`, `labels`, `count` and the named intermediate tensors."""


class ForcedRunner(Runner):
    """A runtime whose layers can each be run on inputs that it did not compute itself."""

    @abstractmethod
    def run_forced(
        self,
        array: NDArray[np.generic],
        codes: Mapping[str, NDArray[np.int8]],
        proposals: NDArray[np.float32],
    ) -> dict[str, NDArray[np.int8]]:
        """Run every quantized layer with the artifact's own kernels on the inputs that are given.

        Args:
            array: what `input_of` gives, for the layers that read the image.
            codes: int8 with zero point 0 in the detector's layout, by key of the encodings, one of every site. They
                stand for what the runtime computed, for each of its readers.
            proposals: (R, 4) float32, pixels of the resized image; they stand for the runtime's own.

        Returns:
            What came out, by key, likewise.
        """


class ProfilingRunner(Runner):
    """A runtime that times its own kernels."""

    def profile_refusal(self) -> str:
        """Return why kernels cannot be timed here, with what helps; empty where they can."""
        return ""

    @abstractmethod
    def profile(self, array: NDArray[np.generic], *, warmup: int, runs: int) -> list[ProfiledRun]:
        """Run with every kernel timed."""

    @abstractmethod
    def kernel_owners(self, rows: Collection[str] | None = None) -> Mapping[str, str | SharedKernel]:
        """Return the module path, or the several, of every kernel that the runtime runs, by the kernel's name.

        Args:
            rows: for a baseline: the artifact's paths. What the artifact has fused away goes to the path that
                it was fused into.
        """

    @abstractmethod
    def kind_of(self, kernel: str) -> Kind:
        """Return the kind of work that a kernel type does."""

    @abstractmethod
    def between_kernels_ms(self) -> float:
        """Return what the runtime's profiler itself takes between two kernels, ms, measured."""


def input_of(frame: NDArray[np.uint8], spec: InputSpec) -> NDArray[np.generic]:
    """Return what a detector of this input takes for a frame: the frame, or the normalised image."""
    return normalised_image(frame, spec) if spec.preprocess == "outside" else frame


def check_frame(frame: NDArray[np.uint8], spec: InputSpec) -> None:
    """Refuse a frame that is not what the artifact declares.

    Raises:
        DatasetError: says what was expected and what was given.
    """
    expected = (spec.frame_height_px, spec.frame_width_px, 3)
    if frame.shape != expected or frame.dtype != np.uint8:
        raise DatasetError(
            f"the artifact takes uint8 RGB frames of {expected[0]}x{expected[1]} (height x width), "
            f"given {frame.dtype} of shape {frame.shape}. Read images with qexport.frames.read_frame."
        )
