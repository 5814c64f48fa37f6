"""What a scale of a checkpoint becomes in int8 with zero point 0, and what is lost where it cannot stay."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qexport.calibration.checkpoints.ranges import QatRange
from qexport.encodings import ACTIVATION_RANGE, WEIGHT_RANGE
from qexport.quantization.observers import SMALLEST_SCALE

_STEPS = 127


@dataclass(frozen=True, slots=True)
class Expressed:
    """A scale, and what to say of it."""

    scale: tuple[float, ...]
    source: str
    """Begins `checkpoint: ` or `requantized: `."""
    requantized: bool


def express_activation(entry: QatRange) -> Expressed:
    """Return the scale of an activation with zero point 0.

    The real values that training could represent are `scale * (qmin - zero_point)` to `scale * (qmax - zero_point)`.
    Where these are codes of int8, the scale stays, to the bit: quint8 with zero point 128, and the 7-bit codes of
    `reduce_range` with any zero point. With zero point 127 it stays too, and the last code is clipped to the one
    before it. Elsewhere the smallest symmetric scale that covers them is taken.
    """
    scale, zero = entry.scale[0], entry.zero_point[0]
    low, high = entry.qmin - zero, entry.qmax - zero
    if low >= ACTIVATION_RANGE[0] and high <= ACTIVATION_RANGE[1]:
        narrower = low > -_STEPS or high < _STEPS
        said = f", codes {low} to {high} in training" if narrower else ""
        return Expressed((scale,), f"checkpoint: {entry.buffer}{said}", requantized=False)
    if low >= ACTIVATION_RANGE[0] and high == ACTIVATION_RANGE[1] + 1:
        clipped = f"requantized: {entry.buffer}, zero point {zero} of codes {entry.qmin} to {entry.qmax}"
        return Expressed((scale,), f"{clipped}; same scale, code 128 becomes 127", requantized=True)
    wider = _float32(scale * max(-low, high) / _STEPS)
    lost_db = 20 * math.log10(wider / scale)
    return Expressed(
        (wider,),
        f"requantized: {entry.buffer}, zero point {zero} of codes {entry.qmin} to {entry.qmax}; "
        f"step {scale:.4g} to {wider:.4g}, {lost_db:.1f} dB given away",
        requantized=True,
    )


def express_weight(entry: QatRange, weight: Tensor, factor: Tensor | None) -> Expressed:
    """Return the scales of a weight, one per output channel, zero point 0, codes -127 to 127.

    Args:
        entry: of the checkpoint; one scale, or one per channel.
        weight: (channels, ...) float32, with its BatchNorm folded in.
        factor: (channels,) float32, what folding multiplied the weight by; None where training quantized the folded
            weight, or where there is no BatchNorm. The codes are the same: the factor goes into the scale.
    """
    channels = weight.shape[0]
    trained = torch.tensor(entry.scale, dtype=torch.float32).expand(channels).clone()
    zero = torch.tensor(entry.zero_point).expand(channels)
    said = f", one scale for all {channels} channels" if len(entry.scale) == 1 and channels > 1 else ""
    if factor is not None:
        trained *= factor.abs()
        said += ", times the BatchNorm's factor"
    empty = trained <= 0
    trained[empty] = SMALLEST_SCALE  # a channel without a value in it
    low, high = entry.qmin - zero, entry.qmax - zero
    symmetric = ((zero == 0) | (zero == (entry.qmin + entry.qmax + 1) // 2)) & (high <= _STEPS)
    covering = torch.maximum(-low, high).to(torch.float32)
    scale = torch.where(symmetric, trained, trained * covering / _STEPS)
    if factor is not None:
        low, high = _turned(low, high, factor)
    shape = (channels, *[1] * (weight.ndim - 1))
    before = _quantized(weight, trained.reshape(shape), low.reshape(shape), high.reshape(shape))
    after = _quantized(weight, scale.reshape(shape), *map(torch.tensor, WEIGHT_RANGE))
    changed = int((before != after).sum())
    values = tuple(float(value) for value in scale)
    if not changed:
        return Expressed(values, f"checkpoint: {entry.buffer}{said}", requantized=False)
    return Expressed(
        values,
        f"requantized: {entry.buffer}{said}; {_explain(changed, weight.numel(), before, after, symmetric)}",
        requantized=True,
    )


def _turned(low: Tensor, high: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """A BatchNorm with a negative factor turns the range of codes around."""
    negative = factor < 0
    return torch.where(negative, -high, low), torch.where(negative, -low, high)


def _quantized(weight: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.clamp(torch.round(weight / scale), low, high) * scale


def _explain(changed: int, total: int, before: Tensor, after: Tensor, symmetric: Tensor) -> str:
    error = float(((before - after).double() ** 2).sum())
    sqnr_db = 10 * math.log10(float((before.double() ** 2).sum()) / error)
    if bool(symmetric.all()):
        return f"{changed} of {total} codes of -128 became -127, {sqnr_db:.0f} dB"
    return f"zero point not 0, {changed} of {total} values changed, {sqnr_db:.0f} dB"


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))
