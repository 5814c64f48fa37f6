"""Observers for torchao's PT2E: what they watch becomes a symmetric scale with zero point 0."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor
from torchao.quantization.pt2e.observer import ObserverBase

from qexport.settings import ObserverName

BINS = 4096
"""Bins of the magnitude histogram."""
SMALLEST_SCALE = 2.0**-20
"""A tensor that is all zero still gets a scale."""
_EXACT_COUNT = 2**24
"""Values that are counted at a time: `torch.histc` counts in float32, which is exact up to here."""
SCALE_BITS = 12
"""Significant bits of an activation's scale: 0.02 % at most is given away."""
_STEPS = 127
"""Largest code of a symmetric int8 tensor."""


class SymmetricObserver(ObserverBase):  # type: ignore[misc]
    """Base: what PT2E asks of an observer. Subclasses watch in `forward` and answer `scale()`."""

    def __init__(
        self,
        dtype: torch.dtype = torch.int8,
        qscheme: torch.qscheme = torch.per_tensor_symmetric,
        quant_min: int = -128,
        quant_max: int = 127,
        ch_axis: int = 0,
        is_dynamic: bool = False,
        eps: float = 0.0,
    ) -> None:
        super().__init__(dtype=dtype, is_dynamic=is_dynamic)
        self.qscheme, self.quant_min, self.quant_max = qscheme, quant_min, quant_max
        self.ch_axis, self.eps = ch_axis, eps

    @abstractmethod
    def scale(self) -> Tensor:
        """Return the scale, (1,) or (channels,) float32."""

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Return the scale and zero points of 0, as PT2E asks for them."""
        scale = self.scale()
        return scale, torch.zeros(scale.numel(), dtype=torch.int64)


class Preset(SymmetricObserver):
    """Watches nothing: its scale is given."""

    def __init__(self, *, given: tuple[float, ...], **spec: object) -> None:
        super().__init__(**spec)  # type: ignore[arg-type]
        self.given = torch.tensor(given, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x

    def scale(self) -> Tensor:
        """Return the given scale."""
        return self.given


class MagnitudeHistogram(SymmetricObserver):
    """Histogram of absolute values in constant memory; the clipping value is chosen at the end.

    With `auto` it counts, and is to be given the method that was found best before its scale is asked for.

    The range is a power of two above every value. It doubles when a value reaches it and pairs of bins are merged,
    so counts stay exact.
    """

    def __init__(self, *, method: ObserverName, percentile: float, **spec: object) -> None:
        super().__init__(**spec)  # type: ignore[arg-type]
        self.method, self.percentile = method, percentile
        self.largest = 0.0
        """Largest magnitude seen; infinite once a value was not finite."""
        self.range = 0.0
        self.counts = torch.zeros(BINS, dtype=torch.int64)

    def forward(self, x: Tensor) -> Tensor:
        """Count the magnitudes of `x`; return `x`."""
        magnitude = x.detach().abs()
        largest = float(magnitude.max())
        if not math.isfinite(largest):
            self.largest = math.inf
        if self.largest == math.inf:
            return x
        self.largest = max(self.largest, largest)
        if self.method == "min-max":
            return x
        if self.largest == 0.0:
            self.counts[0] += magnitude.numel()
            return x
        if self.range == 0.0:
            self.range = math.ldexp(1.0, math.frexp(self.largest)[1])
        while self.largest >= self.range:
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.cat([merged, torch.zeros_like(merged)])
            self.range *= 2
        for part in torch.split(magnitude.flatten(), _EXACT_COUNT):
            self.counts += torch.histc(part, BINS, 0.0, self.range).to(torch.int64)
        return x

    @property
    def name(self) -> str:
        """What a row says of the observer that decided its scale."""
        return name_observer(self.method, self.percentile)

    def scale(self) -> Tensor:
        """Return the scale that the method chooses; infinite where a value was not finite."""
        return self.scale_by(self.method, self.percentile)

    def scale_by(self, method: ObserverName, percentile: float) -> Tensor:
        """Return the scale that a method would choose; any, where the observer counts, else min-max's."""
        clip = self.largest
        if not math.isfinite(clip):
            return torch.tensor([clip])
        if self.range > 0.0 and method == "percentile":
            clip = self._at_percentile(percentile)
        elif self.range > 0.0 and method == "mse":
            clip = self._least_error()
        return torch.tensor([round_up(max(clip / _STEPS, SMALLEST_SCALE))], dtype=torch.float32)

    def _at_percentile(self, percentile: float) -> float:
        wanted = math.ceil(int(self.counts.sum()) * percentile / 100)
        bins = int((self.counts.cumsum(0) >= wanted).to(torch.int64).argmax()) + 1
        return min(self.largest, self.range * bins / BINS)

    def _least_error(self) -> float:
        """Return the clipping value with the least squared error; a bin's centre stands for its values."""
        centres = (torch.arange(BINS, dtype=torch.float64) + 0.5) * self.range / BINS
        candidates = self.largest * torch.linspace(0.3, 1.0, 141, dtype=torch.float64)
        scale = (candidates / _STEPS)[:, None]
        restored = torch.clamp(torch.round(centres / scale), max=_STEPS) * scale
        error = ((restored - centres) ** 2 * self.counts).sum(1)
        return float(candidates[int(error.argmin())])


def name_observer(observer: ObserverName, percentile: float) -> str:
    """Return what a table says of an observer."""
    return f"percentile {percentile:g}" if observer == "percentile" else observer


def round_up(scale: float) -> float:
    """Return the next value with `SCALE_BITS` significant bits.

    The last bits of an activation depend on the processor and on the number of threads. Scales that keep them
    make another detector on another machine, since a changed rounding grows with depth.
    """
    mantissa, exponent = math.frexp(scale)
    steps = 2**SCALE_BITS
    # A value a hair above a step is that step, computed elsewhere.
    return math.ldexp(math.ceil(mantissa * steps - 2**-8) / steps, exponent)


class ChannelMax(SymmetricObserver):
    """Largest magnitude per output channel, for weights."""

    def __init__(self, **spec: object) -> None:
        super().__init__(**spec)  # type: ignore[arg-type]
        self.largest = torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        """Note the largest magnitudes of `x`, which does not change while one calibrates; return `x`."""
        if self.largest.numel() == 0:
            self.largest = x.detach().transpose(0, self.ch_axis).flatten(1).abs().amax(1)
        return x

    def scale(self) -> Tensor:
        """Return one scale per channel."""
        return (self.largest / _STEPS).clamp(min=SMALLEST_SCALE).to(torch.float32)
