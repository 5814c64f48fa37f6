"""The command line: it parses, calls one function of the pipeline, and sets the exit code."""

from __future__ import annotations

from qexport.cli.application import app, main

__all__ = ["app", "main"]
