"""Sessions of ONNX Runtime on the CPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qexport.errors import ArtifactError, TargetUnavailable
from qexport.runtimes.onnx_model import add_outputs

if TYPE_CHECKING:
    import onnxruntime


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
    # From 1.31 on it keeps a device ID and a database of usage in the user's cache, unless told otherwise.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
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
    """Return the model with more outputs, serialized.

    Raises:
        ArtifactError: the file is cut off.
    """
    return add_outputs(path.read_bytes(), tensors)
