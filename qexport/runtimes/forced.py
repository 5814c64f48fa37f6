"""Between codes by key and the tensors of an artifact that is cut at every site: what goes in, what came out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qexport.artifact import Artifact, TensorSite
from qexport.errors import ArtifactError
from qexport.sites import codes_of, stored_of

COMPUTED = "#computed"
"""Behind a tensor's name: what its layer computes, where the tensor itself is given."""
PROPOSALS = "proposals"


class StoredPort(NamedTuple):
    """Shape and type of a tensor as the artifact stores it."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]


def site_tensors(artifact: Artifact) -> tuple[str, ...]:
    """Return the tensors to cut at, each once."""
    return tuple(dict.fromkeys(site.tensor for site in artifact.sites))


def proposals_tensor(artifact: Artifact) -> str:
    """Return the tensor that the box head pools.

    Raises:
        ArtifactError: the artifact does not say.
    """
    if PROPOSALS not in artifact.float_sites:
        raise ArtifactError(
            f"this {artifact.target} artifact does not say where its proposals are: its layers cannot be run on "
            "proposals that are given. Export again."
        )
    return artifact.float_sites[PROPOSALS]


def stored_codes(
    artifact: Artifact, codes: Mapping[str, NDArray[np.int8]], ports: Mapping[str, StoredPort]
) -> dict[str, NDArray[np.generic]]:
    """Return what each tensor is given.

    Args:
        artifact: that is cut.
        codes: int8 with zero point 0, by key; those of a tensor that is the place of several keys agree.
        ports: of the tensors, by name.

    Raises:
        ArtifactError: codes of a site are missing, or of another shape than the artifact says.
    """
    given: dict[str, NDArray[np.generic]] = {}
    for site in artifact.sites:
        if site.key not in codes:
            raise ArtifactError(
                f"no codes for {site.key}, which the {artifact.target} artifact has: it was made of other "
                "encodings. Export again."
            )
        if codes[site.key].size != int(np.prod(site.shape)):
            raise ArtifactError(
                f"{site.key}: the {artifact.target} artifact has a tensor of {site.shape} there, given codes of "
                f"{codes[site.key].shape}. It was made for another frame, or other proposals: export again."
            )
        if site.tensor not in given:
            port = ports[site.tensor]
            given[site.tensor] = stored_of(site, codes[site.key], port.shape, port.dtype)
    return given


def computed_codes(
    artifact: Artifact,
    computed: Mapping[str, NDArray[np.generic]],
    given: Mapping[str, NDArray[np.generic]],
) -> dict[str, NDArray[np.int8]]:
    """Return what came out, as codes by key.

    Args:
        artifact: that was cut.
        computed: what each tensor's layer computed, by the tensor's name.
        given: what each tensor stood for.
    """
    found: dict[str, NDArray[np.int8]] = {}
    made: dict[str, TensorSite] = {}
    for site in artifact.sites:
        # A tensor that is the place of a second key, a view, has no layer of its own there: it is what it was given.
        first = made.setdefault(site.tensor, site)
        found[site.key] = codes_of(site, (computed if first is site else given)[site.tensor])
    return found
