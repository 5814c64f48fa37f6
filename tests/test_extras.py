"""Every extra that the project names is one that it has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tomllib

from qexport.target import TARGETS

ROOT = Path(__file__).resolve().parents[1]
NAMED = re.compile(r"(?:qexport|\.whl|\$wheel)\[([a-z][a-z, -]+)\]")

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="this is no checkout")


def extras() -> set[str]:
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


@pytest.mark.parametrize(
    "folder", ["pyproject.toml", "README.md", "docs", "deploy", "qexport", "tools", "Makefile"]
)
def test_extras_named_in_the_project_exist(folder: str) -> None:
    start = ROOT / folder
    files = (
        [start]
        if start.is_file()
        else [path for path in start.rglob("*") if path.suffix in {".py", ".md", ".sh"}]
    )
    assert files
    for path in files:
        named = {name.strip() for group in NAMED.findall(path.read_text()) for name in group.split(",")}
        assert named <= extras(), f"{path.relative_to(ROOT)} names {sorted(named - extras())}"


def test_extras_of_targets_exist() -> None:
    named = {name for target in TARGETS for extra in target.extra.values() for name in extra.split(",")}
    assert named <= extras()
