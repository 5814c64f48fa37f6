"""qexport's own: `encodings.json` of a run, and the checkpoint that `qexport qat` writes.

The checkpoint is a torch file: {"format": "qexport qat 1", "state": state dict, "encodings": JSON as text or bytes}.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import msgspec

from qexport import mend_results, training_history
from qexport.calibration.checkpoints.content import Content
from qexport.calibration.checkpoints.format import Detector, Format
from qexport.calibration.checkpoints.ranges import QatCheckpoint, QatRange
from qexport.encodings import EncodingRow, Encodings, check_encodings, load_encodings
from qexport.errors import CheckpointError

TRAINED = "qexport qat 1"
"""What `format` holds in a checkpoint of `qexport qat`."""
_OUTPUT = "output:"
_T = TypeVar("_T")


def _is_table(content: Content) -> bool:
    return content.is_json and "rows_sha256" in content.document


def _is_trained(content: Content) -> bool:
    return not content.is_json and str(content.document.get("format", "")).startswith("qexport qat")


def _read_table(content: Content, detector: Detector, prepare: str | None) -> QatCheckpoint:
    del prepare
    return _checkpoint(TABLE.name, content, detector, load_encodings(content.path))


def _read_trained(content: Content, detector: Detector, prepare: str | None) -> QatCheckpoint:
    del prepare
    document = content.document
    if document["format"] != TRAINED:
        raise CheckpointError(
            f"{content.path}: a checkpoint of format {document['format']!r}, this qexport reads {TRAINED!r}. "
            "Use the version of qexport that wrote it."
        )
    table = document.get("encodings")
    if not isinstance(table, (str, bytes)):
        raise CheckpointError(
            f"{content.path}: a checkpoint of `qexport qat` without its encodings. Copy it again."
        )
    try:
        encodings = check_encodings(msgspec.json.decode(table, type=Encodings), str(content.path))
    except msgspec.DecodeError as error:
        raise CheckpointError(
            f"{content.path}: its encodings are damaged: {error}. Copy it again."
        ) from error
    read = _checkpoint(CHECKPOINT.name, content, detector, encodings)
    return dataclasses.replace(
        read,
        history=_note(content, training_history.NOTE, training_history.History),
        mended=_note(content, mend_results.NOTE, mend_results.MendReport),
    )


def _note(content: Content, name: str, kind: type[_T]) -> _T | None:
    """Return what the checkpoint's notes hold under a name; None where that is nothing."""
    notes = content.document.get("notes")
    text = notes.get(name) if isinstance(notes, dict) else None
    if not isinstance(text, str):
        return None
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.DecodeError as error:
        raise CheckpointError(
            f"{content.path}: its note {name} is damaged: {error}. Copy it again."
        ) from error


def _checkpoint(name: str, content: Content, detector: Detector, encodings: Encodings) -> QatCheckpoint:
    return QatCheckpoint(
        name,
        content.path,
        content.state or None,
        tuple(_range(row) for row in encodings.rows),
        detector.norms,
        detector.modules,
        detector_sha256=encodings.detector_sha256,
        keep_float=encodings.keep_float,
    )


def _range(row: EncodingRow) -> QatRange:
    params = row.params
    return QatRange(
        path=row.path,
        port="weight" if row.port == "weight" else "output",
        scale=params.scale,
        buffer=f"{row.key} ({row.source})",
        call=None if row.port == "weight" else row.call,
        op=row.port.removeprefix(_OUTPUT) if row.port != "weight" else "",
        qmin=params.qmin,
        qmax=params.qmax,
        axis=params.axis,
        includes_norm=True,
    )


TABLE = Format(
    "qexport encodings",
    "encodings.json of a run",
    _is_table,
    _read_table,
    takes_prepare=False,
    has_weights=False,
)
CHECKPOINT = Format(
    "qexport QAT",
    f'a checkpoint of `qexport qat`, {{"format": "{TRAINED}"}}',
    _is_trained,
    _read_trained,
    takes_prepare=False,
)
