"""Between the tensors of an artifact and the codes of the encodings: layouts and zero points."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from qexport.artifact import TensorSite


def codes_of(site: TensorSite, stored: NDArray[np.generic]) -> NDArray[np.int8]:
    """Return a stored tensor as int8 codes with zero point 0, in the detector's own layout."""
    codes = (stored.astype(np.int16) - site.zero_point).astype(np.int8)
    if site.stored_shape is not None:
        codes = codes.reshape(site.stored_shape)
    if site.stored_order is not None:
        codes = codes.transpose(site.stored_order)
    if codes.size == math.prod(site.shape):
        codes = codes.reshape(site.shape)
    return np.ascontiguousarray(codes)


def stored_of(
    site: TensorSite, codes: NDArray[np.int8], shape: tuple[int, ...], dtype: np.dtype[np.generic]
) -> NDArray[np.generic]:
    """Return codes as the artifact stores them: what `codes_of` undoes.

    Args:
        site: where the tensor is.
        codes: int8, zero point 0, of the site's shape.
        shape: of the stored tensor.
        dtype: of the stored tensor.
    """
    stored = codes.reshape(site.shape)
    if site.stored_order is not None:
        between = site.stored_shape or shape
        turned = tuple(between[axis] for axis in site.stored_order)
        stored = stored.reshape(turned).transpose(np.argsort(site.stored_order))
    return np.ascontiguousarray((stored.astype(np.int16) + site.zero_point).reshape(shape)).astype(dtype)
