"""The two parts of a detector that are trained: trunk with RPN head, and box head, with their fake quantizers.

Both are exported as the whole static detector is, with the number of images and of boxes left open, and
annotated by the same quantizer. Every tensor that the encodings have a row for is found again by its key.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import msgspec
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from qexport.detectors.static import StaticDetector
from qexport.encodings import PER_TENSOR, EncodingRow, Encodings, digest_of_rows, row_key
from qexport.errors import CalibrationError
from qexport.quantization.graph import (
    argument_node,
    base_of,
    constant_of,
    export_module,
    op_name,
    port_keys,
    weight_key,
)
from qexport.quantization.quantizer import WEIGHTED, SymmetricInt8Quantizer, activation_spec, weight_spec
from qexport.training.fake_quantize import ActivationFakeQuantize, BiasOnGrid, WeightFakeQuantize

POOLED_KEY = row_key("roi_heads.box_roi_pool", 0, "output:multiscale_roi_align")
TrunkOutput = tuple[list[Tensor], list[Tensor], list[Tensor]]
"""Per level: features (N, C, H, W), objectness (N, A, H, W), box deltas (N, 4 A, H, W)."""


class Trunk(nn.Module):
    """Backbone and RPN head, under the paths that they have in the detector."""

    def __init__(self, static: StaticDetector) -> None:
        super().__init__()
        self.backbone = static.backbone
        self.rpn = nn.Module()
        self.rpn.head = static.rpn.head

    def forward(self, images: Tensor) -> TrunkOutput:
        """Return features, objectness and deltas of normalised (N, 3, H, W) images."""
        found = self.backbone(images)
        features = [found] if isinstance(found, Tensor) else list(found.values())
        objectness, deltas = self.rpn.head(features)  # type: ignore[operator]
        return features, objectness, deltas


class Head(nn.Module):
    """Box head and predictor, under the paths that they have in the detector."""

    def __init__(self, static: StaticDetector) -> None:
        super().__init__()
        self.roi_heads = nn.Module()
        self.roi_heads.box_head = static.roi_heads.box_head
        self.roi_heads.box_predictor = static.roi_heads.box_predictor

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Return class logits (R, K) and box deltas (R, 4 K) of (R, C, h, w) pooled features."""
        logits, deltas = self.roi_heads.box_predictor(self.roi_heads.box_head(pooled))  # type: ignore[operator]
        return logits, deltas


class _HeadQuantizer(SymmetricInt8Quantizer):
    """Knows that what the box head is given is quantized already: in the whole graph RoIAlign stands before it."""

    def _is_quantized(self, node: Node) -> bool:
        if node.op == "placeholder":
            self._mark_given(node)
        return super()._is_quantized(node)

    def _quantize_float_producers(self, model: GraphModule) -> None:
        self._mark_given(next(node for node in model.graph.nodes if node.op == "placeholder"))
        super()._quantize_float_producers(model)

    def _mark_given(self, node: Node) -> None:
        if Q_ANNOTATION_KEY not in node.meta:
            self._mark(node, {}, self._output_spec(node))


class TrainingNetwork(nn.Module):
    """Trunk and box head with fake quantizers, their scales and their trainable weights.

    Args:
        folded: the static detector, BatchNorm folded; its weights are copied.
        encodings: the scales to begin with, and what stays float.

    Raises:
        CalibrationError: the encodings have a row that this form of the detector does not quantize.
    """

    def __init__(self, folded: StaticDetector, encodings: Encodings) -> None:
        super().__init__()
        spec = folded.spec
        image = torch.zeros(2, 3, spec.padded_height_px, spec.padded_width_px)
        with torch.no_grad():
            levels = folded.roi_heads.box_roi_pool.levels  # type: ignore[union-attr]
            features = Trunk(folded)(image)[0]
            channels = features[levels[0]].shape[1]  # type: ignore[index]
        pooled = torch.zeros(2, channels, *folded.roi_heads.box_roi_pool.output_size)  # type: ignore[union-attr, misc]
        kept = encodings.keep_float
        pools = any(row.key == POOLED_KEY for row in encodings.rows)
        of_head = _HeadQuantizer if pools else SymmetricInt8Quantizer
        weights = WeightFakeQuantize.with_args(whole=encodings.scheme == PER_TENSOR)
        self.trunk, trunk_keys = _prepare(Trunk(folded), image, SymmetricInt8Quantizer, weights, kept)
        self.head, head_keys = _prepare(Head(folded), pooled, of_head, weights, kept)
        self.activations: dict[str, ActivationFakeQuantize] = {}
        self.weights: dict[str, list[WeightFakeQuantize]] = {}
        self.observing = True
        self.trunk_sites = self._collect(self.trunk, trunk_keys)
        self.head_sites = self._collect(self.head, head_keys)
        self._link(self.trunk)
        self._link(self.head)
        self._begin(encodings, kept)
        self.observe(False)

    def forward(self, images: Tensor) -> TrunkOutput:
        """Return what the trunk gives; `head` is called with what was pooled."""
        found: TrunkOutput = self.trunk(images)
        return found

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield weights and biases under the names that they have in the folded detector."""
        for graph in (self.trunk, self.head):
            yield from graph.named_parameters()

    def observe(self, wanted: bool) -> None:
        """Let the scales follow what is seen, or freeze them, those of the weights too."""
        self.observing = wanted
        for quantizer in self._distinct():
            quantizer.observing, quantizer.seen = wanted, None
        for quantizers in self.weights.values():
            for weight in quantizers:
                weight.frozen = None
                if not wanted:
                    weight.freeze()

    def follow(self, momentum: float) -> None:
        """After a step: move the scales a part of the way to what it saw."""
        watching = [(quantizer, quantizer.seen) for quantizer in self._distinct()]
        seen = [(quantizer, value) for quantizer, value in watching if value is not None]
        if not seen:
            return
        values = torch.stack([value for _, value in seen]).tolist()  # one copy from the device, not one each
        for (quantizer, _), value in zip(seen, values, strict=True):
            quantizer.follow(value, momentum)
            quantizer.seen = None

    def snapshot(self) -> dict[str, Tensor]:
        """Return a copy of everything that training changes, on the CPU."""
        kept = {f"weight/{name}": tensor.detach().cpu().clone() for name, tensor in self.named_weights()}
        for key, quantizer in self.activations.items():
            kept[f"scale/{key}"] = quantizer.scale().cpu().clone()
            kept[f"largest/{key}"] = torch.tensor(quantizer.largest, dtype=torch.float64)
        if not self.observing:
            for key, weights in self.weights.items():
                kept[f"frozen/{key}"] = weights[0].scale().cpu().clone()
        return kept

    @torch.no_grad()
    def restore(self, kept: Mapping[str, Tensor]) -> None:
        """Take back what `snapshot` gave."""
        for name, tensor in self.named_weights():
            tensor.copy_(kept[f"weight/{name}"])
        self.observe(not any(name.startswith("frozen/") for name in kept))
        for key, quantizer in self.activations.items():
            quantizer.current.copy_(kept[f"scale/{key}"])
            quantizer.largest = float(kept[f"largest/{key}"])
        if not self.observing:
            for key, weights in self.weights.items():
                for weight in weights:
                    weight.frozen = kept[f"frozen/{key}"].to(weight.scale().device)

    def encodings(self, begun_with: Encodings, detector_sha256: str) -> Encodings:
        """Return the table with the scales of now, every row of the one that training began with."""
        rows = tuple(self._row(row) for row in begun_with.rows)
        return msgspec.structs.replace(
            begun_with,
            detector_sha256=detector_sha256,
            rows=rows,
            rows_sha256=digest_of_rows(rows, begun_with.float_rows),
        )

    def _row(self, row: EncodingRow) -> EncodingRow:
        of_weight = row.port == "weight"
        scale = (self.weights[row.key][0] if of_weight else self.activations[row.key]).scale()
        params = msgspec.structs.replace(row.params, scale=tuple(float(value) for value in scale))
        source = row.source if row.source.startswith("shared with ") else "qat"
        return msgspec.structs.replace(row, params=params, source=source)

    def _distinct(self) -> list[ActivationFakeQuantize]:
        return list(dict.fromkeys(self.activations.values()))

    def _collect(self, graph: GraphModule, keys: Mapping[str, str]) -> dict[str, str]:
        """Return the key of what each fake quantizer of an activation gives, by node name."""
        sites: dict[str, str] = {}
        for node in graph.graph.nodes:
            quantizer = getattr(graph, str(node.target)) if node.op == "call_module" else None
            if isinstance(quantizer, ActivationFakeQuantize):
                key = keys[base_of(argument_node(node)).name]
                sites[node.name] = key
                known = self.activations.setdefault(key, quantizer)
                if known is not quantizer:
                    node.target = next(name for name, module in graph.named_modules() if module is known)
        graph.recompile()
        return sites

    def _link(self, graph: GraphModule) -> None:
        """Tell each weight's quantizer what it quantizes, and put the biases on their grids."""
        uses: dict[str, list[tuple[ActivationFakeQuantize, Tensor]]] = {}
        tensors: dict[str, Tensor] = {}
        for node in list(graph.graph.nodes):
            if op_name(node) not in WEIGHTED or argument_node(node, 1).op != "call_module":
                continue
            key = weight_key(node)
            source = getattr(graph, str(argument_node(node).target))
            weight = getattr(graph, str(argument_node(node, 1).target))
            self.weights.setdefault(key, [])
            if weight not in self.weights[key]:
                self.weights[key].append(weight)
            tensors[key] = constant_of(graph, argument_node(argument_node(node, 1)))
            if len(node.args) > 2 and isinstance(node.args[2], Node):
                uses.setdefault(key, []).append((source, constant_of(graph, node.args[2])))
                name = f"{node.name}_bias_on_grid"
                graph.add_submodule(name, BiasOnGrid(source, weight))
                with graph.graph.inserting_before(node):
                    node.update_arg(2, graph.graph.call_module(name, (node.args[2],)))
        for key, tensor in tensors.items():
            for weight in self.weights[key]:
                weight.link(tensor, tuple(uses.get(key, ())))
        graph.graph.lint()
        graph.recompile()

    def _begin(self, encodings: Encodings, kept: tuple[str, ...]) -> None:
        known, rows = self.activations.keys() | self.weights.keys(), encodings.by_key().keys()
        if known != rows:
            where = "whole detector alone" if rows - known else "form that is trained alone"
            raise CalibrationError(
                f"{min(known ^ rows)} is quantized in the {where} ({len(known ^ rows)} such tensors), so it cannot "
                f"be trained as it is exported. Leave out the --keep-float that makes it so: {', '.join(kept)}."
            )
        for row in encodings.rows:
            if row.port != "weight":
                self.activations[row.key].set_scale(row.params.scale[0])


def _prepare(
    module: nn.Module,
    example: Tensor,
    kind: type[SymmetricInt8Quantizer],
    weights: object,
    keep_float: tuple[str, ...],
) -> tuple[GraphModule, dict[str, str]]:
    """Return a part with fake quantizers, and the encodings keys of its nodes by name."""
    graph = export_module(module, example, {0: torch.export.Dim("number", min=1, max=2**20)})
    keys = port_keys(graph)
    if kind is _HeadQuantizer:
        given = next(node for node in graph.graph.nodes if node.op == "placeholder")
        keys[given.name] = POOLED_KEY
    quantizer = kind(
        lambda _: activation_spec(ActivationFakeQuantize),
        lambda _: weight_spec(weights),
        keep_float=keep_float,
    )
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torchao announces future moves of its own modules
        prepared: GraphModule = prepare_pt2e(graph, quantizer)
    return prepared, keys
