"""The quantized tensors of a detector by the modules that compute and read them, to find what a checkpoint names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch.fx import Node

from qexport.calibration.calibrator import Observed
from qexport.calibration.checkpoints.ranges import QatCheckpoint, QatRange
from qexport.encodings import row_key
from qexport.quantization.graph import IMAGE_KEY, base_of, op_name, site_of

_JOINING = ("add", "mul", "cat")
"""What a functional module (FloatFunctional, AIMET's Add) computes."""
_NORM_OUTPUTS = ("batch_norm", "add#1")
"""Operators whose output is a BatchNorm's: a traced FrozenBatchNorm2d adds epsilon first, and its bias last."""


@dataclass(frozen=True, slots=True)
class Found:
    """A quantized tensor that a range of a checkpoint is about."""

    key: str
    rank: int
    """The higher, the nearer to the tensor: a range of the activation tells more than one of the convolution."""


@dataclass(frozen=True, slots=True)
class _Site:
    path: str
    call: int
    op: str
    key: str
    rank: int
    before_norm: bool = False
    """The operator computes what the BatchNorm reads, which is not the tensor."""
    is_norm: bool = False


class Places:
    """Finds the tensors that a checkpoint's ranges are about."""

    def __init__(self, observed: Observed, checkpoint: QatCheckpoint, *, norms_are_folded: bool) -> None:
        self._norms, self._modules = checkpoint.norms, checkpoint.modules
        self._norms_are_folded = norms_are_folded
        quantized = {key for key, _ in observed.activations()}
        self._outputs: dict[str, list[_Site]] = {}
        self._inputs: dict[str, list[tuple[int, str]]] = {}
        for node in observed.graph.graph.nodes:
            if node.op == "call_function" and node.name in observed.keys:
                for site in self._output_sites(node, observed.keys):
                    if site.key in quantized:
                        self._outputs.setdefault(site.path, []).append(site)
                self._note_input(node, observed.keys, quantized)
        self._image = IMAGE_KEY if IMAGE_KEY in quantized else ""
        self._keys = quantized

    def find(self, entry: QatRange) -> list[Found]:
        """Return the tensors that a range of an activation stands for; none where there is no such tensor here."""
        exact = row_key(entry.path, entry.call or 0, f"output:{entry.op}")
        if entry.call is not None and exact in self._keys:
            return [Found(exact, 2)]
        if entry.port == "input":
            return [Found(key, 0) for key in self._read_by(entry)]
        if entry.path in self._modules and entry.path in self._outputs:
            return self._computed_by(entry)
        return [Found(key, 2) for key in self._of_functional(entry.path)]

    def _read_by(self, entry: QatRange) -> list[str]:
        if not entry.path:
            return [self._image] if self._image else []
        calls = self._inputs.get(entry.path, [])
        if not calls and entry.path in self._modules:
            calls = [(0, key) for key in self._entering(entry.path)]
        return list(dict.fromkeys(key for call, key in calls if entry.call in (None, call)))

    def _computed_by(self, entry: QatRange) -> list[Found]:
        includes = self._norms_are_folded if entry.includes_norm is None else entry.includes_norm
        return [
            Found(site.key, site.rank)
            for site in self._outputs[entry.path]
            if entry.call in (None, site.call)
            and entry.op in ("", site.op, *(_NORM_OUTPUTS if site.is_norm else ()))
            and not (site.before_norm and not includes)
        ]

    def _of_functional(self, path: str) -> list[str]:
        """Return what a stub or a functional module stands for, which the detector itself does not have."""
        above, _, name = path.rpartition(".")
        if above and above not in self._modules:
            return []
        joined = {site.key for site in self._outputs.get(above, ()) if site.op.partition("#")[0] in _JOINING}
        if "quant" in name:  # QuantStub is called `quant` in every tutorial and in QuantWrapper
            entering = [self._image] if not above and self._image else self._entering(above)
            return entering if len(entering) == 1 else []
        return sorted(joined) if len(joined) == 1 else []

    def _entering(self, path: str) -> list[str]:
        """Return the tensors that a module's parts read and others computed."""
        inside = f"{path}."
        read = {
            key
            for reader, calls in self._inputs.items()
            if reader == path or reader.startswith(inside)
            for _, key in calls
        }
        own = {
            site.key
            for owner, sites in self._outputs.items()
            if owner == path or owner.startswith(inside)
            for site in sites
        }
        return sorted(read - own)

    def _output_sites(self, node: Node, keys: Mapping[str, str]) -> Iterator[_Site]:
        """Yield the modules whose output a node's tensor is: the operator, its BatchNorm and its activation."""
        base = base_of(node)
        key = keys[base.name]
        site, op = site_of(node), key.partition("/output:")[2] if base is node else op_name(node)
        norm = self._norms.get(site.path) if base is node else None
        yield _Site(site.path, site.call, op, key, 1 if base is node else 3, before_norm=norm is not None)
        if norm is not None:
            yield _Site(norm, site.call, "", key, 2, is_norm=True)

    def _note_input(self, node: Node, keys: Mapping[str, str], quantized: set[str]) -> None:
        """Note what a node reads, looking through the observer in between."""
        first = node.args[0] if node.args else None
        sources = first if isinstance(first, (list, tuple)) else node.args[:2]
        for source in sources:
            while isinstance(source, Node) and source.op == "call_module":
                source = source.args[0]  # noqa: PLW2901 - the tensor behind its observers
            key = keys.get(base_of(source).name, "") if isinstance(source, Node) else ""
            if key in quantized:
                site = site_of(node)
                self._inputs.setdefault(site.path, []).append((site.call, key))
