"""Golden tensors: a frame, and what an artifact computes for it, as files and as digests."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.lib.format import write_array
from numpy.typing import NDArray
from PIL import Image

from qexport.artifact import TensorSite
from qexport.errors import BundleError
from qexport.files import whole_file

Arrays = dict[str, NDArray[np.generic]]


def save_frame(frame: NDArray[np.uint8], path: Path) -> Path:
    """Write a (H, W, 3) uint8 RGB frame as PNG, which loses nothing; return `path`."""
    with whole_file(path) as partial:
        Image.fromarray(frame).save(partial, "PNG")
    return path


def load_frame(path: Path) -> NDArray[np.uint8]:
    """Read a frame; (H, W, 3) uint8 RGB.

    Raises:
        BundleError: no PNG in RGB.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            pixels = np.array(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise BundleError(f"{path}: no frame can be read: {error}. Make the bundle again.") from error
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise BundleError(f"{path}: {pixels.dtype} of shape {pixels.shape}; a frame is uint8 RGB.")
    return pixels


def save_arrays(arrays: Mapping[str, NDArray[np.generic]], path: Path) -> Path:
    """Write named arrays as .npz, compressed and without a date; return `path`."""
    with whole_file(path) as partial, zipfile.ZipFile(partial, "w") as out:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy")  # of 1980
            entry.compress_type = zipfile.ZIP_DEFLATED
            with out.open(entry, "w") as stream:
                write_array(stream, np.asarray(array, order="C"), allow_pickle=False)
    return path


def load_arrays(path: Path) -> Arrays:
    """Read named arrays.

    Raises:
        BundleError: not a file of `save_arrays`.
    """
    try:
        with np.load(path, allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path}: no tensors can be read: {error}. Make the bundle again.") from error


def digest(array: NDArray[np.generic]) -> str:
    """Return the SHA-256 of an array's type, shape and values, in hex."""
    found = np.asarray(array, order="C")
    header = f"{found.dtype.str} {found.shape}\n".encode()
    return hashlib.sha256(header + found.tobytes()).hexdigest()


def tensors_of(sites: Sequence[TensorSite]) -> tuple[str, ...]:
    """Return the tensors in which rows of the encodings are found, each once."""
    return tuple(dict.fromkeys(site.tensor for site in sites))


def by_key(sites: Sequence[TensorSite], computed: Mapping[str, NDArray[np.generic]]) -> Arrays:
    """Return the stored tensors by the rows that they are of; of several rows in one tensor, by the first."""
    first: dict[str, str] = {}
    for site in sites:
        first.setdefault(site.tensor, site.key)
    return {key: computed[tensor] for tensor, key in first.items()}
