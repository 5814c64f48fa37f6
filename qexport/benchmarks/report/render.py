"""Templates to one HTML page that needs nothing else: style, script, plots and images stand inside it."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import TYPE_CHECKING

from qexport.benchmarks.report import formats
from qexport.benchmarks.report.tables import differing_per_million
from qexport.benchmarks.report.verdict import describe_gate
from qexport.errors import TargetUnavailable
from qexport.target import latency_note

if TYPE_CHECKING:
    from jinja2 import Environment

_PACKAGE = "qexport.benchmarks.report"
_TIMINGS = re.compile(r"<!-- timings -->.*?<!-- /timings -->", re.DOTALL)


def strip_timings(html: str) -> str:
    """Return a report without what was measured in time: equal for two runs of one command.

    Args:
        html: a `report.html` or `experiments.html`, whole.
    """
    return _TIMINGS.sub("", html)


def render(template: str, values: dict[str, object]) -> str:
    """Return a page made from one of the package's templates.

    Args:
        template: file name in `templates/`.
        values: what the template shows; everything but the plots is escaped.

    Raises:
        TargetUnavailable: jinja2 is not installed.
    """
    page = _environment().get_template(template).render(values)
    return "\n".join(line.rstrip() for line in page.splitlines() if line.strip()) + "\n"


def _environment() -> Environment:
    try:
        import jinja2  # noqa: PLC0415 - only a report needs jinja2
        from markupsafe import Markup  # noqa: PLC0415
    except ImportError as error:
        raise TargetUnavailable(
            "the report needs jinja2, which is not installed: pip install 'qexport[report]'"
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(_PACKAGE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (
        formats.decimals,
        formats.signed,
        formats.count,
        formats.points,
        formats.percent,
        formats.megabytes,
        formats.giga,
        formats.shape,
        formats.speed,
        formats.smaller,
        formats.words,
        differing_per_million,
        describe_gate,
    ):
        environment.filters[function.__name__] = function
    environment.filters["latency_note"] = lambda profile: latency_note(profile.target, profile.machine.system)
    environment.filters["breakable"] = lambda path: Markup(".<wbr>").join(path.split("."))
    # Our own files and matplotlib's SVG, whose text matplotlib has escaped.
    environment.filters["svg"] = Markup
    environment.globals["style"] = Markup(_asset("report.css"))
    environment.globals["script"] = Markup(_asset("report.js"))
    return environment


def _asset(name: str) -> str:
    return files(_PACKAGE).joinpath(name).read_text(encoding="utf-8")
