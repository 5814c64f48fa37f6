"""Numbers as people read them. Every function takes None for "not measured" and returns a dash for it."""

from __future__ import annotations

DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


def decimals(value: float | None, digits: int = 1) -> str:
    """Return a number with that many decimals."""
    if value is None:
        return DASH
    text = f"{value:,.{digits}f}"
    return text.replace("-", MINUS) if float(text.replace(",", "")) else text.lstrip("-")


def signed(value: float | None, digits: int = 1) -> str:
    """Return a number with its sign, `+0.4`."""
    if value is None:
        return DASH
    text = decimals(value, digits)
    return text if text.startswith(MINUS) else f"+{text}"


def count(value: int | None) -> str:
    """Return a whole number with thousands separated."""
    return DASH if value is None else f"{value:,}"


def points(fraction: float | None) -> str:
    """Return an mAP of 0..1 as points of 0..100."""
    return DASH if fraction is None else decimals(100 * fraction, 1)


def percent(fraction: float | None) -> str:
    """Return a share of 0..1 as a percentage."""
    return DASH if fraction is None else f"{decimals(100 * fraction, 1)} %"


def megabytes(value_bytes: int | None) -> str:
    """Return bytes as MB of 1,000,000 bytes."""
    return DASH if value_bytes is None else f"{decimals(value_bytes / 1e6, 2)} MB"


def giga(value: int | None) -> str:
    """Return a large count in units of 10^9, or of 10^6 where that is below 0.1."""
    if value is None:
        return DASH
    return f"{decimals(value / 1e9, 2)} G" if value >= 1e8 else f"{decimals(value / 1e6, 2)} M"


def shape(sizes: tuple[int, ...]) -> str:
    """Return `1 x 64 x 120 x 160` with multiplication signs."""
    return "\N{MULTIPLICATION SIGN}".join(str(size) for size in sizes) or DASH


def speed(ratio: float | None) -> str:
    """Return how much faster: `2.10x faster`, `1.20x slower`."""
    if ratio is None or ratio <= 0:
        return DASH
    times = "\N{MULTIPLICATION SIGN}"
    return f"{ratio:.2f}{times} faster" if ratio >= 1 else f"{1 / ratio:.2f}{times} slower"


def smaller(ratio: float | None) -> str:
    """Return how much smaller: `3.90x smaller`, `1.10x larger`."""
    if ratio is None or ratio <= 0:
        return DASH
    times = "\N{MULTIPLICATION SIGN}"
    return f"{ratio:.2f}{times} smaller" if ratio >= 1 else f"{1 / ratio:.2f}{times} larger"


def words(identifier: str) -> str:
    """Return `over tolerance` for `over_tolerance`."""
    return identifier.replace("_", " ")
