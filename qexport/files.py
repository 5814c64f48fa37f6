"""Files are written whole or not at all, and read back with errors that name them."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from qexport.errors import QexportError, RunFolderError

_T = TypeVar("_T")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it into place when the block ends without an error.

    Raises:
        RunFolderError: the folder cannot be written, or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
    except OSError as error:
        raise RunFolderError(_cannot_write(path, error)) from error
    partial = Path(name)
    try:
        yield partial
        with partial.open("rb+") as stream:
            os.fsync(stream.fileno())
        partial.chmod(0o644)
        partial.replace(path)
    except OSError as error:
        raise RunFolderError(_cannot_write(path, error)) from error
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> Path:
    """Write `data` to `path`, whole or not at all; return `path`."""
    with whole_file(path) as partial:
        partial.write_bytes(data)
    return path


def write_json(path: Path, value: object) -> Path:
    """Write a msgspec-encodable value as indented JSON with a stable order; return `path`."""
    return write_bytes(path, json_bytes(value))


def json_bytes(value: object) -> bytes:
    """Return the one JSON form that this project writes: indented by two, newline at the end."""
    return msgspec.json.format(msgspec.json.encode(value, order="deterministic"), indent=2) + b"\n"


def read_json(path: Path, kind: type[_T], error: type[QexportError]) -> _T:
    """Read `path` as JSON of type `kind`.

    Raises:
        error: the file is missing, is not JSON, or does not have the fields of `kind`.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError as cause:
        raise error(f"{path}: no such file") from cause
    except OSError as cause:
        raise error(f"{path}: cannot be read: {cause.strerror}") from cause
    except msgspec.ValidationError as cause:
        raise error(f"{path}: not a {kind.__name__} file of this version of qexport: {cause}") from cause
    except msgspec.DecodeError as cause:
        raise error(f"{path}: not valid JSON: {cause}") from cause


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: object) -> str:
    """Return the SHA-256 of a value's JSON form, in hex."""
    return hashlib.sha256(json_bytes(value)).hexdigest()


def _cannot_write(path: Path, error: OSError) -> str:
    reason = error.strerror or error
    return f"{path}: cannot be written: {reason}. Free the disk or choose another folder with --out."
