"""What the parts of the lowered detector are called: after the modules that they compute for."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from qexport.layers import stage_of
from qexport.quantization.graph import CallSite, op_name, site_of
from qexport.quantization.quantizer import FLOAT_STAGES, WEIGHTED
from qexport.runtimes.qnnpack_program import CALL, OPERATOR


class PartNames:
    """Gives each part its path in the module tree, once.

    A convolution or linear has its module's own path, `backbone.body.conv1`, a later call of it with its own scales
    `rpn.head.conv.0.0__call1`. So have a stage that stays float as a whole, and a module of one operator and nothing
    below it. Any other operator stands beside its module: `backbone.body.layer1.0__op_add`.

    Args:
        nodes: of the graph.
    """

    def __init__(self, nodes: Iterable[Node]) -> None:
        self._taken: set[str] = set()
        self._inner: set[str] = set()
        for node in nodes:
            path = site_of(node).path
            if op_name(node) in WEIGHTED:
                self._inner.add(path)
            while "." in path:
                path = path.rpartition(".")[0]
                self._inner.add(path)

    def layer(self, site: CallSite) -> str:
        """Return the path of a quantized layer."""
        return self._take(_of_call(site.path, site.call))

    def operator(self, site: CallSite, op: str) -> str:
        """Return the path of another operator."""
        plain = _of_call(site.path, site.call)
        if site.path and site.path not in self._inner and plain not in self._taken:
            return self._take(plain)
        base = f"{site.path}{OPERATOR}{op.lstrip('_')}"
        number, path = 0, _of_call(base, site.call)
        while path in self._taken:
            number += 1
            path = _of_call(f"{base}_{number}", site.call)
        return self._take(path)

    def _take(self, path: str) -> str:
        self._taken.add(path)
        return path


def whole_stage(node: Node) -> str:
    """Return the path of the stage that a node belongs to where the stage is one part; else an empty string."""
    path = site_of(node).path
    return path if path and stage_of(path) in FLOAT_STAGES else ""


def where(node: Node) -> str:
    """Return the module path of a node, for messages."""
    return site_of(node).path or "(the model itself)"


def _of_call(path: str, call: int) -> str:
    return f"{path}{CALL}{call}" if call else path
