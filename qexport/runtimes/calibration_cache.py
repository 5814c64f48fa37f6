"""TensorRT's calibration cache: the ranges that implicit quantization takes, for DLA cores on TensorRT 8 to 10.

One line of kind and version, then one line a tensor: its name and its scale, a big-endian float32 in hexadecimal
(`entropy calibration table` in NVIDIA's samples). Explicit Q/DQ needs none of it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from qexport.errors import ArtifactError

FILE_NAME = "calibration.cache"
_HEADER = re.compile(r"TRT-\d+-EntropyCalibration2")
_LINE = re.compile(r"(?P<name>.+): (?P<bits>[0-9a-f]{8})")
_ANY_VERSION = "TRT-8502-EntropyCalibration2"


def write_cache(scales: Mapping[str, float]) -> str:
    """Return the cache's text: one scale, in real units of one step, for each tensor."""
    lines = [f"{name}: {struct.pack('>f', scale).hex()}" for name, scale in scales.items()]
    return "\n".join([_ANY_VERSION, *lines]) + "\n"


def read_cache(text: str) -> dict[str, float]:
    """Return the scales of a cache.

    Raises:
        ArtifactError: cut off, or no such cache.
    """
    first, *lines = text.splitlines() or [""]
    if not _HEADER.fullmatch(first):
        raise ArtifactError(f"a calibration cache begins with {_ANY_VERSION}, this one with {first[:40]!r}.")
    scales = {}
    for number, line in enumerate(lines, start=2):
        match = _LINE.fullmatch(line)
        if match is None:
            raise ArtifactError(
                f"calibration cache, line {number}: {line[:60]!r} is no `TENSOR: SCALE`. Export again."
            )
        scales[match["name"]] = struct.unpack(">f", bytes.fromhex(match["bits"]))[0]
    return scales


def check_cache(scales: Mapping[str, float], tensors: Collection[str], path: Path) -> None:
    """Refuse the cache of another model.

    Raises:
        ArtifactError: names tensors that the network does not have.
    """
    strange = [name for name in scales if name not in tensors]
    if strange or not scales:
        raise ArtifactError(
            f"{path}: the calibration cache of another model: {len(strange)} of its {len(scales)} tensors are not "
            f"in the network ({', '.join(strange[:3])}). Export again."
        )


def cache_calibrator(trt: Any, path: Path, tensors: Collection[str]) -> Any:
    """Return an `IInt8EntropyCalibrator2` that answers from a cache, never from images.

    Args:
        trt: TensorRT's module, one that still calibrates.
        path: of the cache.
        tensors: names in the network.

    Raises:
        ArtifactError: the cache is damaged, or another model's.
    """
    scales = read_cache(path.read_text(encoding="utf-8"))
    check_cache(scales, tensors, path)
    # The first line says which TensorRT wrote it: 8502 is 8.5.2, 100300 is 10.3.0.
    major, minor, patch = (int(part) for part in str(trt.__version__).split(".")[:3])
    version = major * 10_000 + minor * 100 + patch if major >= 10 else major * 1000 + minor * 100 + patch
    text = write_cache(scales).replace(_ANY_VERSION, f"TRT-{version}-EntropyCalibration2", 1)

    class FromCache(trt.IInt8EntropyCalibrator2):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IInt8EntropyCalibrator2.__init__(self)

        def get_batch_size(self) -> int:
            return 1

        def get_batch(self, names: object) -> None:
            del names

        def read_calibration_cache(self) -> bytes:
            return text.encode()

        def write_calibration_cache(self, cache: object) -> None:
            del cache

    return FromCache()
