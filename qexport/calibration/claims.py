"""What a checkpoint's ranges say of the tensors that a detector quantizes, and which of them counts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qexport.calibration.calibrator import Observed
from qexport.calibration.checkpoints.ranges import QatCheckpoint, QatRange
from qexport.calibration.expression import Expressed, express_activation, express_weight
from qexport.calibration.places import Found, Places
from qexport.detectors.static import StaticDetector
from qexport.encodings import row_key
from qexport.errors import CheckpointError
from qexport.quantization.graph import argument_node, constant_of


class Claims:
    """What a checkpoint says of the tensors that a detector quantizes."""

    def __init__(self, static: StaticDetector, observed: Observed, checkpoint: QatCheckpoint) -> None:
        self._static, self._observed, self._checkpoint = static, observed, checkpoint
        self._layers = {key: node for key, node, _ in observed.weights()}
        self.used: set[str] = set()
        """Buffers of the checkpoint that a row was made of, or that agree with one."""
        self._folded = self._norms_are_folded()
        self._group: dict[str, str] = {}
        first: dict[int, str] = {}
        for key, watcher in observed.activations():
            self._group[key] = first.setdefault(id(watcher), key)

    def activations(self) -> dict[str, Expressed]:
        """Return the scale of each activation that the checkpoint says, by key; tensors of one scale have one."""
        places = Places(self._observed, self._checkpoint, norms_are_folded=self._folded)
        claims: dict[str, list[tuple[Found, QatRange]]] = {}
        for entry in self._checkpoint.ranges:
            for found in places.find(entry) if entry.port != "weight" else ():
                claims.setdefault(self._group[found.key], []).append((found, entry))
        said: dict[str, Expressed] = {}
        for group, entries in claims.items():
            said |= self._decide(group, entries)
        return said

    def weights(self) -> dict[str, Expressed]:
        """Return the scales of each weight that the checkpoint says, by key."""
        said: dict[str, Expressed] = {}
        for entry in self._checkpoint.ranges:
            key = row_key(entry.path, 0, "weight")
            if entry.port != "weight" or key not in self._layers:
                continue
            self._require_usable(entry)
            weight = constant_of(self._observed.graph, argument_node(self._layers[key]))
            if len(entry.scale) not in (1, weight.shape[0]):
                raise CheckpointError(
                    f"{self._checkpoint.path}: {entry.buffer} has {len(entry.scale)} scales, {entry.path} has "
                    f"{weight.shape[0]} output channels. The checkpoint is of another detector."
                )
            includes = self._folded if entry.includes_norm is None else entry.includes_norm
            norm = self._checkpoint.norms.get(entry.path)
            factor = None if includes or norm is None else norm_factor(self._static.get_submodule(norm))
            said[key] = express_weight(entry, weight, factor)
            self.used.add(entry.buffer)
        return said

    def _decide(self, group: str, entries: list[tuple[Found, QatRange]]) -> dict[str, Expressed]:
        """Return what the tensors of one scale get: the producer's, and what else the checkpoint says of them."""
        best = max(entries, key=lambda claim: (claim[0].rank > 0, claim[0].key == group, claim[0].rank))
        strongest = [
            entry for found, entry in entries if (found.key, found.rank) == (best[0].key, best[0].rank)
        ]
        for entry in strongest:
            self._require_usable(entry)
        options = [express_activation(entry) for entry in strongest]
        chosen = max(options, key=lambda option: option.scale[0])
        inner = [
            entry for found, entry in entries if found.key == best[0].key and 0 < found.rank < best[0].rank
        ]
        others = [
            express_activation(entry)
            for _, entry in entries
            if entry not in strongest and entry not in inner and not entry.problem
        ]
        self.used.update(entry.buffer for _, entry in entries if entry not in inner)
        differing = [option for option in (*options, *others) if option.scale != chosen.scale]
        if differing and not chosen.requantized:
            chosen = Expressed(
                chosen.scale,
                f"requantized: {chosen.source.removeprefix('checkpoint: ')}; the same tensor has scale "
                f"{differing[0].scale[0]:.6g} by {differing[0].source.partition(': ')[2]}",
                requantized=True,
            )
        shared = Expressed(chosen.scale, f"shared with {group}", chosen.requantized)
        return {
            key: chosen if key == group else shared for key, first in self._group.items() if first == group
        }

    def _require_usable(self, entry: QatRange) -> None:
        if entry.problem:
            raise CheckpointError(
                f"{self._checkpoint.path}: {entry.buffer} cannot be used: {entry.problem}. Train on, and save it "
                "again; or give the function that prepared the model with --qat-prepare FILE:FUNCTION; or keep the "
                f"layer in float with --keep-float {entry.path}."
            )

    def _norms_are_folded(self) -> bool:
        """Tell from the weights' scales whether BatchNorm was folded before training, where the format does not say."""
        plain = folded = 0.0
        for entry in self._checkpoint.ranges:
            norm = self._checkpoint.norms.get(entry.path)
            if entry.port != "weight" or entry.includes_norm is not None or norm is None:
                continue
            weight = self._static.get_submodule(entry.path).weight
            assert isinstance(weight, Tensor)  # of a convolution or a linear
            factor = norm_factor(self._static.get_submodule(norm)).abs()
            scale = torch.tensor(entry.scale) * (entry.qmax - entry.qmin) / 2
            largest = weight.detach().flatten(1).abs().amax(1).clamp(min=1e-12)
            plain += _misfit(largest, scale)
            folded += _misfit((largest * factor).clamp(min=1e-12), scale)
        return folded < plain


def norm_factor(norm: nn.Module) -> Tensor:
    """Return what folding a BatchNorm multiplies a convolution's weight by, (channels,) float32."""
    variance, eps, weight = norm.running_var, norm.eps, norm.weight
    assert isinstance(variance, Tensor) and isinstance(eps, float)  # detectors' BatchNorms track
    factor = torch.rsqrt(variance + eps)
    return (factor * weight if isinstance(weight, Tensor) else factor).detach()


def _misfit(largest: Tensor, scale: Tensor) -> float:
    return float((torch.log(scale) - torch.log(largest)).abs().median())
