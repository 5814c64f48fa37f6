"""The result: trained weights under the detector's own names, with the encodings that they were trained with.

    qat.pt = {"format": "qexport qat 1", "state": ..., "encodings": ..., "notes": ...}

Training acts on folded weights. In the detector's own state dict the folded weight stands in the convolution and
BatchNorm is made to do nothing but add the bias: folding that again is the identity, to the last bit.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from qexport.detectors.weights import apply_weights
from qexport.encodings import Encodings
from qexport.errors import CheckpointError
from qexport.files import json_bytes
from qexport.training.folder import save

FORMAT = "qexport qat 1"


def trained_state(
    detector: GeneralizedRCNN, pairs: Mapping[str, str], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return a state dict that loads strictly into `detector`.

    Args:
        detector: as its factory builds it; it is not changed.
        pairs: path of each BatchNorm, and of the layer that it was folded into.
        weights: trained tensors under the names that they have in the folded detector.

    Raises:
        CheckpointError: a BatchNorm whose epsilon leaves no variance that makes it the identity.
    """
    state = {name: tensor.detach().clone() for name, tensor in detector.state_dict().items()}
    for name, tensor in weights.items():
        if name in state:
            state[name] = tensor.detach().cpu().clone()
    for norm_path, path in pairs.items():
        norm = detector.get_submodule(norm_path)
        # Folding adds two zeros to the bias, which makes +0 of -0.
        bias = weights[f"{path}.bias"].detach().cpu() + 0.0
        if f"{path}.bias" in state:
            state[f"{path}.bias"] = torch.zeros_like(bias)
        if f"{norm_path}.weight" in state:
            state[f"{norm_path}.weight"] = torch.ones_like(bias)
            state[f"{norm_path}.bias"] = bias
            state[f"{norm_path}.running_mean"] = torch.zeros_like(bias)
        else:  # without weight and bias of its own
            state[f"{norm_path}.running_mean"] = -bias
        state[f"{norm_path}.running_var"] = torch.full_like(bias, neutral_variance(norm, norm_path))
    return state


def neutral_variance(norm: nn.Module, path: str) -> float:
    """Return the float32 variance with which a BatchNorm divides by exactly 1.

    Raises:
        CheckpointError: no variance does.
    """
    eps = float(norm.eps)  # type: ignore[arg-type]
    candidate = torch.tensor(1.0 - eps)
    neighbours = [candidate]
    for towards in (-torch.inf, torch.inf):
        value = candidate
        for _ in range(4):
            value = torch.nextafter(value, torch.tensor(towards))
            neighbours.append(value)
    for value in neighbours:
        if float(torch.rsqrt(value + eps)) == 1.0:
            return float(value)
    raise CheckpointError(
        f"{path}: a BatchNorm with eps {eps:g} cannot be made the identity. Use an eps below 1, as 1e-5."
    )


def with_state(detector: GeneralizedRCNN, state: Mapping[str, Tensor]) -> GeneralizedRCNN:
    """Return a copy of a detector with a state dict in it."""
    loaded = copy.deepcopy(detector)
    apply_weights(loaded, state, source="the trained weights")
    return loaded.eval().requires_grad_(False)


def save_result(
    path: Path, state: Mapping[str, Tensor], encodings: Encodings, notes: Mapping[str, str | int | float]
) -> Path:
    """Write `qat.pt`; `torch.load(path, weights_only=True)` reads it."""
    return save(
        path,
        {
            "format": FORMAT,
            "state": dict(state),
            "encodings": json_bytes(encodings).decode(),
            "notes": dict(notes),
        },
    )
