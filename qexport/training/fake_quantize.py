"""Fake quantizers: the arithmetic of the quantized reference, with gradients that pass straight through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qexport.encodings import ACTIVATION_RANGE, WEIGHT_RANGE
from qexport.quantization.observers import SMALLEST_SCALE, SymmetricObserver, round_up
from qexport.quantization.reference import BIAS_LIMIT

_STEPS = 127
"""Largest code of a symmetric int8 tensor."""


class ActivationFakeQuantize(SymmetricObserver):
    """Rounds an activation to its int8 grid; notes the largest magnitude while it observes.

    The scale that is trained with is the scale that the table gets: a plain value, rounded as calibration rounds.
    """

    current: Tensor
    zero_point: Tensor

    def __init__(self, **spec: object) -> None:
        super().__init__(**spec)  # type: ignore[arg-type]
        self.register_buffer("current", torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32))
        self.largest = _STEPS * 1.0
        """Moving average of the largest magnitude of a step."""
        self.seen: Tensor | None = None
        """Largest magnitude since the last step."""
        self.observing = False

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` on the grid."""
        if self.observing:
            largest = x.detach().abs().amax()
            self.seen = largest if self.seen is None else torch.maximum(self.seen, largest)
        fake: Tensor = torch.fake_quantize_per_tensor_affine(
            x, self.current, self.zero_point, *ACTIVATION_RANGE
        )
        return fake

    def scale(self) -> Tensor:
        """Return the scale, (1,) float32."""
        return self.current

    def set_scale(self, scale: float) -> None:
        """Take a scale of the encodings."""
        self.current.fill_(scale)
        self.largest = scale * _STEPS

    def follow(self, seen: float, momentum: float) -> None:
        """Move the scale a part of the way to the largest magnitude that a step saw."""
        self.largest += momentum * (seen - self.largest)
        self.current.fill_(round_up(max(self.largest / _STEPS, SMALLEST_SCALE)))


class WeightFakeQuantize(SymmetricObserver):
    """Rounds a weight to its int8 grid, its scales those of the weight as it is now or frozen.

    Args:
        whole: the channels share the scale of the widest.
        spec: as torchao gives it.
    """

    frozen: Tensor | None

    def __init__(self, *, whole: bool = False, **spec: object) -> None:
        super().__init__(**spec)  # type: ignore[arg-type]
        self._whole = whole
        self.register_buffer("frozen", None)
        # In tuples, so that the same parameters are not registered here once more.
        self._weight: tuple[Tensor, ...] = ()
        self._uses: tuple[tuple[ActivationFakeQuantize, Tensor], ...] = ()

    def link(self, weight: Tensor, uses: tuple[tuple[ActivationFakeQuantize, Tensor], ...]) -> None:
        """Say which weight this is, and for each call with a bias what quantizes its input."""
        self._weight, self._uses = (weight,), uses

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` on the grid."""
        scale = self.scale()
        zero = torch.zeros_like(scale, dtype=torch.int32)
        fake: Tensor = torch.fake_quantize_per_channel_affine(x, scale, zero, 0, *WEIGHT_RANGE)
        return fake

    @torch.no_grad()
    def scale(self) -> Tensor:
        """Return the scales, (channels,) float32; raised where a bias would not fit into int32 otherwise."""
        if self.frozen is not None:
            return self.frozen
        (weight,) = self._weight
        scale = (weight.detach().flatten(1).abs().amax(1) / _STEPS).clamp(min=SMALLEST_SCALE)
        for source, bias in self._uses:
            scale = torch.maximum(scale, bias.detach().abs() / (source.scale() * BIAS_LIMIT))
        return scale.amax().expand_as(scale).contiguous() if self._whole else scale

    def freeze(self) -> None:
        """Keep the scales as they are now."""
        self.frozen = self.scale().clone()


class BiasOnGrid(nn.Module):
    """Rounds a bias to the int32 grid of its call, as the quantized reference does."""

    def __init__(self, source: ActivationFakeQuantize, weight: WeightFakeQuantize) -> None:
        super().__init__()
        self._scales = (source, weight)  # a tuple: they are modules of the graph already

    def forward(self, bias: Tensor) -> Tensor:
        """Return (channels,) float32."""
        source, weight = self._scales
        step = source.scale() * weight.scale()
        rounded: Tensor = _RoundThrough.apply(bias / step)
        return rounded * step


class _RoundThrough(torch.autograd.Function):
    """Rounds; the gradient passes as if it had not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        del ctx
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        del ctx
        return gradient
