"""Installed packages and their versions, without importing them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec


def is_importable(module: str) -> bool:
    """Say whether a package can be imported, without importing it.

    A folder of the name that holds no package is none: a run's own `tensorrt` or `onnx` in the current folder.
    """
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:  # the package that a dotted name lies in is not there
        return False
    return spec is not None and spec.origin is not None


def package_versions(*names: str) -> dict[str, str]:
    """Return the version of each package that is installed."""
    found = {name: _version(name) for name in names}
    return {name: number for name, number in found.items() if number}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
