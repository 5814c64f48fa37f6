from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest
import tomllib
from hypothesis import given
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet

from qexport.doctor.requirements import Ranges, installed_ranges, parse_requirement, read_ranges
from qexport.errors import QexportError

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]

numbers = st.lists(st.integers(0, 3), min_size=1, max_size=4).map(lambda parts: ".".join(map(str, parts)))
versions = st.tuples(numbers, st.sampled_from(("", "a0", "rc1", ".dev2", "+cu130"))).map("".join)
bounds = st.tuples(st.sampled_from((">=", "<=", "<", "==", "!=")), numbers).map("".join)


def project_ranges() -> Ranges:
    """Return the ranges of pyproject.toml, written as pip writes them into the metadata."""
    lines = list(PROJECT["dependencies"])
    for extra, wanted in PROJECT["optional-dependencies"].items():
        for one in wanted:
            name, _, marker = one.partition(";")
            lines.append(f'{name}; {f"({marker.strip()}) and " if marker else ""}extra == "{extra}"')
    return read_ranges(PROJECT["requires-python"], lines)


@given(version=versions, specifiers=st.lists(bounds, max_size=3))
def test_range_of_any_version_is_judged_as_pip_judges_it(version: str, specifiers: list[str]) -> None:
    text = ",".join(specifiers)
    expected = SpecifierSet(text).contains(version, prereleases=True)
    assert parse_requirement(f"package {text}").fits(version) == expected


@pytest.mark.parametrize(
    ("specifier", "version", "fits"),
    [
        (">=2.14,<2.15", "2.14.1+cu130", True),
        (">=2.5,<2.6", "2.5.0a0+872d972e41.nv24.08", False),
        ("==1.7.1.116", "1.7.1.116", True),
        ("==1.7.*", "1.7.1.116", True),
        ("==1.7.*", "1.8", False),
        ("~=1.4.2", "1.4.9", True),
        ("~=1.4.2", "1.5", False),
    ],
)
def test_range_of_a_release_is_judged_as_its_makers_mean_it(specifier: str, version: str, fits: bool) -> None:
    assert parse_requirement(f"package{specifier}").fits(version) is fits
    assert SpecifierSet(specifier).contains(version, prereleases=True) is fits


def test_requirement_in_old_metadata_is_read() -> None:
    found = parse_requirement("torch (>=2.14.0)")
    assert (found.name, found.range) == ("torch", ">=2.14.0")


def test_requirement_with_markers_holds_on_this_machine_alone() -> None:
    here = f"sys_platform == '{sys.platform}' and platform_machine == '{platform.machine()}'"
    found = parse_requirement(f'Some_Name<2,>=1; ({here}) and extra == "board"')
    assert (found.name, found.range, found.extra, found.applies) == ("some-name", ">=1,<2", "board", True)
    assert not parse_requirement("name; sys_platform == 'plan9'").applies
    assert not parse_requirement("name; python_version < '3.10'").applies


@pytest.mark.parametrize(
    "line", ["name; implementation_name == 'pypy'", "name >> 3", "name; a == 'b' or c == 'd'"]
)
def test_requirement_of_unknown_form_raises_and_names_it(line: str) -> None:
    with pytest.raises(QexportError, match="cannot be read"):
        parse_requirement(line)


def test_ranges_of_pyproject_are_all_read() -> None:
    ranges = project_ranges()
    count = len(PROJECT["dependencies"]) + sum(map(len, PROJECT["optional-dependencies"].values()))
    assert len(ranges.requirements) == count
    assert ranges.python is not None
    assert ranges.python.fits("3.10.12")
    assert not ranges.python.fits("3.8.10")


def test_ranges_of_a_package_with_two_are_both_given() -> None:
    assert {one.extra for one in project_ranges().of("onnxruntime", "onnxruntime-gpu")} >= {
        "onnx",
        "onnx-runtime",
    }


def test_ranges_of_an_extra_hold_what_the_extras_bring_that_it_brings() -> None:
    names = {one.name for one in project_ranges().needed_by("dev")}
    assert {"torch", "onnx", "jinja2", "pytest"} <= names
    assert "qexport" not in names
    assert {one.name for one in project_ranges().needed_by("onnx-runtime")} == {"onnxruntime"}
    assert project_ranges().needed_by("no such extra") == ()


def test_installed_ranges_are_those_of_this_installation() -> None:
    assert {"torch", "onnx"} <= {one.name for one in installed_ranges().requirements}
