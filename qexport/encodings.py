"""The encodings table: what is quantized, with which scale, at which place of the detector.

One row per module path, call and port. A port is `weight` (per output channel), or `output:OP` for
what the operator OP of that module computes, after the BatchNorm and the activation that are fused
into it (`output:conv2d`, `output:add`; a second one of the same operator in one call of the module is
`output:add#1`). A module that is called several times (the RPN head, once per pyramid level) has one
row per call. The quantized graph is rebuilt bit for bit from the detector and this table.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import msgspec

from qexport.errors import EncodingsError
from qexport.files import read_json, sha256_json, write_json

FORMAT_VERSION = 1
ACTIVATION_RANGE = (-128, 127)
WEIGHT_RANGE = (-127, 127)
PER_CHANNEL, PER_TENSOR = "int8-symmetric-per-channel", "int8-symmetric-per-tensor"
"""The schemes: they differ in the scales of weights alone. With the second all channels of a weight have the same."""
ACTIVATIONS = "int8-symmetric-activations"
"""The scheme of feature maps alone: weights and biases stay float, and the table has no rows of weights."""


class QuantParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How real values become integers: `q = clamp(round(x / scale) + zero_point, qmin, qmax)`."""

    scale: tuple[float, ...]
    """One value for the whole tensor, or one per channel along `axis`; float32 values."""
    zero_point: int = 0
    dtype: Literal["int8"] = "int8"
    qmin: int = -128
    qmax: int = 127
    axis: int | None = None
    """The channel axis of a per-channel scale; None for a scale of the whole tensor."""


class EncodingRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One quantized tensor of the detector."""

    path: str
    """Module path, as in `named_modules()`."""
    call: int
    """Which call of that module, from 0."""
    port: str
    """`weight`, or `output:OP`."""
    params: QuantParams
    source: str
    """Where the scale came from: `min-max`, `percentile 99.99`, `mse`, `shared with PATH@CALL/PORT`, ..."""

    @property
    def key(self) -> str:
        """The row's name: `backbone.body.conv1@0/output:conv2d`."""
        return row_key(self.path, self.call, self.port)


class FloatRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A layer that stays float, and why."""

    path: str
    call: int
    op: str
    reason: str


class Encodings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The table, with what it belongs to."""

    detector_sha256: str
    """Fingerprint of architecture, weights and static form that the rows were made for."""
    scheme: str
    """`PER_CHANNEL`, `PER_TENSOR` or `ACTIVATIONS`, as the rows are."""
    calibration: dict[str, str | int | float]
    """How the scales were decided: observer, images, seed, dataset hash."""
    keep_float: tuple[str, ...]
    """Patterns of module paths that the user kept in float."""
    rows: tuple[EncodingRow, ...]
    float_rows: tuple[FloatRow, ...]
    rows_sha256: str
    """Digest of `rows` and `float_rows`: an edited table is refused."""
    format_version: int = FORMAT_VERSION

    def by_key(self) -> dict[str, EncodingRow]:
        """Return the rows under their keys."""
        return {row.key: row for row in self.rows}


def row_key(path: str, call: int, port: str) -> str:
    """Return the one name of a quantized tensor: `PATH@CALL/PORT`."""
    return f"{path}@{call}/{port}"


Origin = Literal["checkpoint", "requantized", "shared", "calibrated"]
"""Where a scale comes from, as the first words of `EncodingRow.source` say."""


def origin_of(row: EncodingRow) -> Origin:
    """Return where a row's scale comes from."""
    for origin, words in _ORIGINS.items():
        if row.source.startswith(words):
            return origin
    return "calibrated"


_ORIGINS: dict[Origin, str] = {
    "checkpoint": "checkpoint: ",
    "requantized": "requantized: ",
    "shared": "shared with ",
}


def without_weights(encodings: Encodings) -> Encodings:
    """Return the table of the same feature maps with float weights."""
    rows = tuple(row for row in encodings.rows if row.port != "weight")
    return msgspec.structs.replace(
        encodings, scheme=ACTIVATIONS, rows=rows, rows_sha256=digest_of_rows(rows, encodings.float_rows)
    )


def digest_of_rows(rows: tuple[EncodingRow, ...], float_rows: tuple[FloatRow, ...]) -> str:
    """Return the digest that `Encodings.rows_sha256` must hold."""
    return sha256_json([rows, float_rows])


def save_encodings(encodings: Encodings, path: Path) -> Path:
    """Write the table as JSON; return `path`."""
    return write_json(path, encodings)


def load_encodings(path: Path) -> Encodings:
    """Read a table and check it.

    Raises:
        EncodingsError: missing, of another version, edited, or with a scale that is zero, negative or not finite.
    """
    return check_encodings(read_json(path, Encodings, EncodingsError), str(path))


def check_encodings(encodings: Encodings, source: str) -> Encodings:
    """Return a table that was read, checked.

    Args:
        encodings: as read.
        source: where from, for messages.

    Raises:
        EncodingsError: as `load_encodings`.
    """
    if encodings.format_version != FORMAT_VERSION:
        raise EncodingsError(
            f"{source}: encodings of format {encodings.format_version}, "
            f"this qexport reads format {FORMAT_VERSION}. Calibrate again with this version."
        )
    for row in encodings.rows:
        bad = [scale for scale in row.params.scale if not (math.isfinite(scale) and scale > 0)]
        if bad or not row.params.scale:
            raise EncodingsError(
                f"{source}: row {row.key} has scale {bad[0] if bad else 'missing'}; a scale is finite and "
                "above zero. Calibrate again, or keep the layer in float with --keep-float."
            )
        if row.params.zero_point != 0:
            raise EncodingsError(
                f"{source}: row {row.key} has zero point {row.params.zero_point}; the scheme has 0."
            )
    found = digest_of_rows(encodings.rows, encodings.float_rows)
    if found != encodings.rows_sha256:
        raise EncodingsError(
            f"{source}: the rows were edited after calibration (digest {found[:12]}, "
            f"written {encodings.rows_sha256[:12]}). Calibrate again; to leave a layer in float use --keep-float."
        )
    return encodings
