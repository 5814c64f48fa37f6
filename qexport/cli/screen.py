"""What goes to the screen: results to standard output, messages and progress to standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

PIPED_WIDTH = 200
"""Columns of a table that goes into a file or a pipe."""


class _Console(Console):
    """A console that leaves a broken pipe to whoever called it."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


def say(text: str, *, style: str = "") -> None:
    """Write a line to standard error, never broken into several."""
    Console(stderr=True).print(Text(text, style=style), soft_wrap=True, highlight=False)


def show(text: str) -> None:
    """Write a line to standard output, never broken into several."""
    _Console().print(Text(text), soft_wrap=True, highlight=False)


def show_table(table: Table) -> None:
    """Write a table to standard output."""
    _Console(width=None if sys.stdout.isatty() else PIPED_WIDTH).print(table)


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar on standard error while a stage runs; nothing where that is no terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=False, disable=not console.is_terminal) as bars:
        task = bars.add_task(title, total=total)
        yield lambda: bars.advance(task)
