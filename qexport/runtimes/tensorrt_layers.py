"""The layers of a built engine: what TensorRT fused, in which type it computes, and to which modules it belongs.

Two forms are read. `INetworkDefinition`'s builder lists the engine's layers in its log when profiling verbosity is
DETAILED: one line a layer, also without a GPU. The engine inspector, and `trtexec --exportLayerInfo`, give JSON,
which needs a GPU. Both name the ONNX nodes behind a layer in its metadata from TensorRT 8.6 on; before that, the
layer's own name is made of theirs (`conv1/Conv + relu/Relu`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qexport.errors import ArtifactError
from qexport.layers import Kind

LISTING = "Layers:"
"""First line of the builder's log message that lists the engine's layers."""

_TENSOR_TYPE = re.compile(r"Datatype: (\w+)")
_FIELD = re.compile(
    r"LayerType: (\w+), Inputs: \[(?P<inputs>.*?)\], (?:Constants: \[.*?\], )?Outputs: \[(?P<outputs>.*?)\], Tactic"
)
_METADATA = re.compile(r"\[(?:ONNX Layer: )?([^\[\]]+)\]")
# Inspector: "Thirty-two wide channel vectorized row major Int8 format", "Row major linear FP32".
_INSPECTED_TYPE = re.compile(
    r"\b(Int8|FP8|FP32|FP16|BF16|Float|Half|Int32|Int64|Bool|UInt8)\b", re.IGNORECASE
)
_TYPE_NAMES = {
    "fp32": "Float",
    "float": "Float",
    "fp16": "Half",
    "half": "Half",
    "int8": "Int8",
    "int32": "Int32",
}

_REFORMATS = ("reformat", "reorder", "shufflecopy", "copypackedkernel", "noop")
_KINDS: tuple[tuple[str, Kind], ...] = (
    ("correlation", "convolution"),
    ("conv", "convolution"),
    ("gemm", "linear"),
    ("matmul", "linear"),
    ("matrixmultiply", "linear"),
    ("fullyconnected", "linear"),
    ("pool", "pooling"),
    ("gridsample", "roi_align"),
    ("roialign", "roi_align"),
    ("nms", "nms"),
    ("resize", "resize"),
    ("concat", "concatenation"),
    ("softmax", "activation"),
    ("activation", "activation"),
    *(
        (name, "reformat")
        for name in (*_REFORMATS, "copy", "cast", "shuffle", "slice", "transpose", "memset")
    ),
    ("elementwise", "elementwise"),
    ("pointwise", "elementwise"),
    ("pwn", "elementwise"),
    ("kgen", "elementwise"),
    ("unary", "elementwise"),
    ("select", "elementwise"),
)


@dataclass(frozen=True, slots=True)
class EngineLayer:
    """One layer of an engine: a kernel, with everything that was fused into it."""

    name: str
    kernel: str
    """TensorRT's own type, `CaskConvolution`, `correlation`, `kgen`."""
    inputs: tuple[str, ...]
    """Types of what it reads, `Int8`, `Float`, `Half`."""
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]
    """The network's layers that it computes, `backbone.body.conv1/Conv`."""

    @property
    def kind(self) -> Kind:
        """The kind of work."""
        return kind_of(self.kernel)

    @property
    def modules(self) -> tuple[str, ...]:
        """Module paths of the nodes, the first node's first, each once; without the number of the call."""
        return tuple(dict.fromkeys(node.partition("/")[0].partition("@")[0] for node in self.nodes))

    @property
    def is_reformat(self) -> bool:
        """Whether it only changes the layout or the type of a tensor."""
        name = self.kernel.lower()
        return any(word in name for word in _REFORMATS) or self.name.startswith("Reformatting CopyNode")


def kind_of(kernel: str) -> Kind:
    """Return the kind of work of a layer type."""
    name = kernel.lower().replace("_", "")
    return next((kind for word, kind in _KINDS if word in name), "other")


def parse_listing(messages: Iterable[str]) -> tuple[EngineLayer, ...]:
    """Return the layers that a builder listed in its log.

    Args:
        messages: of the log, in order; the last listing counts.

    Raises:
        ArtifactError: the builder listed nothing.
    """
    listings = [message for message in messages if message.startswith(LISTING)]
    if not listings:
        raise ArtifactError(
            "the builder listed no layers: profiling verbosity was not DETAILED, or this TensorRT lists them "
            "otherwise; then a GPU is needed, for the engine inspector."
        )
    return tuple(_listed(line) for line in listings[-1].splitlines()[1:] if line.startswith("Name: "))


def _listed(line: str) -> EngineLayer:
    name, _, rest = line.removeprefix("Name: ").partition(", LayerType: ")
    match = _FIELD.search(f"LayerType: {rest}")
    inputs, outputs = (match["inputs"], match["outputs"]) if match else ("", "")
    return EngineLayer(
        name=name,
        kernel=re.split(r"\W", rest, maxsplit=1)[0],
        inputs=tuple(_TENSOR_TYPE.findall(inputs)),
        outputs=tuple(_TENSOR_TYPE.findall(outputs)),
        nodes=tuple(dict.fromkeys(_METADATA.findall(rest.rpartition("Metadata: ")[2]))),
    )


def parse_inspector(text: str) -> tuple[EngineLayer, ...]:
    """Return the layers of an inspector's JSON, or of the file that `trtexec --exportLayerInfo` writes.

    Raises:
        ArtifactError: cut off, of another form, or without the details that verbosity DETAILED gives.
    """
    try:
        document = json.loads(text, strict=False)  # the metadata holds control characters
    except ValueError as error:
        raise ArtifactError(f"the layer information is no JSON ({error}): was the file cut off?") from error
    layers = document.get("Layers") if isinstance(document, dict) else None
    if not isinstance(layers, list):
        raise ArtifactError(
            "the layer information has no list `Layers`: it is no file of the engine inspector."
        )
    if any(not isinstance(layer, dict) for layer in layers):
        raise ArtifactError(
            "the layer information holds names alone. Build with profiling verbosity DETAILED "
            "(trtexec --profilingVerbosity=detailed)."
        )
    return tuple(_inspected(layer) for layer in layers)


def _inspected(layer: dict[str, Any]) -> EngineLayer:
    name = str(layer.get("Name", ""))
    metadata = _METADATA.findall(str(layer.get("Metadata", "")))
    return EngineLayer(
        name=name,
        kernel=str(layer.get("LayerType", "")),
        inputs=_types(layer.get("Inputs", ())),
        outputs=_types(layer.get("Outputs", ())),
        nodes=tuple(dict.fromkeys(metadata or nodes_in_name(name))),
    )


def _types(tensors: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    found = []
    for tensor in tensors:
        given = str(tensor.get("Datatype") or tensor.get("Format/Datatype") or "")
        match = _INSPECTED_TYPE.search(given)
        found.append(_TYPE_NAMES.get(match[1].lower(), match[1]) if match else given)
    return tuple(found)


def nodes_in_name(name: str) -> tuple[str, ...]:
    """Return the nodes in a fused layer's name: `PWN(a/Relu)`, `a/Conv + b/Add`, `{ForeignNode[a/X...b/Y]}`."""
    inner = re.sub(r"Reformatting CopyNode for (?:Input|Output) Tensor \d+ to ", "", name)
    parts = re.split(r" \+ |\|\||\.\.\.|, |[\[\](){}]", inner)
    return tuple(part for part in (part.strip() for part in parts) if "/" in part)
