"""The frame of every plot: SVG text that stands inside the page.

Colours are placeholders that become CSS variables of the page, so a plot follows the light and the dark
theme; identifiers are derived from the plot's name, so the bytes are the same from run to run and two
plots never share one.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qexport.errors import TargetUnavailable
from qexport.layers import STAGES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID, SURFACE, BAD = "#010101", "#010102", "#010103", "#010104", "#010105"
STAGE_COLOURS = {stage: f"#0102{number:02x}" for number, stage in enumerate(STAGES, start=1)}
SERIES = tuple(f"#0103{number:02x}" for number in range(1, 7))
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--line",
    SURFACE: "--surface",
    BAD: "--bad",
    **{colour: f"--stage-{stage.replace('_', '-')}" for stage, colour in STAGE_COLOURS.items()},
    **{colour: f"--series-{number}" for number, colour in enumerate(SERIES, start=1)},
}
_STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "text.parse_math": False,  # a class called "$x$" is a name, not mathematics
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",
    "axes.unicode_minus": True,
}


@contextmanager
def drawn_figure(name: str, *, width: float, height: float) -> Iterator[tuple[Figure, list[str]]]:
    """Yield a figure (inches) and a list; when the block ends, the list's one item is the figure's SVG."""
    try:
        from matplotlib import style  # noqa: PLC0415 - only a report needs matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise TargetUnavailable(
            "the report's plots need matplotlib, which is not installed: pip install 'qexport[report]'"
        ) from error
    result: list[str] = []
    with style.context(["default", {**_STYLE, "svg.hashsalt": name}]), warnings.catch_warnings():
        # The browser draws the text with its own fonts, so a letter that matplotlib's font lacks is no fault.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_alpha(0)
        FigureCanvasSVG(figure)
        yield figure, result
        for axes in figure.axes:
            axes.patch.set_alpha(0)
        stream = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", metadata=nothing)
        result.append(_inline(stream.getvalue(), name))


def _inline(svg: str, name: str) -> str:
    """Return the `<svg>` element alone, with CSS variables for colours and identifiers of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg [^>]*?)\s+width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)\s+height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg ", '<svg role="img" ', 1)
    svg = re.sub(r"<[^>]+>", lambda tag: _own_names(tag.group(), name), svg)
    return svg.rstrip()


def _own_names(tag: str, name: str) -> str:
    """Return one tag with its colours and identifiers renamed; text between tags is left as it is."""
    tag = re.sub(r'\bid="', f'id="{name}-', tag)
    tag = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", tag)
    return re.sub(r"#01010[1-5]|#0102\d\d|#0103\d\d", lambda found: f"var({_VARIABLES[found.group()]})", tag)
