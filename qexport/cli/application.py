"""The commands in one table, and what becomes of an error."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EDQUOT, EFBIG, ENOSPC
from types import FrameType
from typing import Annotated, Any

import typer

import qexport
from qexport.cli.building import build
from qexport.cli.bundling import bundle
from qexport.cli.detecting import detect
from qexport.cli.doctor import doctor
from qexport.cli.mending import mend
from qexport.cli.reporting import report, targets
from qexport.cli.running import demo, inspect, run
from qexport.cli.screen import say
from qexport.cli.sensitivity import sensitivity
from qexport.cli.stages import bench, calibrate, compare, evaluate, export
from qexport.cli.training import qat
from qexport.cli.verifying import verify
from qexport.errors import QexportError

INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""
BROKEN_PIPE = 141
"""128 + SIGPIPE."""
FAULT = 70
"""EX_SOFTWARE of sysexits.h: an error that is qexport's own."""

_GROUPS: tuple[tuple[str, tuple[Callable[..., None], ...]], ...] = (
    ("Whole runs", (run, demo)),
    ("Stage by stage", (inspect, calibrate, export)),
    ("Measure a run", (compare, bench, evaluate)),
    ("Accuracy kept", (sensitivity, mend, qat)),
    ("For a board and on it", (bundle, build, verify, detect)),
    ("Results and this machine", (report, targets, doctor)),
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qexport {qexport.__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave."),
    ] = False,
) -> None:
    """Faster R-CNN in int8 on small computers, with parity and latency proven layer by layer.

    Start with the detector that comes with the package, it needs no data:

      qexport demo --out runs/demo

    Then your own: a Python file with a function that returns it, its weights, and its data set:

      qexport run --model model.py:build --weights weights.pt --data dataset/ --target onnx --out runs/mine

    Exit codes: 0 every gate holds; 1 a measured value is outside what was promised; 2 the input cannot be
    used; 3 software is missing, the message names the command that installs it.
    """


def main() -> None:
    """Run the command that the shell gave, and leave with its exit code."""
    try:
        app(prog_name="qexport")
    except KeyboardInterrupt:  # before the command itself began
        sys.exit(_interrupted())


def _answering(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what a command raises into a message and an exit code."""

    @functools.wraps(command)
    def answered(*args: Any, **options: Any) -> None:
        with _interrupts_noticed() as was_interrupted:
            try:
                command(*args, **options)
                sys.stdout.flush()
            except typer.Exit:
                raise
            except Exception as error:
                raise typer.Exit(_interrupted() if was_interrupted() else _explain(error)) from error
            except KeyboardInterrupt as error:
                raise typer.Exit(_interrupted()) from error

    return answered


@contextmanager
def _interrupts_noticed() -> Iterator[Callable[[], bool]]:
    """Remember Ctrl-C: a C extension that is being imported turns the KeyboardInterrupt into an ImportError."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    # Whoever embeds the command, or runs it beside the main thread, keeps the handler that is there.
    own = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if own:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(seen)
    finally:
        if own:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _explain(error: Exception) -> int:
    """Say what went wrong on the screen; return the exit code."""
    if isinstance(error, QexportError):
        say(f"error: {error}", style="red")
        return error.exit_code
    if isinstance(error, BrokenPipeError):
        # The reader of a pipe has left. Python would complain once more when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT, EFBIG):
        say(
            f"error: {error.filename or 'a temporary file'}: {error.strerror}. Free the disk and give the same "
            "command again: it goes on where it stopped.",
            style="red",
        )
        return QexportError.exit_code
    traceback.print_exception(error)
    say(
        f"error: this is a fault of qexport {qexport.__version__}, not of your input. Please report it with the "
        "text above and the command that you gave.",
        style="red",
    )
    return FAULT


def _interrupted() -> int:
    say("interrupted. The same command goes on where it stopped.")
    return INTERRUPTED


def _make() -> typer.Typer:
    made = typer.Typer(
        name="qexport",
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    made.callback()(_root)
    for panel, commands in _GROUPS:
        for command in commands:
            made.command(command.__name__, rich_help_panel=panel)(_answering(command))
    return made


app = _make()
