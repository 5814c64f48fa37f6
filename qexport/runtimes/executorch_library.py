"""ExecuTorch's Python runtime: loaded, its threads set, programs opened. It links PyTorch, which is imported here."""

from __future__ import annotations

import importlib
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from qexport.errors import ArtifactError, TargetUnavailable
from qexport.runtimes.executorch_table import FORMAT_VERSION, TABLE, ProgramTable
from qexport.versions import package_versions

XNNPACK = "XnnpackBackend"
INSTALL = "pip install 'qexport[executorch]'"
_THREADS_OF_OPEN: list[int] = []
"""Threads of the programs that are open: XNNPACK keeps hold of the pool that it was opened with."""


@dataclass(frozen=True, slots=True)
class OpenProgram:
    """A program in the runtime."""

    program: Any
    table: ProgramTable
    version: str
    """Of ExecuTorch."""


def import_torch() -> Any:
    """Return torch.

    Raises:
        TargetUnavailable: it is not installed.
    """
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise TargetUnavailable(
            f"ExecuTorch's Python runtime stands on PyTorch, which is not installed. Install: {INSTALL}"
        ) from error


def open_program(path: Path, *, threads: int, traced: bool = False) -> OpenProgram:
    """Load a program; `release` gives its threads back.

    Args:
        path: of the `.pte`.
        threads: of XNNPACK.
        traced: whether its instructions are timed.

    Raises:
        TargetUnavailable: no ExecuTorch, one without XNNPACK or without an operator that the program calls, or programs
            with another number of threads are open.
        ArtifactError: cut off, of an ExecuTorch that this one does not read, or not written by qexport.
    """
    library = _import_runtime()
    version = package_versions("executorch")["executorch"]
    if XNNPACK not in library._get_registered_backend_names():
        raise TargetUnavailable(
            f"ExecuTorch {version} here was built without XNNPACK, which computes the layers of {path}. "
            f"Take the wheel of the package index: {INSTALL}"
        )
    _take_threads(library, threads)
    try:
        program = _load(library, path, version, traced)
        return OpenProgram(program, _table_of(program, path, version), version)
    except BaseException:
        release(threads)
        raise


def release(threads: int) -> None:
    """Note that a program with that many threads is closed."""
    _THREADS_OF_OPEN.remove(threads)


def load_method(opened: OpenProgram, name: str, path: Path) -> Any:
    """Return a method, ready to run.

    Raises:
        ArtifactError: the program has no such method.
        TargetUnavailable: it calls what this runtime does not have.
    """
    if name not in opened.table.methods:
        raise ArtifactError(f"{path}: no method {name} in the program. Export again.")
    with _log() as log:
        try:
            return opened.program.load_method(name)
        except RuntimeError as error:
            raise TargetUnavailable(
                f"{path}: ExecuTorch {opened.version} cannot prepare {name}, the program was written by "
                f"{opened.table.executorch}: {error}{_last(log)}. Use that version: pip install "
                f"executorch=={opened.table.executorch}, or export again."
            ) from error


def call(
    method: Any, arrays: Sequence[NDArray[np.generic]], names: Sequence[str], path: Path
) -> dict[str, NDArray[np.generic]]:
    """Run a method once; return its outputs by name, copied: it uses their memory again.

    Raises:
        TargetUnavailable: the runtime fails.
    """
    torch = import_torch()
    given = [torch.from_numpy(_writable(array)) for array in arrays]
    try:
        results = method(given)
    except RuntimeError as error:
        raise TargetUnavailable(f"{path}: ExecuTorch fails: {error}") from error
    return {name: result.numpy().copy() for name, result in zip(names, results, strict=True)}


def _import_runtime() -> Any:
    import_torch()
    try:
        with warnings.catch_warnings(), _log():
            warnings.filterwarnings("ignore", message="This API is experimental")
            library = importlib.import_module("executorch.extension.pybindings.portable_lib")
    except ImportError as error:
        raise TargetUnavailable(f"ExecuTorch is not installed ({error}). Install: {INSTALL}") from error
    return library


def _take_threads(library: Any, threads: int) -> None:
    """Set the one pool of threads that the process has.

    Raises:
        TargetUnavailable: programs are open that hold the present one.
    """
    with _log():  # the first call looks at the processor, and tells about it
        present = library._threadpool_get_thread_count()
    if present != threads:
        others = sorted(set(_THREADS_OF_OPEN))
        if others:
            raise TargetUnavailable(
                f"ExecuTorch has one pool of threads: {threads} asked for, a program with {others[0]} is open. "
                "Close it first."
            )
        with _log():
            library._unsafe_reset_threadpool(threads)
    _THREADS_OF_OPEN.append(threads)


def _load(library: Any, path: Path, version: str, traced: bool) -> Any:
    with _log() as log:
        try:
            return library._load_program(str(path), enable_etdump=traced, debug_buffer_size=0)
        except RuntimeError as error:
            raise ArtifactError(
                f"{path}: cut off, or written by an ExecuTorch that {version} does not read: {error}{_last(log)}. "
                "Copy the file again, or export with this version."
            ) from error


def _table_of(program: Any, path: Path, version: str) -> ProgramTable:
    names = [program.get_method_name(number) for number in range(program.num_methods())]
    if TABLE not in names:
        raise ArtifactError(
            f"{path}: not written by qexport: its methods are {', '.join(names)}. Export again."
        )
    with _log() as log:
        try:
            text = program.load_method(TABLE)([])[0]
        except RuntimeError as error:
            raise ArtifactError(
                f"{path}: ExecuTorch {version} does not read it: {error}{_last(log)}. Export again."
            ) from error
    try:
        table = msgspec.json.decode(text, type=ProgramTable)
    except msgspec.MsgspecError as error:
        raise ArtifactError(
            f"{path}: what it says of itself is not read here: {error}. Export again."
        ) from error
    if table.format_version != FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: table of format {table.format_version}, this qexport reads {FORMAT_VERSION}. Export again."
        )
    return table


def _writable(array: NDArray[np.generic]) -> NDArray[np.generic]:
    """Return an array that torch may share: it warns of one that is not to be written, though nobody writes it."""
    packed = np.ascontiguousarray(array)
    return packed if packed.flags.writeable else packed.copy()


@contextmanager
def _log() -> Iterator[Any]:
    """Keep what ExecuTorch's native code writes to standard error, where it notes what it does and why it fails."""
    with tempfile.TemporaryFile() as kept:
        own = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield kept
        finally:
            os.dup2(own, 2)
            os.close(own)


def _last(log: Any) -> str:
    """Return the last line of a log, in brackets."""
    log.seek(0)
    lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return f" ({lines[-1].strip()})" if lines else ""
