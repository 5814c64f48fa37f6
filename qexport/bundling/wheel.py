"""A wheel of the very qexport that runs, made without a build tool and without the network.

It is pure Python, so a wheel is its files and three texts (packaging.python.org/specifications/binary-distribution-
format). In a checkout those come from pyproject.toml, which is what is true there; elsewhere from the installation.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import qexport
from qexport.errors import BundleError
from qexport.files import whole_file

PACKAGE = Path(qexport.__file__).parent
_WHEEL = "Wheel-Version: 1.0\nGenerator: qexport ({version})\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
_METADATA_VERSION = "2.1"
"""What the pip of every board reads."""


@dataclass(frozen=True, slots=True)
class _Contents:
    """What goes into the wheel."""

    files: dict[str, Path]
    """By name in the wheel."""
    metadata: str
    entry_points: str
    license: str


def build_wheel(folder: Path) -> Path:
    """Write `qexport-VERSION-py3-none-any.whl` into a folder; return its path. The same files give the same bytes.

    Raises:
        BundleError: this qexport is neither a checkout nor an installation, or a file of it is missing.
    """
    project = _project(PACKAGE.parent / "pyproject.toml")
    contents = _from_checkout(project) if project is not None else _from_installation()
    stem = f"qexport-{qexport.__version__}"
    info = f"{stem}.dist-info"
    entries = {name: path.read_bytes() for name, path in sorted(contents.files.items())}
    texts = {
        "METADATA": contents.metadata,
        "WHEEL": _WHEEL.format(version=qexport.__version__),
        "entry_points.txt": contents.entry_points,
        "licenses/LICENSE": contents.license,
    }
    entries.update({f"{info}/{name}": text.encode() for name, text in texts.items() if text})
    record = "".join(f"{name},{_digest(data)},{len(data)}\n" for name, data in entries.items())
    entries[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    path = folder / f"{stem}-py3-none-any.whl"
    with whole_file(path) as partial, zipfile.ZipFile(partial, "w") as out:
        for name, data in entries.items():
            entry = zipfile.ZipInfo(name)  # of 1980
            entry.external_attr = 0o100644 << 16
            out.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return path


def _project(path: Path) -> dict[str, Any] | None:
    """Return pyproject.toml where this qexport is a checkout."""
    if sys.version_info < (3, 11) or not path.is_file():
        return None
    import tomllib  # noqa: PLC0415 - of Python 3.11

    found = tomllib.loads(path.read_text(encoding="utf-8"))
    return found if found.get("project", {}).get("name") == "qexport" else None


def _from_checkout(project: dict[str, Any]) -> _Contents:
    about, root = project["project"], PACKAGE.parent
    patterns = ["**/*.py", *project["tool"]["setuptools"]["package-data"]["qexport"]]
    files = {
        path for pattern in patterns for path in PACKAGE.glob(pattern) if "__pycache__" not in path.parts
    }
    lines = [
        f"Metadata-Version: {_METADATA_VERSION}",
        "Name: qexport",
        f"Version: {qexport.__version__}",
        f"Summary: {about['description']}",
        f"License: {about['license']}",
        f"Requires-Python: {about['requires-python']}",
        *(f"Requires-Dist: {requirement}" for requirement in about["dependencies"]),
    ]
    for extra, requirements in about["optional-dependencies"].items():
        lines.append(f"Provides-Extra: {extra}")
        lines += [f"Requires-Dist: {_with_extra(requirement, extra)}" for requirement in requirements]
    scripts = "".join(f"{name} = {target}\n" for name, target in about["scripts"].items())
    license_text = root / "LICENSE"
    return _Contents(
        files={path.relative_to(root).as_posix(): path for path in files},
        metadata="\n".join(lines) + "\n",
        entry_points=f"[console_scripts]\n{scripts}",
        license=license_text.read_text(encoding="utf-8") if license_text.is_file() else "",
    )


def _from_installation() -> _Contents:
    try:
        found = importlib.metadata.distribution("qexport")
    except importlib.metadata.PackageNotFoundError as error:
        raise BundleError(
            f"{PACKAGE}: this qexport was neither installed nor is it a checkout with its pyproject.toml, so no wheel "
            "of it can be made for the board. Install it: pip install qexport"
        ) from error
    if found.version != qexport.__version__:
        raise BundleError(
            f"{PACKAGE}: qexport {qexport.__version__} runs, {found.version} is installed. Install the one that runs."
        )
    listed = [file for file in found.files or () if file.parts[0] == "qexport" and file.suffix != ".pyc"]
    files = {file.as_posix(): Path(str(found.locate_file(file))) for file in listed}
    _require(files.values())
    return _Contents(
        files=files,
        metadata=found.read_text("METADATA") or "",
        entry_points=found.read_text("entry_points.txt") or "",
        license=found.read_text("licenses/LICENSE") or found.read_text("LICENSE") or "",
    )


def _require(files: Iterable[Path]) -> None:
    """Refuse an installation that is not whole."""
    missing = [path for path in files if not path.is_file()]
    if missing or not files:
        raise BundleError(
            f"{missing[0] if missing else PACKAGE}: missing in the installation of qexport, so no wheel of it can be "
            "made for the board. Install it again: pip install --force-reinstall qexport"
        )


def _with_extra(requirement: str, extra: str) -> str:
    """Return a requirement that holds only where an extra is asked for."""
    name, _, marker = (part.strip() for part in requirement.partition(";"))
    return f"{name} ; ({marker}) and extra == '{extra}'" if marker else f"{name} ; extra == '{extra}'"


def _digest(data: bytes) -> str:
    """Return a file's digest as RECORD has it."""
    found = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=")
    return f"sha256={found.decode()}"
