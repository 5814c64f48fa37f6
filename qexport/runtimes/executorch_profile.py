"""What ExecuTorch's event tracer wrote, matched with what the program says its instructions are for.

Kernels are known by the number of their instruction. XNNPACK names what it ran, without a number; so its steps are
compared with the nodes that it was given, one after the other, each by its name, and counted. One that does not fit is
an error, never a guess.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qexport.errors import TargetUnavailable
from qexport.layers import Kind
from qexport.runtimes.executorch_table import ProgramTable, TableCall, TableNode
from qexport.runtimes.runner import NOWHERE, KernelTime, ProfiledRun

_METHOD, _DELEGATE, _KERNEL = "Method::execute", "DELEGATE_CALL", "OPERATOR_CALL"
_SETUP = "XNNPACK setup"
_CLAMP = "Clamp"
_TABLE = "Invalid Unary Op"
"""XNNPACK's name of a step that looks codes up in a table."""
_NAMES: dict[str, tuple[str, ...]] = {
    "add": ("Add",),
    "average pool": ("Average Pooling", "Global Average Pooling"),
    "bilinear": ("Resize Bilinear",),
    "clamp": ("Clamp", "ReLU"),
    "concatenate": ("Concatenate", "Copy"),
    "convert": ("Convert",),
    "convolution": (
        "Convolution",
        "Depthwise Convolution",
        "Fully Connected",
        "Vector Multiply+Add",
        "VMulCAddC",
    ),
    "divide": ("Divide",),
    "exp": ("Exp",),
    "gelu": ("GELU", "Gelu"),
    "hardswish": ("HardSwish", "Hard Swish"),
    "leaky relu": ("Leaky ReLU",),
    "linear": ("Fully Connected",),
    "max pool": ("Max Pooling",),
    "maximum": ("Maximum",),
    "mean": ("Mean", "Global Average Pooling"),
    "minimum": ("Minimum",),
    "multiply": ("Multiply",),
    "pad": ("Constant Pad",),
    "reshape": ("Static Reshape", "Copy"),
    "sigmoid": ("Sigmoid",),
    "slice": ("Slice", "Static Slice"),
    "subtract": ("Subtract",),
    "tanh": ("Tanh", "TanH"),
    "transpose": ("Transpose", "Copy"),
}
"""By kind of node, how the names begin of the steps that XNNPACK makes of it."""
_MAY_VANISH = ("clamp", "pad", "reshape")
"""Kinds that XNNPACK takes into the step before, or leaves out where they change nothing."""
_KINDS: dict[str, Kind] = {
    "add": "elementwise",
    "average pool": "pooling",
    "bilinear": "resize",
    "clamp": "activation",
    "concatenate": "concatenation",
    "convert": "reformat",
    "convolution": "convolution",
    "gelu": "activation",
    "hardswish": "activation",
    "leaky relu": "activation",
    "linear": "linear",
    "max pool": "pooling",
    "mean": "pooling",
    "multiply": "elementwise",
    "pad": "other",
    "reshape": "reformat",
    "sigmoid": "activation",
    "slice": "reformat",
    "tanh": "activation",
    "transpose": "reformat",
}


@dataclass(frozen=True, slots=True)
class Event:
    """What the tracer noted."""

    name: str
    instruction: int
    in_xnnpack: bool
    duration_ms: float


def read_events(path: Path) -> list[list[Event]]:
    """Return the events of each run in a file of the tracer.

    Raises:
        TargetUnavailable: ExecuTorch's own reader is not there.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of functions that Python will drop
        try:
            reader: Any = importlib.import_module("executorch.devtools.etdump.serialize")
        except ImportError as error:
            raise TargetUnavailable(f"ExecuTorch's reader of its traces is not there: {error}") from error
        dump = reader.deserialize_from_etdump_flatcc(path.read_bytes())
    runs = []
    for run in dump.run_data:
        noted = [event.profile_event for event in run.events or () if event.profile_event is not None]
        events = [
            Event(
                name=str(one.delegate_debug_id_str or one.name),
                instruction=int(one.instruction_id),
                in_xnnpack=bool(one.delegate_debug_id_str),
                duration_ms=(one.end_time - one.start_time) / 1e6,
            )
            for one in noted
        ]
        if any(event.name == _METHOD for event in events):
            runs.append(events)
    return runs


class Timeline:
    """Runs of the tracer, by module path."""

    def __init__(self, table: ProgramTable, path: Path) -> None:
        self._table, self._path = table, path
        self._calls = {one.instruction: one for one in table.calls}
        self.owners: dict[str, str] = {}
        """Module path of every kernel, by its name; of what was read so far."""

    def read(self, events: Sequence[Event]) -> ProfiledRun:
        """Return a run.

        Raises:
            TargetUnavailable: an instruction is not in the table, or XNNPACK ran other steps than it was given.
        """
        kernels: list[KernelTime] = []
        steps: list[Event] = []
        whole = 0.0
        for event in events:
            if event.in_xnnpack:
                steps.append(event)
            elif event.name == _DELEGATE:
                call = self._call(event)
                kernels += self._segment(call, steps, event.duration_ms)
                steps = []
            elif event.name == _KERNEL:
                call = self._call(event)
                kernels.append(
                    self._named(call.site, call.operator, str(call.instruction), event.duration_ms)
                )
            elif event.name == _METHOD:
                whole = event.duration_ms
        return ProfiledRun(whole, tuple(kernels))

    def _call(self, event: Event) -> TableCall:
        call = self._calls.get(event.instruction)
        if call is None:
            raise TargetUnavailable(
                f"{self._path}: instruction {event.instruction} was timed and is not in the program's own table: this "
                "ExecuTorch is not the one that qexport was tested with (constraints.txt)."
            )
        return call

    def _segment(self, call: TableCall, steps: Sequence[Event], whole_ms: float) -> list[KernelTime]:
        matched = match(call.nodes, [step.name for step in steps])
        if matched is None:
            raise TargetUnavailable(
                f"{self._path}: XNNPACK ran {len(steps)} steps in instruction {call.instruction} that are not the "
                f"{len(call.nodes)} nodes it was given, one by one; times by layer would be guesses. Use a tested "
                "version: constraints.txt."
            )
        kernels = []
        for number, (step, place) in enumerate(zip(steps, matched, strict=True)):
            node = call.nodes[place]
            kernels.append(
                self._named(
                    node.site,
                    f"{node.kind}: {step.name.partition(' #')[0]}",
                    f"{call.instruction}.{number}",
                    step.duration_ms,
                )
            )
        rest = max(0.0, whole_ms - sum(step.duration_ms for step in steps))
        return [*kernels, self._named(call.site, _SETUP, str(call.instruction), rest)]

    def _named(self, site: int, kernel: str, number: str, duration_ms: float) -> KernelTime:
        path = self._table.sites[site]
        name = f"{path}/{kernel} [{number}]"
        self.owners[name] = path.partition("@")[0] or NOWHERE
        return KernelTime(name, kernel, duration_ms)


def match(nodes: Sequence[TableNode], names: Sequence[str]) -> list[int] | None:
    """Return for each step of XNNPACK the node that it computes; None where they are not the nodes, one by one.

    XNNPACK clamps in a step of its own where a kernel cannot, takes a clamp or a padding into the convolution beside it
    where it can, and makes one of two changes of shape.
    """
    found: list[int] = []
    place = number = 0
    while number < len(nodes):
        node = nodes[number]
        if place < len(names) and names[place].startswith(_TABLE) and node.kind == "convert":
            # From codes to codes by a function of one value: XNNPACK looks every code up.
            found.append(number + 1)
            number = next(
                (at for at in range(number + 1, len(nodes)) if nodes[at].kind == "convert"), len(nodes)
            )
            place += 1
        elif place < len(names) and names[place].startswith(_NAMES.get(node.kind, ("?",))):
            found.append(number)
            place += 1
            if node.clamped and place < len(names) and names[place].startswith(_CLAMP):
                found.append(number)
                place += 1
        elif not (node.kind in _MAY_VANISH and number):
            return None
        number += 1
    return found if place == len(names) and max(found, default=0) < len(nodes) else None


def kind_of_kernel(kernel: str) -> Kind:
    """Return the kind of work of a kernel, as `Timeline` names it."""
    node = kernel.partition(":")[0]
    if node in _KINDS and not kernel.startswith("aten"):
        return _KINDS[node]
    name = kernel.rpartition("::")[2].partition(".")[0]
    if name in ("cat", "stack"):
        return "concatenation"
    if name in (
        "view_copy",
        "permute_copy",
        "slice_copy",
        "select_copy",
        "_to_copy",
        "clone",
        "constant_pad_nd",
    ):
        return "reformat"
    if name in ("bmm", "topk"):
        return "other"
    return "elementwise" if node in ("subtract", "divide", "maximum", "minimum", "exp") else "other"


def fold_into_rows(owners: Mapping[str, str], rows: Iterable[str]) -> dict[str, str]:
    """Return owners among the rows of an artifact: what it has fused away goes to the row before it."""
    known, folded, last = set(rows), {}, NOWHERE
    for name, path in owners.items():
        last = path if path in known else last
        folded[name] = path if path in known or last == NOWHERE else last
    return folded
