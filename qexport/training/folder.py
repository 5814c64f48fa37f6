"""The folder of a training: what it belongs to, and where it stands.

OUT/settings.json     detector, data, settings, versions, the exact command
OUT/start.json        the encodings that training began with
OUT/checkpoint.pt     everything that the next epoch needs, written whole after each epoch
OUT/history.json      losses, learning rate, mAP of each epoch
OUT/history.png       the same as a picture
OUT/qat.pt            the result: weights and encodings
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import msgspec
import torch

from qexport.errors import RunFolderError
from qexport.files import read_json, write_bytes, write_json
from qexport.training.settings import TrainingRecord

SETTINGS = "settings.json"
START = "start.json"
CHECKPOINT = "checkpoint.pt"
RESULT = "qat.pt"
_IDENTITY = ("detector", "training", "weights_sha256", "images_sha256", "validation_sha256", "threads")


def require_free(path: Path) -> None:
    """Refuse a folder in which something else than a training lies.

    Raises:
        RunFolderError: it is a file, cannot be read, or holds something else.
    """
    try:
        if path.exists() and not path.is_dir():
            raise RunFolderError(f"{path} is a file; --out takes a folder. Choose another.")
        others = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read: {error.strerror}. Choose another --out.") from error
    if SETTINGS in others:
        return
    # What a training leaves that was killed while it wrote its very first file.
    others = [name for name in others if not (name.startswith(f".{SETTINGS}.") and name.endswith(".part"))]
    if others:
        raise RunFolderError(
            f"{path} holds something that is not a training of qexport ({others[0]}). Choose another --out."
        )


def bind(path: Path, record: TrainingRecord) -> None:
    """Make a training's folder, or make sure that the training in it is the same.

    Raises:
        RunFolderError: it holds another training; the message says what differs.
    """
    require_free(path)
    file = path / SETTINGS
    if not file.is_file():
        write_json(file, record)
    there = read_json(file, TrainingRecord, RunFolderError)
    changed = _differences(there, record)
    if changed:
        raise RunFolderError(
            f"{path} holds another training; it differs in {', '.join(changed)}. "
            "Choose another --out, or delete that folder."
        )
    for partial in path.glob(".*.part"):
        partial.unlink(missing_ok=True)


def save(path: Path, value: dict[str, Any]) -> Path:
    """Write tensors and plain values as torch does, whole or not at all; equal values give equal bytes."""
    buffer = io.BytesIO()  # into a file, torch would write the file's name as well
    torch.save(value, buffer)
    return write_bytes(path, buffer.getvalue())


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Return the checkpoint of a folder, None where no epoch is complete.

    Raises:
        RunFolderError: it cannot be read.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        return None
    try:
        kept: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise RunFolderError(
            f"{path}: damaged or cut short ({error}). Delete {folder} and train again."
        ) from error
    return kept


def _differences(old: TrainingRecord, new: TrainingRecord) -> list[str]:
    before, after = (msgspec.to_builtins(record) for record in (old, new))
    changed: list[str] = []
    for name in _IDENTITY:
        if isinstance(before[name], dict):
            changed += [key for key in after[name] if before[name].get(key) != after[name][key]]
        elif before[name] != after[name]:
            changed.append(name)
    return changed
