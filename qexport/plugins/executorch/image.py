"""The camera frame to the detector's image, channels last, in XNNPACK.

torchvision normalises, then resizes. A bilinear resize keeps constants, so resizing first and normalising the
smaller image gives the same values within float rounding. At a factor of 2 or 4 it is an average of the middle pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import Node

from qexport.plugins.executorch.held import Held, as_plain
from qexport.plugins.executorch.lowering import Lowering
from qexport.plugins.executorch.steps import Value
from qexport.plugins.executorch.xnnpack import SegmentBuilder
from qexport.quantization.graph import argument_node


def normalised_image(lowering: Lowering, node: Node) -> Held:
    """Write `qexport.detectors.operators.normalised_image`: (H, W, 3) uint8 to a map of float32."""
    xnnpack = lowering.xnnpack
    frame = as_plain(xnnpack, lowering.real(argument_node(node)))
    mean, std, resized, padded = _settings(node)
    image = xnnpack.convert(frame, None)
    image = xnnpack.reshape(image, (1, *frame.shape))
    factor, shift = (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
    factors = (frame.shape[0] / resized[0], frame.shape[1] / resized[1])
    if factors in {(2.0, 2.0), (4.0, 4.0)}:
        edge, step = int(factors[0]) // 2 - 1, int(factors[0])
        for axis in (1, 2):
            image = xnnpack.cut(image, axis, edge, image.shape[axis])
        image = _scaled(xnnpack, image, factor / 4, shift, window=2, step=step)
    else:
        if factors != (1.0, 1.0):
            image = xnnpack.bilinear(image, *resized)
        image = _scaled(xnnpack, image, factor, shift, window=1, step=1)
    rows, columns = padded[0] - resized[0], padded[1] - resized[1]
    return Held.map(xnnpack.pad(image, [0, 0, 0, 0], [0, rows, columns, 0]))


def _scaled(
    xnnpack: SegmentBuilder,
    image: Value,
    factor: NDArray[np.float32],
    shift: NDArray[np.float32],
    *,
    window: int,
    step: int,
) -> Value:
    """Return the sum over a window of each channel times its factor, and its shift: a depthwise convolution."""
    channels = image.shape[3]
    filters = np.broadcast_to(factor, (1, window, window, channels)).astype(np.float32)
    weights = [xnnpack.steps.constant(torch.from_numpy(array.copy())) for array in (filters, shift)]
    return xnnpack.convolution(
        image, weights, stride=(step, step), padding=(0, 0), dilation=(1, 1), groups=channels, channels=channels
    )  # fmt: skip


def _settings(node: Node) -> tuple[Any, Any, tuple[int, int], tuple[int, int]]:
    given: Any = node.args[1:]
    mean, std = (np.asarray(values, np.float64) for values in given[:2])
    resized, padded = ((int(values[0]), int(values[1])) for values in given[2:4])
    return mean, std, resized, padded
