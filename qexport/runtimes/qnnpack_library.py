"""PyTorch as a runtime of quantized modules: its engine, its threads, its files.

The engine is one setting of the whole process, and a file loads under any: it decides which kernels the weights are
packed for, and which compute. So it is set and looked at where it matters, and put back after it. torch is imported
when it is used.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qexport.errors import ArtifactError, TargetUnavailable

ENGINE = "qnnpack"
ZERO_POINT = 128
"""Of activations, which QNNPACK takes as quint8; weights are qint8 with zero point 0."""
_UNKNOWN_OPERATOR = re.compile(r"Unknown builtin op: ([\w.]+)::(\w+)")
_LIBRARY_OF = {"torchvision": "import torchvision, which holds it: pip install torchvision"}


@contextmanager
def quiet() -> Iterator[None]:
    """Say nothing of quantized tensors and TorchScript being deprecated, which the versions pinned here still have."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=r".*torch\.jit\.")
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=r".*torch\.(jit|ao)\b")
        warnings.filterwarnings("ignore", category=UserWarning, message=r".*torch\.quantize_per_tensor")
        yield


def require_engine(engine: str, *, asked_by: str) -> None:
    """Refuse an engine that this PyTorch lacks, and one that this target is not about.

    Args:
        engine: its name in `torch.backends.quantized`.
        asked_by: what wants it, for the message.

    Raises:
        TargetUnavailable: PyTorch is not installed, or was built without the engine.
        ArtifactError: an engine with other kernels, hence other numbers.
    """
    torch = import_torch()
    supported = list(torch.backends.quantized.supported_engines)
    if engine not in supported:
        raise TargetUnavailable(
            f"{asked_by}: wants PyTorch's quantization engine {engine!r}; torch {torch.__version__} here has "
            f"{', '.join(supported)}. Install a CPU build of PyTorch, which has {ENGINE} on x86-64 and 64-bit Arm "
            "(docs/qnnpack.md)."
        )
    if engine != ENGINE:
        raise ArtifactError(
            f"{asked_by}: made for PyTorch's quantization engine {engine!r}, which rounds otherwise than {ENGINE!r}, "
            "what this runtime runs. Export again."
        )


@contextmanager
def engine_set(engine: str = ENGINE) -> Iterator[None]:
    """Let PyTorch compute with an engine inside the block; afterwards as before.

    Raises:
        TargetUnavailable: another engine is at work although this one was set.
    """
    torch = import_torch()
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        found = torch.backends.quantized.engine
        if found != engine:
            raise TargetUnavailable(
                f"PyTorch computes with engine {found!r} after {engine!r} was set: its numbers would be another "
                "engine's. Install a build of PyTorch that docs/qnnpack.md names."
            )
        yield
    finally:
        torch.backends.quantized.engine = before


@contextmanager
def as_exported() -> Iterator[None]:
    """Run a file's operators one by one in their order, as they were exported, and record nothing for gradients."""
    torch = import_torch()
    before = torch._C._get_graph_executor_optimize()
    torch._C._set_graph_executor_optimize(False)
    try:
        with quiet(), engine_set(), torch.inference_mode():
            yield
    finally:
        torch._C._set_graph_executor_optimize(before)


def load_module(path: Path) -> Any:
    """Load a TorchScript file under the engine; needs PyTorch and torchvision alone.

    Raises:
        TargetUnavailable: PyTorch or torchvision is not installed, or the file has an operator that neither has.
        ArtifactError: cut off, changed, or no TorchScript.
    """
    torch = import_torch()
    import_torchvision()
    try:
        with quiet(), engine_set():
            # Said once a process, from wherever quantized tensors are first made; let it be here.
            torch.quantize_per_tensor(torch.zeros(1), 1.0, ZERO_POINT, torch.quint8)
            return torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError, EOFError) as error:
        unknown = _UNKNOWN_OPERATOR.search(str(error))
        if unknown is not None:
            library, name = unknown.groups()
            help_ = _LIBRARY_OF.get(
                library, f"import the package that registers {library}::{name} before it is run"
            )
            raise TargetUnavailable(
                f"{path}: has operator {library}::{name}, which is not in this process: {help_}."
            ) from error
        first = str(error).strip().partition("\n")[0]
        raise ArtifactError(
            f"{path}: no TorchScript that torch {torch.__version__} reads: {first}. Copy it again, or export again."
        ) from error


def import_torch() -> Any:
    """Return torch.

    Raises:
        TargetUnavailable: it is not installed.
    """
    try:
        import torch  # noqa: PLC0415
    except ImportError as error:
        raise TargetUnavailable(
            f"PyTorch does not load here: {error}. Install: pip install 'qexport[qnnpack-runtime]' "
            "(docs/qnnpack.md says where its CPU build is from)."
        ) from error
    return torch


def import_torchvision() -> Any:
    """Return torchvision, whose import registers `nms` and `roi_align`.

    Raises:
        TargetUnavailable: it is not installed.
    """
    try:
        import torchvision  # noqa: PLC0415
    except (
        ImportError,
        RuntimeError,
    ) as error:  # RuntimeError: of another torch, its operators do not register
        raise TargetUnavailable(
            f"torchvision does not load here: {error}. The file has its operators nms and roi_align. Install the one "
            "that belongs to this torch: pip install torchvision (docs/qnnpack.md)."
        ) from error
    return torchvision
