"""What lies in the file that --qat names: a state dict, a JSON document, or both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qexport.detectors.weights import read_checkpoint_file, state_of
from qexport.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Content:
    """A file, read; nothing in it was executed."""

    path: Path
    document: Mapping[str, Any] = field(default_factory=dict)
    """A JSON document; or what a torch checkpoint holds around its state dict."""
    state: Mapping[str, Tensor] = field(default_factory=dict)
    """The state dict; empty for JSON."""
    is_json: bool = False


def read_content(path: Path) -> Content:
    """Read the file.

    Raises:
        CheckpointError: missing, damaged, holding code, or a model that was converted to integers already.
    """
    if _looks_like_json(path):
        return _read_json(path)
    loaded = read_checkpoint_file(path)
    around = dict(loaded) if isinstance(loaded, Mapping) else {}
    _refuse_converted(around, path)
    return Content(path, document=around, state=state_of(loaded, path))


def describe_content(content: Content) -> str:
    """Return what was found, for a file whose format is not known."""
    if content.is_json:
        return f"a JSON document with {', '.join(list(content.document)[:8]) or 'nothing'}"
    endings = {key.rpartition(".")[2] for key in content.state}
    named = ", ".join(sorted(endings)[:12])
    return (
        f"a state dict of {len(content.state)} tensors whose keys end in {named}, and no quantizer among them"
    )


def _looks_like_json(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(64).lstrip()[:1] == b"{"
    except OSError:  # `read_checkpoint_file` says what is wrong with it
        return False


def _read_json(path: Path) -> Content:
    try:
        document = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path}: damaged or cut short JSON: {error}. Copy or export it again."
        ) from error
    return Content(path, document=document, is_json=True)


def _refuse_converted(loaded: Mapping[str, object], path: Path) -> None:
    nested = [value for value in loaded.values() if isinstance(value, Mapping)]
    for state in (loaded, *nested):
        for key, value in state.items():
            packed = str(key).endswith("_packed_params") or "_packed_params." in str(key)
            if packed or (isinstance(value, Tensor) and (value.is_quantized or value.dtype == torch.int8)):
                raise CheckpointError(
                    f"{path}: {key} is an integer weight: the model was converted already, and its training scales are "
                    "gone. Save the state dict before convert(): torch.save(prepared.state_dict(), ...)."
                )
