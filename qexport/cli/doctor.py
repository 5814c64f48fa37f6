"""`doctor`: what is installed here, what fits together, and what to install."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from qexport.cli import screen
from qexport.errors import TargetUnavailable

if TYPE_CHECKING:
    from qexport.doctor.findings import AbilityFinding, ArtifactFinding, Diagnosis, Finding, TargetFinding

_COLOURS = {"ok": "green", "missing": "yellow", "incompatible": "bold red", "not applicable": "dim"}


def doctor(
    artifact: Annotated[
        Path | None,
        typer.Argument(
            metavar="ARTIFACT",
            show_default=False,
            help="Folder that `qexport export` wrote: would it run here, would its engines load?",
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            metavar="NAME",
            show_default=False,
            help="Can `qexport run` lower to this target here? May be given several times.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")] = False,
) -> None:
    """Show what is installed here, what of it fits together, and what to install.

    Nothing is changed. TensorRT is asked in a process of its own.

    What is on this machine, a workstation or a board:

      qexport doctor

    Would this artifact run here? An engine that was built for another GPU or by
    another TensorRT does not load: the command that builds it here is named.

      qexport doctor runs/mine/tensorrt

    Is everything there to export and measure a target? Scripts look at the exit code:

      qexport doctor --target onnx --json

    Exit codes: 0 all that was asked for is there; 2 no such target or artifact;
    3 something is missing or incompatible. Where nothing was asked for, 3 only
    if something that is installed does not fit the rest.
    """
    from qexport.doctor import examine  # noqa: PLC0415 - `--help` needs none of it
    from qexport.files import json_bytes  # noqa: PLC0415

    found = examine(artifact, target or ())
    if json:
        sys.stdout.write(json_bytes(found).decode())
    else:
        _show(found)
    if not found.ok:
        raise TargetUnavailable("\n".join(found.problems))


def _show(found: Diagnosis) -> None:
    screen.show_table(_finding_table(found.findings))
    for line in _to_do(found.findings):
        screen.show(line)
    screen.show("")
    for target in found.targets:
        for line in _target_lines(target):
            screen.show(line)
    if found.artifact is not None:
        screen.show("")
        for line in _artifact_lines(found.artifact):
            screen.show(line)


def _finding_table(findings: tuple[Finding, ...]) -> Table:
    """Return a row for each finding, under the name of its group."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "found", "compatible", "state"):
        table.add_column(column, overflow="fold", no_wrap=column == "state")
    group = ""
    for one in findings:
        if one.group != group:
            group = one.group
            table.add_row(Text(group, style="bold"))
        table.add_row(
            Text(f"  {one.name}"),
            Text(one.found or "not found"),
            Text(one.compatible or "-"),
            Text(one.state, style=_COLOURS[one.state]),
        )
    return table


def _to_do(findings: tuple[Finding, ...]) -> list[str]:
    """Return a line for each thing that can be done; unbroken, for its command is copied."""
    names: dict[str, list[str]] = {}
    for one in findings:
        if one.advice:
            label = one.name if one.group in ("PyTorch", "ONNX", "system") else f"{one.group} {one.name}"
            names.setdefault(one.advice, []).append("torch2trt" if one.group == "torch2trt" else label)
    lines = [f"  {', '.join(who)}: {advice}" for advice, who in names.items()]
    return ["To have what is missing or does not fit:", *lines] if lines else []


def _target_lines(target: TargetFinding) -> list[str]:
    able = [one.ability for one in target.abilities if one.possible]
    lines = [f"target {target.name}: can {_joined(able)} here" if able else f"target {target.name}:"]
    return lines + [
        f"  cannot {one.ability} here: {_reasons(one)}" for one in target.abilities if not one.possible
    ]


def _reasons(one: AbilityFinding) -> str:
    return ", ".join(one.problems) + (f". Install: {one.advice}" if one.advice else "")


def _artifact_lines(artifact: ArtifactFinding) -> list[str]:
    lines = [
        f"artifact {artifact.path} ({artifact.target}): {'runs here' if artifact.runs else 'does not run here'}"
    ]
    for engine in artifact.engines:
        made = engine.built_for
        device = f"{made.gpu} {made.compute_capability}" if made.gpu else "built without a GPU"
        verdict = "loads" if engine.loads else "does not load"
        lines.append(f"  engine {engine.role} ({made.library}, {device}): {verdict}")
    lines += [f"  {problem}" for problem in artifact.problems]
    return lines + ([f"  do: {artifact.advice}"] if artifact.advice else [])


def _joined(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
