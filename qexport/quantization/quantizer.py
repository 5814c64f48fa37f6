"""A PT2E quantizer for the one scheme that every target executes.

Symmetric int8 activations with zero point 0, symmetric int8 weights per output channel, in trunk, FPN,
RPN head, RoI pooling and box head. Box arithmetic, softmax, top-k and NMS stay float: their values are
coordinates and probabilities, not features. Written for torchao's `prepare_pt2e` and `convert_pt2e`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from qexport.encodings import ACTIVATION_RANGE, WEIGHT_RANGE, FloatRow, QuantParams
from qexport.errors import CalibrationError
from qexport.layers import STAGES, Stage, stage_of
from qexport.quantization.graph import (
    ACTIVATIONS,
    FUSES_ACTIVATION,
    argument_node,
    base_of,
    computed_by,
    is_float,
    op_name,
    port_keys,
    site_of,
    weight_key,
)
from qexport.quantization.observers import Preset

QUANTIZED_STAGES: frozenset[Stage] = frozenset({"trunk", "fpn", "rpn_head", "roi_align", "box_head"})
FLOAT_STAGES: dict[Stage, str] = {
    "preprocess": "pixels before the first quantizer",
    "proposals": "box arithmetic, top-k and NMS: values are coordinates and ranks, not features",
    "detections": "box arithmetic, softmax and NMS: values are coordinates and probabilities, not features",
}
"""The stages that stay float as a whole, and why."""
WEIGHTED = ("conv2d", "linear")
BINARY = ("add", "mul")
OWN_SCALE = ("adaptive_avg_pool2d", "avg_pool2d", "mean", "multiscale_roi_align")
UNARY = ("hardswish", "hardsigmoid", "sigmoid", "silu", "gelu", "leaky_relu")
SAME_SCALE = (
    "max_pool2d",
    "upsample_nearest2d",
    "slice",
    "view",
    "flatten",
    "reshape",
    "permute",
    "cat",
    "relu",
    "relu6",
    "dropout",
)
"""Operators that only move or select values: their output keeps the scale of their input."""
SHAPE_ONLY = ("view", "flatten", "reshape", "permute", "slice", "clone", "_unsafe_view", "dropout")
"""Operators that compute nothing: no layers of their own."""

SpecFactory = Callable[[str], QuantizationSpec]
"""Makes the specification for the tensor with this encodings key."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the quantizer decided for one graph."""

    float_rows: tuple[FloatRow, ...]
    matched_patterns: frozenset[str]


class SymmetricInt8Quantizer(Quantizer):  # type: ignore[misc]
    """Annotates a static detector's graph for symmetric int8.

    Args:
        activation: makes the specification of an activation from its encodings key.
        weight: the same for a weight; None: weights stay float.
        keep_float: patterns of module paths (`fnmatch`; a plain path also covers what is below it) that stay float.
    """

    def __init__(
        self, activation: SpecFactory, weight: SpecFactory | None, *, keep_float: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self._activation = activation
        self._weight = weight
        self._keep_float = keep_float
        self.plan = Plan((), frozenset())

    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotate every node that is quantized; `self.plan` says what stays float and why."""
        self._keys = port_keys(model)
        self._specs: dict[str, QuantizationSpec] = {}
        float_rows, matched = [], set()
        for node in model.graph.nodes:
            if node.op != "call_function" or not is_float(node) or op_name(node) in SHAPE_ONLY:
                if op_name(node) in SAME_SCALE and is_float(node) and _in_quantized_stage(node):
                    self._annotate_same_scale(node)
                continue
            pattern = self._kept_float(node)
            if pattern:
                matched.add(pattern)
            reason = f"kept in float by {pattern!r}" if pattern else self._annotate(node)
            if reason:
                site = site_of(node)
                float_rows.append(FloatRow(site.path, site.call, computed_by(node), reason))
        self._quantize_float_producers(model)
        self.plan = Plan(tuple(_first_of_each(float_rows)), frozenset(matched))
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing is left to validate: `annotate` refuses nothing, it keeps float what it does not know."""

    def _annotate(self, node: Node) -> str:
        """Annotate one node; return why not, where it stays float."""
        op = op_name(node)
        if not _in_quantized_stage(node):
            return FLOAT_STAGES[stage_of(site_of(node).path)]
        if op in WEIGHTED:
            source, weight = argument_node(node), argument_node(node, 1)
            spec = {source: self._output_spec(source)}
            if self._weight is not None:
                spec[weight] = self._weight(weight_key(node))
            self._mark_chain(node, spec)
        elif op in BINARY:
            inputs = [arg for arg in node.args[:2] if isinstance(arg, Node) and is_float(arg)]
            if len(inputs) < 2:
                return f"{op} with a constant has no integer kernel"
            self._mark_chain(node, {arg: self._output_spec(arg) for arg in inputs})
        elif op in OWN_SCALE or op in UNARY:
            inputs = _inputs(node)
            self._mark(node, {arg: self._output_spec(arg) for arg in inputs}, self._output_spec(node))
        elif op in SAME_SCALE:
            if Q_ANNOTATION_KEY not in node.meta:  # else an activation that its producer took with it
                self._annotate_same_scale(node)
            if Q_ANNOTATION_KEY not in node.meta:
                return f"{op} of a float tensor"
        else:
            return f"no integer form of {computed_by(node)} is known"
        return ""

    def _mark_chain(self, node: Node, inputs: Mapping[Node, QuantizationSpec]) -> None:
        """Annotate an operator with the activation that it takes with it."""
        last = node
        follower = next(iter(node.users))
        if (
            op_name(node) in FUSES_ACTIVATION
            and len(node.users) == 1
            and op_name(follower) in ACTIVATIONS
            and not self._kept_float(follower)
        ):
            last = follower
            self._mark(last, {}, self._output_spec(last))
        self._mark(node, inputs, self._output_spec(node) if last is node else None)

    def _annotate_same_scale(self, node: Node) -> None:
        inputs = _inputs(node)
        first = inputs[0]
        if not all(self._is_quantized(arg) for arg in inputs):
            return
        shared = SharedQuantizationSpec((first, node))
        self._mark(node, {first: self._output_spec(first), **dict.fromkeys(inputs[1:], shared)}, shared)

    def _quantize_float_producers(self, model: GraphModule) -> None:
        """Quantize what a float operator hands to a quantized one: the image, or a layer kept in float."""
        for node in model.graph.nodes:
            annotation = node.meta.get(Q_ANNOTATION_KEY)
            for producer in annotation.input_qspec_map if annotation else ():
                if producer.op != "get_attr" and Q_ANNOTATION_KEY not in producer.meta:
                    self._mark(producer, {}, self._output_spec(producer))

    def _output_spec(self, node: Node) -> QuantizationSpec:
        key = self._keys[base_of(node).name]
        return self._specs.setdefault(key, self._activation(key))

    def _is_quantized(self, node: Node) -> bool:
        return Q_ANNOTATION_KEY in node.meta and node.meta[Q_ANNOTATION_KEY].output_qspec is not None

    @staticmethod
    def _mark(
        node: Node,
        inputs: Mapping[Node, QuantizationSpec | SharedQuantizationSpec],
        output: QuantizationSpec | SharedQuantizationSpec | None,
    ) -> None:
        node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
            input_qspec_map=dict(inputs), output_qspec=output, _annotated=True
        )

    def _kept_float(self, node: Node) -> str:
        path = site_of(node).path
        for pattern in self._keep_float:
            if fnmatchcase(path, pattern) or path.startswith(pattern.rstrip(".") + "."):
                return pattern
        return ""


def activation_spec(observer: object) -> QuantizationSpec:
    """Return the specification of an activation that `observer` watches."""
    return QuantizationSpec(
        dtype=torch.int8,
        quant_min=ACTIVATION_RANGE[0],
        quant_max=ACTIVATION_RANGE[1],
        qscheme=torch.per_tensor_symmetric,
        is_dynamic=False,
        observer_or_fake_quant_ctr=observer,
    )


def weight_spec(observer: object) -> QuantizationSpec:
    """Return the specification of a weight that `observer` watches, one scale per output channel."""
    return QuantizationSpec(
        dtype=torch.int8,
        quant_min=WEIGHT_RANGE[0],
        quant_max=WEIGHT_RANGE[1],
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        is_dynamic=False,
        observer_or_fake_quant_ctr=observer,
    )


def preset_quantizer(
    params: Mapping[str, QuantParams], keep_float: tuple[str, ...], *, weights: bool = True
) -> SymmetricInt8Quantizer:
    """Return a quantizer whose every scale comes from a table of encodings.

    Args:
        params: by key.
        keep_float: patterns of module paths that stay float.
        weights: whether weights are quantized.

    Raises:
        KeyError: while it annotates, for a tensor that the table has no row for.
    """

    def activation(key: str) -> QuantizationSpec:
        return activation_spec(Preset.with_args(given=params[key].scale))

    def weight(key: str) -> QuantizationSpec:
        return weight_spec(Preset.with_args(given=params[key].scale))

    return SymmetricInt8Quantizer(activation, weight if weights else None, keep_float=keep_float)


def check_patterns(keep_float: tuple[str, ...], plan: Plan, paths: list[str]) -> None:
    """Refuse a `--keep-float` pattern that matched no layer.

    Raises:
        CalibrationError: names the pattern, and the nearest module paths.
    """
    for pattern in keep_float:
        if pattern not in plan.matched_patterns:
            near = difflib.get_close_matches(re.sub(r"[*?\[\]]", "", pattern), paths, n=3, cutoff=0.3)
            raise CalibrationError(
                f"--keep-float {pattern!r} matches no layer. "
                + (f"Nearest: {', '.join(near)}. " if near else "")
                + "`qexport inspect` lists the layers by module path."
            )


def _inputs(node: Node) -> list[Node]:
    """Return what an operator reads: the tensors of its list, or its one tensor."""
    first = node.args[0]
    return [arg for arg in (first if isinstance(first, (list, tuple)) else [first]) if isinstance(arg, Node)]


def _in_quantized_stage(node: Node) -> bool:
    return stage_of(site_of(node).path) in QUANTIZED_STAGES


def _first_of_each(rows: list[FloatRow]) -> list[FloatRow]:
    """One row per path, call and operator; the stages that are float as a whole give one row each."""
    kept: dict[tuple[str, int, str], FloatRow] = {}
    for row in rows:
        whole = stage_of(row.path) not in QUANTIZED_STAGES
        site = (row.path, row.call, "" if whole else row.op)
        kept.setdefault(site, FloatRow(*site, row.reason))
    return sorted(kept.values(), key=lambda row: STAGES.index(stage_of(row.path)))
