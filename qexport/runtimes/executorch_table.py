"""What an ExecuTorch program says of itself: its methods' tensors, and for what each instruction was written.

It is a text that the program holds as a method of its own, so that it goes wherever the file goes.
"""

from __future__ import annotations

import msgspec

FORWARD, PROBE, FORCED = "forward", "probe", "forced"
"""Methods: frame in, detections out; the same with every quantized tensor; every layer on inputs that are given."""
TABLE = "qexport_table"
"""The method that returns the text."""
PROPOSALS = "proposals"
FORMAT_VERSION = 1


class TableNode(msgspec.Struct, frozen=True, array_like=True):
    """A node of an XNNPACK subgraph."""

    kind: str
    """`convolution`, as `qexport.plugins.executorch.nodes` names it."""
    site: int
    """Place in `ProgramTable.sites`."""
    clamped: bool = False
    """Whether XNNPACK clamps the result in a step of its own."""


class TableCall(msgspec.Struct, frozen=True, array_like=True):
    """An instruction that computes."""

    instruction: int
    """Its number in the method, which ExecuTorch's event tracer gives back."""
    operator: str
    """`aten::topk.values`; empty for a call of XNNPACK."""
    site: int
    nodes: tuple[TableNode, ...] = ()
    """What XNNPACK computes, in order."""


class TableMethod(msgspec.Struct, frozen=True):
    """A method's interface."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    """Names of tensors, in order."""


class ProgramTable(msgspec.Struct, frozen=True):
    """The text, read."""

    executorch: str
    """Version that wrote the program."""
    sites: tuple[str, ...]
    """Module paths, with the call where it is not the first: `rpn.head.conv.0.0@1`."""
    methods: dict[str, TableMethod]
    calls: tuple[TableCall, ...]
    """Of `forward`."""
    format_version: int = FORMAT_VERSION
