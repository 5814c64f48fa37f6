"""The wheel in a bundle: what pip builds of this checkout, without pip."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import qexport
from qexport.bundling import wheel as wheels
from qexport.bundling.wheel import build_wheel
from qexport.errors import BundleError

ROOT = Path(__file__).parents[1]
INFO = f"qexport-{qexport.__version__}.dist-info"
needs_checkout = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="this is no checkout")


def requirements(metadata: str) -> set[str]:
    """Return Requires-Dist with the specifiers of each in one order, as pip is free to write them."""
    found = set()
    for line in Parser().parsestr(metadata).get_all("Requires-Dist") or ():
        name, _, marker = line.partition(";")
        matched = re.match(r"([A-Za-z0-9_.-]+)(?:\[([^]]*)\])?", name.strip())
        assert matched is not None
        extras = sorted((matched[2] or "").split(","))
        specifiers = ",".join(sorted(part.strip() for part in name.strip()[matched.end() :].split(",")))
        marks = re.sub(r"[()\s]", "", marker.replace("'", '"'))
        found.add(f"{matched[1].lower().replace('_', '-')}{extras}{specifiers};{marks}")
    return found


def test_wheel_twice_has_the_same_bytes(tmp_path: Path) -> None:
    first, second = (build_wheel(tmp_path / name) for name in ("one", "two"))
    assert first.name == f"qexport-{qexport.__version__}-py3-none-any.whl"
    assert first.read_bytes() == second.read_bytes()


def test_record_of_the_wheel_has_the_digest_of_every_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(build_wheel(tmp_path)) as wheel:
        lines = [line.split(",") for line in wheel.read(f"{INFO}/RECORD").decode().splitlines()]
        assert sorted(name for name, _, _ in lines) == sorted(wheel.namelist())
        for name, digest, size in lines[:-1]:
            data = wheel.read(name)
            own = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            assert (digest, size) == (f"sha256={own}", str(len(data)))


@needs_checkout
def test_wheel_is_what_pip_builds_of_the_checkout(tmp_path: Path) -> None:
    pytest.importorskip(
        "setuptools", minversion="77", reason="setuptools 77 is not installed: pip builds nothing here"
    )
    source = tmp_path / "source"
    copy = ["pyproject.toml", "README.md", "LICENSE", "qexport"]
    source.mkdir()
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in copy), str(source)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(tmp_path / "pip"), str(source)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with (
        zipfile.ZipFile(next((tmp_path / "pip").glob("*.whl"))) as theirs,
        zipfile.ZipFile(build_wheel(tmp_path)) as ours,
    ):
        files = {name for name in theirs.namelist() if name.startswith("qexport/")}
        assert {name for name in ours.namelist() if name.startswith("qexport/")} == files
        assert "qexport/bundling/install.sh" in files
        assert [name for name in sorted(files) if theirs.read(name) != ours.read(name)] == []
        info = f"{INFO}/METADATA"
        assert requirements(ours.read(info).decode()) == requirements(theirs.read(info).decode())
        own, their = (Parser().parsestr(wheel.read(info).decode()) for wheel in (ours, theirs))
        for field in ("Name", "Version", "Requires-Python", "Summary"):
            if field == "Requires-Python":
                assert set(own[field].split(",")) == set(their[field].split(","))
            else:
                assert own[field] == their[field]
        assert set(own.get_all("Provides-Extra")) == set(their.get_all("Provides-Extra"))
        entry = f"{INFO}/entry_points.txt"
        assert ours.read(entry).split() == theirs.read(entry).split()


def test_wheel_of_neither_checkout_nor_installation_is_refused(tmp_path: Path) -> None:
    """A folder of the package alone, as somebody may have copied it."""
    code = f"""
import importlib.metadata, sys
sys.path.insert(0, {str(tmp_path)!r})
real = importlib.metadata.distribution
def none(name):
    if name == "qexport":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.distribution = none
import qexport
assert qexport.__file__.startswith({str(tmp_path)!r}), qexport.__file__
from pathlib import Path
from qexport.bundling.wheel import build_wheel
from qexport.errors import BundleError
try:
    build_wheel(Path({str(tmp_path)!r}))
except BundleError as error:
    print(error)
"""
    subprocess.run(["cp", "-r", str(wheels.PACKAGE), str(tmp_path)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert "pip install qexport" in done.stdout, done.stderr
    assert list(tmp_path.glob("*.whl")) == []


def test_wheel_of_an_installation_with_a_lost_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"lost\.py: missing in the installation"):
        wheels._require([wheels.PACKAGE / "__init__.py", tmp_path / "lost.py"])
