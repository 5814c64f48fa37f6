"""What comes of comparing every target with every other. Frozen values that save as JSON; none is measured in time."""

from __future__ import annotations

import msgspec

from qexport.artifact import Rung
from qexport.layers import Kind, Stage
from qexport.results import Gate


class CrossTarget(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One column of the table where targets meet."""

    name: str
    """A target's, or `reference`: the quantized reference itself."""
    artifact_sha256: str
    """Empty for the reference."""
    rung: Rung
    kernels: str = ""
    """Which kernels ran, where the runtime has several sets of them."""


class CrossSum(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Values of two targets that were compared, and those that differ, over one layer or several."""

    values: int
    differing: int
    max_step: int
    """Largest difference, in quantization steps."""

    @property
    def per_million(self) -> float:
        """How many of a million values differ."""
        return 1e6 * self.differing / self.values if self.values else 0.0


class CrossLayer(CrossSum, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One layer of two targets, both given the same integers."""

    order: int
    """In order of execution, from 0."""
    path: str
    call: int
    port: str
    stage: Stage
    kind: Kind


class CrossPair(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Two targets, layer by layer."""

    first: str
    second: str
    layers: tuple[CrossLayer, ...]
    """Those that both have, in order of execution."""
    kinds: dict[Kind, CrossSum]
    """By kind of layer; RoIAlign's forms differ, and its line says by how much."""
    promised: CrossSum
    """Over all convolutions, linears and adds: what the gates are about."""
    parts_at: str
    """Module path of the first layer where the two part; empty where they never do."""


class CrossReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Every target against every other: each layer given the integers of the quantized reference."""

    encodings_sha256: str
    """Of the one table that all artifacts were made of."""
    images: int
    split: str
    targets: tuple[CrossTarget, ...]
    """The reference first."""
    pairs: tuple[CrossPair, ...]
    gates: tuple[Gate, ...]
