"""Where a tensor of the graph is held, and in which layout: XNNPACK's maps are channels last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qexport.plugins.executorch.steps import Value
from qexport.plugins.executorch.xnnpack import SegmentBuilder

Layout = Literal["plain", "map", "flat map"]
"""`plain`: as the graph has it. `map`: (N, C, H, W) held as (N, H, W, C). `flat map`: (N, C * H * W) held as
(N, H * W * C)."""


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor of the graph."""

    value: Value
    shape: tuple[int, ...]
    """In the graph, batch first, channels second."""
    layout: Layout = "plain"
    of: tuple[int, int, int] | None = None
    """Channels, height and width of the map that a flat map was."""

    @classmethod
    def plain(cls, value: Value) -> Held:
        """Hold a tensor as the graph has it."""
        return cls(value, value.shape)

    @classmethod
    def map(cls, value: Value) -> Held:
        """Hold a (N, H, W, C) map."""
        batch, height, width, channels = value.shape
        return cls(value, (batch, channels, height, width), "map")

    def with_value(self, value: Value) -> Held:
        """Hold another tensor in the same way."""
        return Held(value, self.shape, self.layout, self.of)

    @property
    def stored(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """The shape it is stored in and the order of axes that takes it to the graph's; None where they agree."""
        if self.layout == "map":
            return self.value.shape, (0, 3, 1, 2)
        if self.layout == "flat map" and self.of is not None:
            channels, height, width = self.of
            return (self.shape[0], height, width, channels), (0, 3, 1, 2)
        return None


def as_plain(xnnpack: SegmentBuilder, held: Held) -> Value:
    """Return a tensor in the graph's own layout."""
    stored = held.stored
    if stored is None:
        return held.value
    shape, order = stored
    return xnnpack.reshape(xnnpack.transpose(xnnpack.reshape(held.value, shape), order), held.shape)


def as_map(xnnpack: SegmentBuilder, held: Held) -> Value:
    """Return a (N, C, H, W) tensor as (N, H, W, C)."""
    return held.value if held.layout == "map" else xnnpack.transpose(held.value, (0, 2, 3, 1))


def as_held(xnnpack: SegmentBuilder, held: Held, like: Held) -> Held:
    """Return a tensor in the layout of another, or in the graph's own where it cannot be in that."""
    if held.layout == like.layout and held.of == like.of:
        return held
    if like.layout == "map" and len(held.shape) == len(like.shape):
        return Held.map(as_map(xnnpack, held))
    return Held.plain(as_plain(xnnpack, held))
