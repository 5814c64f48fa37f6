"""Whether training and export use the same numbers: int8 codes of the trained network and of the reference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qexport.errors import ExportError
from qexport.quantization.graph import is_image, op_name
from qexport.quantization.local import Recorder
from qexport.quantization.reference import QuantizedDetector
from qexport.training.network import TrainingNetwork

_IMAGE, _POOLED = "image, not yet quantized", "pooled features, not yet quantized"


@dataclass(frozen=True, slots=True)
class Agreement:
    """tensors: compared. values: in them. differing: of these. first: key of the first tensor that differs."""

    tensors: int
    values: int
    differing: int
    first: str = ""

    def require(self) -> None:
        """Refuse a difference.

        Raises:
            ExportError: a value differs.
        """
        if self.differing:
            raise ExportError(
                f"{self.differing} of {self.values} int8 values differ between the trained network and the quantized "
                f"reference, first in {self.first}; expected 0. The result is not written. Please report it."
            )


@torch.no_grad()
def compare_codes(
    network: TrainingNetwork, quantized: QuantizedDetector, given: NDArray[np.generic]
) -> Agreement:
    """Compare every quantized activation on one image.

    The two compute on their own from the image on; the box head is given the boxes that the reference pooled.

    Args:
        network: trained, its scales frozen.
        quantized: the reference, of the weights and encodings that training came to.
        given: what the static form takes: a frame, or the normalised image.
    """
    nodes = quantized.quantize_nodes
    image = next(node.name for node in quantized.float_graph.graph.nodes if is_image(node))
    pooled = next(
        node.name for node in quantized.graph.graph.nodes if op_name(node) == "multiscale_roi_align"
    )
    wanted = {node.name: key for key, node in nodes.items()} | {image: _IMAGE, pooled: _POOLED}
    reference = Recorder(quantized.graph, wanted)
    reference.run(torch.from_numpy(given))
    found: dict[str, Tensor] = {}
    for graph, sites, given_to in (
        (network.trunk, network.trunk_sites, _IMAGE),
        (network.head, network.head_sites, _POOLED),
    ):
        trained = Recorder(graph, sites)
        trained.run(reference.values[given_to])
        found |= trained.values
    values, differing, first = 0, 0, ""
    for key in nodes:
        expected = reference.values[key]
        codes = torch.round(found[key] / network.activations[key].scale()).to(torch.int8)
        values += expected.numel()
        different = int((codes.reshape(expected.shape) != expected).sum())
        differing += different
        first = first or (key if different else "")
    return Agreement(len(nodes), values, differing, first)
