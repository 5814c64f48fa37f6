"""Bias correction: take away what quantization adds to the mean of each channel.

Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, 2019, section 4.2, with means
measured on images: layer by layer in order of execution, the corrected ones before the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qexport.quantization.partial import PartlyQuantized


def correct_biases(
    partly: PartlyQuantized,
    biases: dict[str, Tensor],
    frames: Sequence[NDArray[np.generic]],
    *,
    on_layer: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Return corrected biases, and let the detector have them.

    Args:
        partly: the quantized detector; its biases are replaced.
        biases: what they are, by module path; layers without a bias are left as they are.
        frames: what the static detector takes; all are held.
        on_layer: called after each layer.
    """
    given = [torch.from_numpy(frame) for frame in frames]
    floats = [partly.run(frame, frozenset()) for frame in given]
    int8 = [partly.run(frame, partly.keys) for frame in given]
    corrected = {}
    for path in partly.layers():
        if path in biases:
            corrected[path] = biases[path] + _shift(partly, path, floats, int8)
            partly.replace_layer(path, bias=corrected[path])
            int8 = [partly.rerun(values, partly.keys, partly.keys, touched={path}) for values in int8]
        on_layer()
    return corrected


def _shift(partly: PartlyQuantized, path: str, floats: Sequence[dict], int8: Sequence[dict]) -> Tensor:  # type: ignore[type-arg]
    """Return by how much the mean of each channel fell."""
    total, count = torch.zeros(0), 0
    for node in partly.nodes_of(path):
        for wanted, found in zip(floats, int8, strict=True):
            difference: Tensor = (wanted[node].double() - found[node].double()).transpose(0, 1).flatten(1)
            total = difference.sum(1) if not total.numel() else total + difference.sum(1)
            count += difference.shape[1]
    return (total / count).float()
