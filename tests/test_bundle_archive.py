"""The archive of a bundle: other tools read it, and what no tool of ours wrote is refused."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from qexport.archive import is_archive, unpack_archive, write_archive
from qexport.errors import BundleError

BLOCK = 512
FILES = {
    "bundle.json": b"{}",
    "install.sh": b"#!/bin/sh\n",
    "golden/0/sites.npz": bytes(range(256)) * 5,
    "empty": b"",
}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    folder = tmp_path / "b.qbundle"
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return write_archive(folder, FILES, tmp_path / "b.qbundle.tar")


def unpack(path: Path) -> Path:
    into = path.parent / "into"
    into.mkdir()
    return unpack_archive(path, into)


def refused(path: Path, said: str) -> None:
    outside = set(path.parent.rglob("*"))
    with pytest.raises(BundleError, match=said):
        unpack(path)
    new = {found for found in path.parent.rglob("*") if not found.is_relative_to(path.parent / "into")}
    assert new == outside  # nothing was written anywhere else


def test_archive_unpacks_to_the_files_that_it_was_made_of(archive: Path) -> None:
    folder = unpack(archive)
    assert folder.name == "b.qbundle"
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES


def test_archive_is_read_by_pythons_tarfile_with_modes_and_no_dates(archive: Path) -> None:
    with tarfile.open(archive) as opened:
        members = opened.getmembers()
        assert [member.name for member in members] == [f"b.qbundle/{name}" for name in FILES]
        assert [member.mode for member in members] == [0o644, 0o755, 0o644, 0o644]
        assert {(member.mtime, member.uid, member.gid) for member in members} == {(0, 0, 0)}
        found = opened.extractfile("b.qbundle/golden/0/sites.npz")
        assert found is not None
        assert found.read() == FILES["golden/0/sites.npz"]


def test_archive_cut_off_anywhere_is_refused(archive: Path) -> None:
    data = archive.read_bytes()
    for length in (
        0,
        100,
        BLOCK,
        BLOCK + 1,
        BLOCK + 100,
        len(data) - 1,
        len(data) - BLOCK,
        len(data) - 3 * BLOCK,
    ):
        cut = archive.with_name(f"cut-{length}.tar")
        cut.write_bytes(data[:length])
        (archive.parent / f"into-{length}").mkdir()
        with pytest.raises(BundleError, match="cut off"):
            unpack_archive(cut, archive.parent / f"into-{length}")


def test_archive_with_one_bit_of_any_header_or_padding_changed_is_refused(archive: Path) -> None:
    data = archive.read_bytes()
    content = {range(BLOCK, BLOCK + 2), range(3 * BLOCK, 3 * BLOCK + 10), range(5 * BLOCK, 5 * BLOCK + 1280)}
    taken = 0
    for at in range(0, len(data), 13):
        if any(at in span for span in content):
            continue
        changed = bytearray(data)
        changed[at] ^= 1
        archive.write_bytes(changed)
        into = archive.parent / f"into-{at}"
        into.mkdir()
        with pytest.raises(BundleError):
            unpack_archive(archive, into)
        taken += 1
    assert taken > 100


def test_archive_with_something_behind_its_end_is_refused(archive: Path) -> None:
    archive.write_bytes(archive.read_bytes() + b"\0")
    refused(archive, "follows the end")


def other_tar(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as out:
        for member, data in members:
            member.size = len(data)
            out.addfile(member, io.BytesIO(data))
    return path


def plain(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


@pytest.mark.parametrize(
    ("member", "said"),
    [
        (plain("../escaped"), r"\.\./escaped .* leads out"),
        (plain("b/../../escaped"), "leads out"),
        (plain("/tmp/escaped"), "leads out"),
        (plain("b//escaped"), "leads out"),
        (plain("alone"), "leads out of the bundle, or is none"),
        (plain("b/link", tarfile.SYMTYPE, "/etc/passwd"), "a link; a bundle holds plain files"),
        (plain("b/hard", tarfile.LNKTYPE, "b/other"), "a hard link"),
        (plain("b/folder", tarfile.DIRTYPE), "a folder"),
        (plain("b/pipe", tarfile.FIFOTYPE), "a pipe"),
        (plain("b/device", tarfile.CHRTYPE), "a device"),
    ],
)
def test_member_that_is_no_plain_file_of_the_bundle_is_refused(
    member: tarfile.TarInfo, said: str, tmp_path: Path
) -> None:
    refused(other_tar(tmp_path / "other.tar", (member, b"")), said)
    assert not (tmp_path / "escaped").exists()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("b/x", "b/x"), "holds b/x twice"),
        (("b/x", "c/x"), "two folders, b and c"),
        (("b/x", "b/x/y"), "below a file"),
        ((), "without a file"),
    ],
)
def test_archive_of_an_odd_tree_is_refused(names: tuple[str, ...], said: str, tmp_path: Path) -> None:
    blocks = b""
    for number, name in enumerate(names):
        top, _, inner = name.partition("/")
        file = tmp_path / str(number) / name
        file.parent.mkdir(parents=True)
        file.write_bytes(b"1")
        made = write_archive(tmp_path / str(number) / top, [inner], tmp_path / "one.tar")
        blocks += made.read_bytes()[: -2 * BLOCK]
    path = tmp_path / "odd.tar"
    path.write_bytes(blocks + bytes(2 * BLOCK))
    refused(path, said)


@pytest.mark.parametrize("mode", ["w:gz", "w"])
def test_archive_that_somebody_packed_himself_is_refused(mode: str, archive: Path) -> None:
    path = archive.with_name("own.tar")
    with tarfile.open(path, mode) as out:  # type: ignore[call-overload]
        out.add(archive.parent / "b.qbundle", "b.qbundle")
    refused(path, "wrote|folder")


def test_is_archive_goes_by_content_and_by_name(archive: Path, tmp_path: Path) -> None:
    other = archive.rename(tmp_path / "b.qbundle.download")
    (tmp_path / "broken.tar").write_bytes(b"")
    (tmp_path / "note").write_bytes(b"")
    assert [is_archive(path) for path in (other, tmp_path / "broken.tar", tmp_path / "note", tmp_path)] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("name", ["x" * 120, "ü" * 60])
def test_name_that_does_not_fit_the_format_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(BundleError, match="at most 100 bytes"):
        write_archive(tmp_path, [name], tmp_path / "long.tar")
    assert not (tmp_path / "long.tar").exists()
