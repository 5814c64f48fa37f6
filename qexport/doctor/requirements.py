"""The versions that qexport was tested with, read from the metadata of its own installation.

The ranges stand in `pyproject.toml` and nowhere else; pip puts them into the metadata. The reader knows the part of
PEP 440 and PEP 508 that such ranges use, so that a board needs no further package.
"""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata

from qexport.errors import QexportError

PACKAGE = "qexport"
_REQUIREMENT = re.compile(
    r"\s*(?P<name>[\w.-]+)\s*(\[(?P<extras>[^\]]*)\])?\s*\(?(?P<specifiers>[^;()]*)\)?\s*(;(?P<marker>.*))?"
)
_SPECIFIER = re.compile(r"\s*(?P<operator>~=|===?|!=|<=|>=|<|>)\s*(?P<version>[^\s,]+)\s*")
_TERM = re.compile(r"\(*\s*(\w+)\s*(==|!=|<=|>=|<|>)\s*(['\"])(.*?)\3\s*\)*")
_VERSION = re.compile(r"v?(?:\d+!)?(?P<release>\d+(?:\.\d+)*)(?P<rest>[^+]*)")
_PRE_RELEASE = re.compile(r"[._-]?(a|b|c|rc|alpha|beta|pre|preview|dev)[._-]?\d*", re.IGNORECASE)
# Lower bounds first, as one reads a range.
_ORDER = ("==", "===", "~=", ">=", ">", "<", "<=", "!=")


@dataclass(frozen=True, slots=True)
class Requirement:
    """One line of `Requires-Dist`."""

    name: str
    """As pip compares names: lower case, hyphens."""
    brings: tuple[str, ...]
    """Extras that are asked of that package."""
    specifiers: tuple[tuple[str, str], ...]
    """Pairs of operator and version."""
    extra: str
    """The extra of the package that has this line; empty for the base."""
    applies: bool
    """Whether its other conditions hold on this machine."""

    @property
    def range(self) -> str:
        """The specifiers as text, `>=2.14,<2.15`."""
        ordered = sorted(self.specifiers, key=lambda pair: _ORDER.index(pair[0]))
        return ",".join(operator + version for operator, version in ordered)

    def fits(self, version: str) -> bool:
        """Say whether a version lies in the range."""
        return all(_holds(version, operator, bound) for operator, bound in self.specifiers)


@dataclass(frozen=True, slots=True)
class Ranges:
    """What the installed qexport asks for."""

    python: Requirement | None
    """The range of Python; None where qexport was not installed, only copied."""
    requirements: tuple[Requirement, ...]

    def of(self, *distributions: str) -> tuple[Requirement, ...]:
        """Return what is asked of a package that may go by several names, one for each range."""
        names = {normalise(name) for name in distributions}
        found = [one for one in self.requirements if one.name in names and one.specifiers]
        return tuple({one.specifiers: one for one in reversed(found)}.values())[::-1]

    def needed_by(self, extra: str) -> tuple[Requirement, ...]:
        """Return what an extra installs, and what the extras install that it brings."""
        found: list[Requirement] = []
        waiting, seen = [extra], {""}
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            for one in self.requirements:
                if one.extra == name:
                    found.append(one)
                    waiting.extend(one.brings if one.name == PACKAGE else ())
        return tuple(one for one in found if one.name != PACKAGE)


def installed_ranges() -> Ranges:
    """Return the ranges in the metadata of this installation; none where qexport is not installed."""
    try:
        found = metadata(PACKAGE)
    except PackageNotFoundError:
        return Ranges(None, ())
    python = found.get_all("Requires-Python") or [None]
    return read_ranges(python[0], found.get_all("Requires-Dist") or ())


def read_ranges(python: str | None, lines: Iterable[str]) -> Ranges:
    """Read `Requires-Python` and the lines of `Requires-Dist`."""
    return Ranges(
        parse_requirement(f"python {python}") if python else None,
        tuple(parse_requirement(line) for line in lines),
    )


def parse_requirement(line: str) -> Requirement:
    """Read one requirement, `torch<2.15,>=2.14; extra == "torch"`.

    Raises:
        QexportError: it has a form that is not read here.
    """
    match = _REQUIREMENT.fullmatch(line)
    if match is None:
        raise QexportError(f"the requirement {line!r} in the metadata of {PACKAGE} cannot be read")
    extra, applies = _read_marker(match["marker"] or "", line)
    return Requirement(
        name=normalise(match["name"]),
        brings=tuple(name.strip() for name in (match["extras"] or "").split(",") if name.strip()),
        specifiers=_specifiers(match["specifiers"], line),
        extra=extra,
        applies=applies,
    )


def normalise(name: str) -> str:
    """Return a package's name as pip compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def numbers(version: str) -> tuple[int, ...]:
    """Return the release numbers of a version, (2, 14, 1) of `2.14.1+cu130`; empty where it has none."""
    match = _VERSION.match(version)
    return tuple(int(part) for part in match["release"].split(".")) if match else ()


def _specifiers(text: str, line: str) -> tuple[tuple[str, str], ...]:
    parts = [part for part in text.split(",") if part.strip()]
    matches = [_SPECIFIER.fullmatch(part) for part in parts]
    if None in matches:
        raise QexportError(f"the range of {line!r} in the metadata of {PACKAGE} cannot be read")
    return tuple((match["operator"], match["version"]) for match in matches if match)


def _read_marker(marker: str, line: str) -> tuple[str, bool]:
    """Return the extra that a marker names, and whether its other terms hold here. Terms are joined by `and`."""
    values = {
        "sys_platform": sys.platform,
        "platform_system": platform.system(),
        "platform_machine": platform.machine(),
        "python_version": ".".join(platform.python_version_tuple()[:2]),
    }
    extra, applies = "", True
    for term in re.split(r"\band\b", marker) if marker.strip() else ():
        match = _TERM.fullmatch(term.strip())
        if match is None or (match[1] != "extra" and match[1] not in values):
            raise QexportError(f"the condition of {line!r} in the metadata of {PACKAGE} cannot be read")
        name, operator, wanted = match[1], match[2], match[4]
        if name == "extra":
            extra = wanted
        elif name == "python_version":
            applies &= _holds(values[name], operator, wanted)
        else:
            applies &= (values[name] == wanted) == (operator == "==")
    return extra, applies


def _holds(version: str, operator: str, bound: str) -> bool:
    """Compare as PEP 440 does, without epochs and post-releases: 2.14.0a0 is not >=2.14, and not <2.14 either."""
    release, wanted = _strip(numbers(version)), _strip(numbers(bound))
    final = not _is_pre(version)
    at_least = release > wanted or (release == wanted and (final or _is_pre(bound)))
    same = release == wanted and final == (not _is_pre(bound))
    if bound.endswith(".*"):
        prefix = numbers(bound)
        padded = numbers(version) + (0,) * len(prefix)
        same = padded[: len(prefix)] == prefix
    if operator == "~=":
        # The last number may grow, the others are fixed.
        fixed = numbers(bound)[:-1]
        padded = numbers(version) + (0,) * len(fixed)
        return at_least and padded[: len(fixed)] == fixed
    return {
        "==": same,
        "===": version == bound,
        "!=": not same,
        ">=": at_least,
        ">": release > wanted,
        "<": release < wanted,
        "<=": release < wanted or same or (release == wanted and not final),
    }[operator]


def _strip(release: tuple[int, ...]) -> tuple[int, ...]:
    while release and release[-1] == 0:
        release = release[:-1]
    return release


def _is_pre(version: str) -> bool:
    match = _VERSION.match(version)
    return bool(match and _PRE_RELEASE.match(match["rest"]))
