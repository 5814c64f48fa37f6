"""TFLite's interpreter: ai-edge-litert, or tflite-runtime on old boards. Both run the same files."""

from __future__ import annotations

import importlib
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qexport.errors import ArtifactError, TargetUnavailable
from qexport.versions import package_versions

INSTALL = "pip install 'qexport[tflite-runtime]'"
LITERT, TFLITE_RUNTIME = "ai-edge-litert", "tflite-runtime"
_MODULES = {LITERT: "ai_edge_litert.interpreter", TFLITE_RUNTIME: "tflite_runtime.interpreter"}
_IDENTIFIER = slice(4, 8)
_TFLITE = b"TFL3"
_UNKNOWN_VERSION = re.compile(r"builtin opcode '(?P<operator>\w+)' version '(?P<version>\d+)'")
_UNKNOWN_NUMBER = re.compile(r"builtin_code out of range: (?P<number>\d+)")
_DELEGATE = "DELEGATE"
_STDERR = 2


@dataclass(frozen=True, slots=True)
class TfliteLibrary:
    """The interpreter that is installed."""

    package: str
    """`ai-edge-litert` or `tflite-runtime`."""
    version: str
    module: Any
    """Its module `interpreter`."""


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator of the file, by what the interpreter says of it."""

    index: int
    code: str
    """`CONV_2D`."""
    name: str
    """Of its first output: unique in the file, and by the exporter `PATH[@CALL]/...`."""
    inputs: tuple[int, ...]
    """Tensors; one that is left out is -1."""
    outputs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class OperatorGraph:
    """The operators, and which of them the delegate took."""

    operators: tuple[Operator, ...]
    partitions: tuple[tuple[int, ...], ...]
    """Operators of each piece of the graph that XNNPACK runs as a whole, in the order in which the pieces run."""

    @property
    def delegated(self) -> int:
        """How many operators XNNPACK runs."""
        return sum(len(partition) for partition in self.partitions)


def load_library() -> TfliteLibrary:
    """Import the interpreter; ai-edge-litert where both are installed.

    Raises:
        TargetUnavailable: neither is installed, or what is there does not load.
    """
    broken = []
    for package, module in _MODULES.items():
        version = package_versions(package).get(package)
        if version is None:
            continue
        try:
            return TfliteLibrary(package, version, importlib.import_module(module))
        except ImportError as error:
            broken.append(f"{package} {version} does not load here ({error})")
    found = "; ".join(broken) or f"neither {LITERT} nor {TFLITE_RUNTIME} is installed"
    raise TargetUnavailable(f"target tflite: {found}. Install: {INSTALL}")


def open_interpreter(
    library: TfliteLibrary, path: Path, *, threads: int, builtin: bool = False, keep: bool = False
) -> Any:
    """Return an interpreter with its tensors allocated.

    Args:
        library: that runs the file.
        path: of the file.
        threads: of the kernels.
        builtin: run TFLite's own kernels, none of XNNPACK's.
        keep: keep every intermediate tensor, to be read after a run.

    Raises:
        ArtifactError: the file is no TFLite model, is cut off, or has an operator that this version does not know.
        TargetUnavailable: there is not enough memory.
    """
    with path.open("rb") as file:
        head = file.read(_IDENTIFIER.stop)
    if head[_IDENTIFIER] != _TFLITE:  # tflite-runtime crashes on some of these
        raise ArtifactError(f"{path}: no TFLite model (it does not say {_TFLITE.decode()}). Export again.")
    kinds = library.module.OpResolverType
    kind = kinds.BUILTIN_WITHOUT_DEFAULT_DELEGATES if builtin else kinds.AUTO
    with quiet(), warnings.catch_warnings():  # that it takes memory to keep tensors is known
        warnings.simplefilter("ignore", UserWarning)
        try:
            interpreter = library.module.Interpreter(
                model_path=str(path),
                num_threads=threads,
                experimental_op_resolver_type=kind,
                experimental_preserve_all_tensors=keep,
            )
            interpreter.allocate_tensors()
        except (ValueError, UnicodeDecodeError) as error:
            raise ArtifactError(_refusal(library, path, str(error))) from error
        except (RuntimeError, MemoryError) as error:
            raise TargetUnavailable(
                f"{path}: {library.package} {library.version} cannot allocate its tensors: {error}. Close what else "
                "runs here, or export with fewer proposals."
            ) from error
    return interpreter


def read_graph(interpreter: Any) -> OperatorGraph:
    """Return the operators as the interpreter has them; needs no schema, which tflite-runtime does not bring."""
    names = {detail["index"]: str(detail["name"]) for detail in interpreter.get_tensor_details()}
    nodes = [
        Operator(
            index=int(detail["index"]),
            code=str(detail["op_name"]),
            name=names.get(int(detail["outputs"][0]), "") if len(detail["outputs"]) else "",
            inputs=tuple(int(tensor) for tensor in detail["inputs"]),
            outputs=tuple(int(tensor) for tensor in detail["outputs"]),
        )
        for detail in interpreter._get_ops_details()
    ]
    operators = tuple(node for node in nodes if node.code != _DELEGATE)
    delegates = [node for node in nodes if node.code == _DELEGATE]
    return OperatorGraph(operators, tuple(_behind(delegate, operators) for delegate in delegates))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back what the libraries say on standard error of what they look for and load; shown if it fails."""
    saved = os.dup(_STDERR)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), _STDERR)
        try:
            yield
        except BaseException:
            said.seek(0)
            os.write(saved, said.read())
            raise
        finally:
            os.dup2(saved, _STDERR)
            os.close(saved)


def _behind(delegate: Operator, operators: Sequence[Operator]) -> tuple[int, ...]:
    """Return the operators that a delegate stands for: all between its inputs and its outputs, in their order."""
    makers = {tensor: operator for operator in operators for tensor in operator.outputs}
    outside, waiting, found = set(delegate.inputs), list(delegate.outputs), set()
    while waiting:
        tensor = waiting.pop()
        maker = makers.get(tensor)
        if tensor in outside or maker is None or maker.index in found:
            continue
        found.add(maker.index)
        waiting.extend(maker.inputs)
    return tuple(sorted(found))


def _refusal(library: TfliteLibrary, path: Path, text: str) -> str:
    here = f"{library.package} {library.version}"
    found = _UNKNOWN_VERSION.search(text)
    if found is not None:
        operator = f"operator {found['operator']} of version {found['version']}"
    else:
        number = _UNKNOWN_NUMBER.search(text)
        operator = f"operator number {number['number']}" if number is not None else ""
    if operator:
        newer = f"pip install --upgrade {LITERT}" if library.package == LITERT else f"pip install {LITERT}"
        return f"{path}: {here} is too old for it: it does not know {operator}. Install a newer one: {newer}"
    return f"{path}: {here} refuses it: {text.strip() or 'it says no reason'}. Export again."
