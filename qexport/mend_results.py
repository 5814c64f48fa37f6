"""What means against the loss of accuracy gave. Frozen values that save as JSON."""

from __future__ import annotations

import msgspec

NOTE = "mended"
"""Under which a checkpoint's notes hold its report."""
ORIGIN = "mending.json"
"""The report of the mending that a run's checkpoint comes from, in the run's folder."""


class MeansResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one means gave."""

    means: str
    sqnr_db: float
    """Signal to noise at the heads' outputs after it."""
    changed: str
    """What it changed, in words."""
    kept: bool
    """Whether it is in the checkpoint; a means that loses is not."""


class MendReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`mended.json`."""

    encodings_sha256: str
    """Of the table that it began with."""
    images: int
    """That the means saw."""
    held_out: int
    """That the signal to noise is measured on."""
    results: tuple[MeansResult, ...]
    """The first is the detector as it was."""
