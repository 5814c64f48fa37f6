"""A lowered detector as a TorchScript file."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter
from torch.jit._trace import TracerWarning

from qexport.errors import UnsupportedOperator
from qexport.files import write_bytes
from qexport.runtimes.qnnpack_library import engine_set, quiet

_ARCHIVE = "detector"
"""Folder inside the file; PyTorch takes the one that there is."""
_DEBUG = ".debug_pkl"
_PADDING_ID = 0x4246
_ALIGNMENT = 64
"""Of tensors in the file, and the field that pads up to it: as PyTorch writes them."""
_CONSTANT = "torch.tensor results are registered as constants"
"""What the tracer says of constants, which these are."""
_EPOCH = (1980, 1, 1, 0, 0, 0)


def write_torchscript(module: GraphModule, given: Tensor, path: Path) -> None:
    """Write a module of parts: each traced, what calls them as a script.

    Args:
        module: as `Parts.finish` gives it.
        given: an input of its shape and type.
        path: of the file.

    Raises:
        UnsupportedOperator: what a part does depends on values of the input, which a trace would take for constants.
    """
    with quiet(), engine_set(), torch.no_grad():
        tracer = _Tracer(module)
        tracer.run(given)
        whole = GraphModule(tracer.traced, module.graph, class_name="Detector").eval()
        # torch.fx's own GraphModule annotates an attribute in a way that TorchScript passes over.
        warnings.filterwarnings(
            "ignore", category=UserWarning, message=r"The TorchScript type system doesn't support"
        )
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.script(whole), buffer)
    write_bytes(path, without_sources(buffer.getvalue()))


class _Tracer(Interpreter):
    """Runs a module and traces every part of it with what it was given."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.traced: dict[str, nn.Module] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a part; trace it the first time."""
        if target not in self.traced:
            self.traced[target] = trace(self.fetch_attr(target), args, target)
        return super().call_module(target, args, kwargs)


def trace(module: nn.Module, given: tuple[Tensor, ...], path: str) -> torch.jit.ScriptModule:
    """Return a part as TorchScript.

    Args:
        module: the part.
        given: its inputs.
        path: of it, for messages.

    Raises:
        UnsupportedOperator: what it does depends on values of the inputs, which a trace would take for constants.
    """
    # Raised as errors, some of them would get lost in torch's C++.
    with warnings.catch_warnings(record=True) as said:
        warnings.filterwarnings("always", category=TracerWarning)
        traced = torch.jit.trace(module, given, check_trace=False)  # type: ignore[no-untyped-call]
    for warning in said:
        text = str(warning.message)
        if not issubclass(warning.category, TracerWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        elif not text.startswith(_CONSTANT):
            raise UnsupportedOperator(
                f"{path}: what it computes depends on values of one frame, so no trace of it is right: {text}"
            )
    assert isinstance(traced, torch.jit.ScriptModule)
    return traced


def without_sources(data: bytes) -> bytes:
    """Return a TorchScript file without where its operators were written, for debuggers: paths of this machine."""
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(written, "w") as result:
        for entry in source.infolist():
            name = entry.filename.partition("/")[2]
            if name.endswith(_DEBUG):
                continue
            kept = zipfile.ZipInfo(f"{_ARCHIVE}/{name}", _EPOCH)
            kept.compress_type = entry.compress_type
            if entry.compress_type == zipfile.ZIP_STORED:
                kept.extra = _padding(written.tell(), kept.filename)
            result.writestr(kept, source.read(entry))
    return written.getvalue()


def _padding(start: int, name: str) -> bytes:
    """Return the extra field behind which an entry's bytes are aligned."""
    header = 30 + len(name.encode()) + 4
    length = -(start + header) % _ALIGNMENT
    return struct.pack("<HH", _PADDING_ID, length) + b"\0" * length
