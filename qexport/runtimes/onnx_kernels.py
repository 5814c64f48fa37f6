"""Which module a kernel of ONNX Runtime belongs to, and what kind of work it is.

The exporter names nodes `PATH[@CALL]/Operator`. ONNX Runtime fuses nodes, adds to their names, and inserts
nodes of its own without a path; the graph that it really runs says where those belong.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from statistics import median

import numpy as np

from qexport.layers import Kind
from qexport.runtimes.onnx_model import Node, chain_of, read_nodes
from qexport.runtimes.onnx_session import make_session
from qexport.runtimes.runner import NOWHERE

_CHAIN, _CHAIN_RUNS = 200, 40

_ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Gelu", "Mish")
# "fused NAME" and "NAME_nchwc", "NAME_token_12" are ONNX Runtime's.
_PREFIX = "fused "
_SUFFIX = re.compile(r"(_nchwc|_token_\d+)+$")

_KINDS: dict[Kind, tuple[str, ...]] = {
    "convolution": ("Conv", "FusedConv", "NhwcFusedConv", "QLinearConv", "ConvInteger", "ConvTranspose"),
    "linear": (
        "Gemm", "FusedGemm", "QGemm", "MatMul", "FusedMatMul", "QLinearMatMul", "MatMulInteger",
        "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
    ),
    "pooling": (
        "MaxPool", "NhwcMaxPool", "AveragePool", "QLinearAveragePool", "GlobalAveragePool",
        "QLinearGlobalAveragePool", "GlobalMaxPool",
    ),
    "elementwise": (
        "Add", "QLinearAdd", "Sub", "Mul", "QLinearMul", "Div", "Sum", "Min", "Max", "Pow", "Sqrt", "Exp",
        "Log", "Neg", "Abs", "Floor", "Ceil", "Round", "Where", "QLinearWhere", "Equal", "Greater",
        "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Not", "Mod",
    ),
    "activation": (
        *_ACTIVATIONS, "QuickGelu", "QLinearLeakyRelu", "QLinearSigmoid", "Softmax", "QLinearSoftmax",
    ),
    "resize": ("Resize", "Upsample"),
    "concatenation": ("Concat", "QLinearConcat"),
    "roi_align": ("RoiAlign", "MaxRoiPool"),
    "nms": ("NonMaxSuppression",),
    "reformat": (
        "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Tile", "Pad", "Slice", "Split",
        "Cast", "Identity", "QuantizeLinear", "DequantizeLinear", "ReorderInput", "ReorderOutput",
    ),
}  # fmt: skip
_KIND_OF: dict[str, Kind] = {kernel: kind for kind, kernels in _KINDS.items() for kernel in kernels}


def kind_of_kernel(kernel: str) -> Kind:
    """Return the kind of work that a kernel type does; `other` for a gather, a top-k and the like."""
    return _KIND_OF.get(kernel, "other")


def kernel_owners(model: Path, rows: Collection[str] | None = None) -> dict[str, str]:
    """Return the module path of every kernel that ONNX Runtime runs for a model.

    Args:
        model: a file whose nodes the exporter named.
        rows: for a baseline: the artifact's paths. An activation that is not among them, because the
            artifact has fused it, goes to the module whose output it takes.

    Raises:
        ArtifactError: ONNX Runtime does not accept the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "optimized.onnx"
        make_session(model, optimized=written)
        optimized = read_nodes(written.read_bytes())
    return assign_paths(read_nodes(model.read_bytes()), optimized, rows)


def assign_paths(
    original: Iterable[Node],
    optimized: Iterable[Node],
    rows: Collection[str] | None = None,
) -> dict[str, str]:
    """Return the module path of every optimised node, by its name.

    Args:
        original: the nodes as exported.
        optimized: the nodes that run.
        rows: as in `kernel_owners`.
    """
    sources = {node.name: node for node in original}
    makers = {output: node for node in sources.values() for output in node.output}
    known = {path_of(name) for name in sources}
    nodes = list(optimized)
    owners: dict[str, str] = {}
    for node in nodes:
        site = _site(node.name)
        source = sources.get(site)
        if source is not None:
            fused = source.op_type in _ACTIVATIONS and node.op_type not in _ACTIVATIONS
            owners[node.name] = _before_activation(source, makers, rows, fused=fused)
        elif path_of(site) in known:
            owners[node.name] = path_of(site)
    _assign_inserted(nodes, owners)
    return owners


def time_between_kernels_ms(threads: int) -> float:
    """Measure what ONNX Runtime spends between two kernels while it profiles, ms.

    It writes down names and shapes of every kernel outside of the time that it gives for the kernel, about
    2 us: a fifth of the profiled run of a small detector with hundreds of kernels, and nothing that a run
    without profiler spends. Measured on a chain of operators on one number, which have no other time.

    Args:
        threads: threads within an operator.
    """
    with tempfile.TemporaryDirectory() as folder:
        session = make_session(chain_of("Sin", _CHAIN), threads=threads, profile=Path(folder) / "chain")
        for _ in range(_CHAIN_RUNS):
            session.run(None, {"v0": np.zeros(1, np.float32)})
        events = json.loads(Path(session.end_profiling()).read_text())
    wholes = [float(event["dur"]) for event in events if event["name"] == "model_run"]
    kernels = [float(event["dur"]) for event in events if event["name"].endswith("_kernel_time")]
    runs = [kernels[start : start + _CHAIN] for start in range(0, len(kernels), _CHAIN)]
    return median((whole - sum(run)) / _CHAIN for whole, run in zip(wholes, runs, strict=True)) / 1000


def path_of(name: str) -> str:
    """Return the module path in a node's name, `rpn.head.conv.0.0@3/Conv` to `rpn.head.conv.0.0`."""
    return name.partition("/")[0].partition("@")[0]


def _site(name: str) -> str:
    """Return the name of the exported node that a kernel's name comes from, `PATH[@CALL]/Operator`."""
    path, _, operator = name.removeprefix(_PREFIX).partition("/")
    return f"{path}/{_SUFFIX.sub('', operator.partition('/')[0])}"


def _before_activation(
    node: Node, makers: dict[str, Node], rows: Collection[str] | None, *, fused: bool
) -> str:
    """Return a node's path, or, for an activation that was fused or has no row, that of what it acts on."""
    path = path_of(node.name)
    while node.op_type in _ACTIVATIONS and (fused or (rows is not None and path not in rows)):
        if node.input[0] not in makers:
            break
        node = makers[node.input[0]]
        path = path_of(node.name)
    return path


def _assign_inserted(nodes: list[Node], owners: dict[str, str]) -> None:
    """Give nodes that ONNX Runtime inserted to their first input's producer, else to their consumer."""
    makers = {output: node.name for node in nodes for output in node.output}
    users = {value: node.name for node in reversed(nodes) for value in node.input if value}
    waiting = [node for node in nodes if node.name not in owners]
    neighbours = [
        {node.name: [makers.get(value) for value in node.input[:1]] for node in waiting},
        {node.name: [users.get(value) for value in node.output] for node in waiting},
    ]
    for side in neighbours:  # what follows one inserted node may be another: again until nothing changes
        changed = True
        while changed:
            changed = False
            for name in side:
                found = next(
                    (owners[near] for near in side[name] if near is not None and near in owners), None
                )
                if name not in owners and found is not None:
                    owners[name] = found
                    changed = True
    for node in waiting:
        owners.setdefault(node.name, NOWHERE)
