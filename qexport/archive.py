"""The archive of a bundle: an uncompressed tar of plain files, of which every byte is decided by the files.

Uncompressed, because what is large in a bundle is compressed already or does not compress, and because the bytes
then depend on no version of a compression library: the same files give the same archive on every machine. Tar,
because every Linux unpacks it without anything being installed, and keeps the install script executable.

The format is POSIX ustar (IEEE Std 1003.1-1988) with one header form: names in one folder, mode 0644, 0755 for
`.sh`, owner 0, date 0. An archive of any other form is not taken: what a header could hide is refused with it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from qexport.errors import BundleError
from qexport.files import whole_file

SUFFIX = ".tar"
_BLOCK = 512
_END = bytes(2 * _BLOCK)
_COPY_BYTES = 1 << 20
_MAGIC_AT, _MAGIC = 257, b"ustar\x0000"
# name, mode, uid, gid, size, mtime, checksum, type, link, magic, user, group, major, minor, prefix, padding
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12s")
_PLAIN_FILE = b"0"
_KINDS = {
    b"1": "a hard link",
    b"2": "a link",
    b"3": "a device",
    b"4": "a device",
    b"5": "a folder",
    b"6": "a pipe",
}
_LARGEST_BYTES = 8**11


def write_archive(folder: Path, names: Iterable[str], path: Path) -> Path:
    """Write files of a folder as an archive whose one folder has the name of `folder`; return `path`.

    Args:
        folder: where the files lie.
        names: of the files, with `/`; the archive has them in this order.
        path: of the archive, written whole or not at all.

    Raises:
        BundleError: a name or a file does not fit the format.
        RunFolderError: the archive cannot be written.
    """
    with whole_file(path) as partial, partial.open("wb") as out:
        for name in names:
            size = (folder / name).stat().st_size
            out.write(_header(f"{folder.name}/{name}", size))
            with (folder / name).open("rb") as source:
                while block := source.read(_COPY_BYTES):
                    out.write(block)
            out.write(bytes(-size % _BLOCK))
        out.write(_END)
    return path


def is_archive(path: Path) -> bool:
    """Say whether a file is a tar, or calls itself one."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        start = stream.read(_BLOCK)
    return path.name.endswith(SUFFIX) or start[_MAGIC_AT : _MAGIC_AT + 5] == _MAGIC[:5]


def unpack_archive(path: Path, into: Path) -> Path:
    """Unpack an archive into an empty folder of the caller's, who removes it on an error; return the one in it.

    Raises:
        BundleError: it is cut off, is no archive that `write_archive` writes, or a name in it leads out of it.
    """
    top = ""
    with path.open("rb") as stream:
        while header := _next_header(stream, path):
            name, size = _read_header(header, path)
            own = PurePosixPath(name).parts[0]
            if top not in ("", own):
                raise BundleError(f"{path}: holds two folders, {top} and {own}; a bundle is one. {_UNPACK}")
            top = own
            target = into / name
            if target.exists():
                raise BundleError(f"{path}: holds {name} twice. {_UNPACK}")
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                raise BundleError(f"{path}: {name} lies below a file. {_UNPACK}") from error
            _copy(stream, target, size, path)
        if stream.read(1):
            raise BundleError(f"{path}: something follows the end of the archive. {_UNPACK}")
    if not top:
        raise BundleError(f"{path}: an archive without a file. {_UNPACK}")
    return into / top


_UNPACK = "It is not as `qexport bundle` wrote it: copy it again."


def _header(name: str, size: int) -> bytes:
    """Return the one header that a file has."""
    encoded = name.encode()
    if len(encoded) > 100 or size >= _LARGEST_BYTES:
        raise BundleError(
            f"{name}: {size} bytes under a name of {len(encoded)} bytes; an archive takes files below 8 GiB "
            "under names of at most 100 bytes. Give --out a shorter name."
        )
    mode = 0o755 if name.endswith(".sh") else 0o644
    fields = [
        encoded,
        *(b"%07o\0" % number for number in (mode, 0, 0)),
        *(b"%011o\0" % number for number in (size, 0)),
        b" " * 8,  # what the checksum counts in its own place
        _PLAIN_FILE,
        b"",
        _MAGIC,
        *(b"",) * 6,
    ]
    fields[6] = b"%06o\0 " % sum(_HEADER.pack(*fields))
    return _HEADER.pack(*fields)


def _next_header(stream: BinaryIO, path: Path) -> bytes:
    """Return the next header; nothing where the two blocks of zeros come that end an archive."""
    header = stream.read(_BLOCK)
    if header == bytes(_BLOCK):
        if stream.read(_BLOCK) == bytes(_BLOCK):
            return b""
        raise _cut_off(path)
    if len(header) < _BLOCK:
        raise _cut_off(path)
    if header[_MAGIC_AT : _MAGIC_AT + 5] != _MAGIC[:5]:
        raise BundleError(f"{path}: not an archive that `qexport bundle` wrote. {_UNPACK}")
    return header


def _read_header(header: bytes, path: Path) -> tuple[str, int]:
    """Return name and size of the file that follows."""
    fields = _HEADER.unpack(header)
    name = fields[0].rstrip(b"\0").decode(errors="replace")
    if fields[7] != _PLAIN_FILE:
        kind = _KINDS.get(fields[7], "no plain file")
        raise BundleError(f"{path}: {name} in it is {kind}; a bundle holds plain files alone. {_UNPACK}")
    parts = name.split("/")
    if len(parts) < 2 or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise BundleError(
            f"{path}: the name {name} in it leads out of the bundle, or is none. Do not unpack it: this is no archive "
            "that `qexport bundle` wrote."
        )
    try:
        size = int(fields[4].rstrip(b"\0 "), 8)
    except ValueError:
        size = -1
    if size < 0 or header != _header(name, size):
        raise BundleError(f"{path}: the header of {name} was changed. {_UNPACK}")
    return name, size


def _copy(stream: BinaryIO, target: Path, size: int, path: Path) -> None:
    left = size
    with target.open("wb") as out:
        while left:
            block = stream.read(min(_COPY_BYTES, left))
            if not block:
                raise _cut_off(path)
            out.write(block)
            left -= len(block)
    padding = stream.read(-size % _BLOCK)
    if len(padding) < -size % _BLOCK:
        raise _cut_off(path)
    if padding.strip(b"\0"):
        raise BundleError(f"{path}: something follows {target.name} where nothing should. {_UNPACK}")


def _cut_off(path: Path) -> BundleError:
    return BundleError(f"{path}: the archive is cut off. Copy it again, and compare the sizes.")
