"""Learned rounding: of each weight's two neighbouring codes, that which keeps the layer's output.

Column by column, as in Frantar et al., GPTQ, 2023, section 3: what rounding one column does to the output is made good
by the columns after it, by the second moments of the layer's own inputs on calibration images. It asks what AdaRound
(Nagel et al., 2020) asks, solved in closed form instead of by gradient descent; scales stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node

from qexport.encodings import WEIGHT_RANGE
from qexport.quantization.graph import argument_node, op_name
from qexport.quantization.partial import PartlyQuantized, Values

MOST_POSITIONS = 256
"""Of one map, that are looked at."""
MOST_COLUMNS = 4608
"""That are solved together; what is wider is solved in parts."""
_DAMPING = 0.01
_BLOCK = 128


def learn_rounding(
    partly: PartlyQuantized,
    weights: dict[str, Tensor],
    scales: dict[str, Tensor],
    frames: Sequence[NDArray[np.generic]],
    *,
    seed: int = 0,
    on_layer: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Return weights that the scales hold exactly, and let the detector have them.

    Args:
        partly: the quantized detector; its weights are replaced.
        weights: the float weights by module path, output channels first.
        scales: of each output channel, by module path.
        frames: what the static detector takes; all are held.
        seed: of the choice of positions.
        on_layer: called after each layer.
    """
    random = torch.Generator().manual_seed(seed)
    int8 = [partly.run(torch.from_numpy(frame), partly.keys) for frame in frames]
    rounded = {}
    for path in partly.layers():
        node = partly.nodes_of(path)[0]
        rounded[path] = _round_layer(
            weights[path], scales[path], _inputs(partly, path, int8, random), _groups(node)
        )
        partly.replace_layer(path, weight=rounded[path])
        int8 = [partly.rerun(values, partly.keys, partly.keys, touched={path}) for values in int8]
        on_layer()
    return rounded


def _round_layer(weight: Tensor, scale: Tensor, inputs: Tensor, groups: int) -> Tensor:
    """Round a layer's weights, group by group.

    Args:
        weight: (out, in / groups, ...).
        scale: (out,).
        inputs: (positions, columns of all groups).
        groups: of the convolution.
    """
    rows = weight.flatten(1).double()
    parts, width = [], rows.shape[1]
    each = rows.shape[0] // groups
    for group in range(groups):
        taken = slice(group * each, (group + 1) * each)
        columns = inputs[:, group * width : (group + 1) * width]
        spans = range(0, width, MOST_COLUMNS)
        solved = [
            _round_columns(
                rows[taken, at : at + MOST_COLUMNS], scale[taken], columns[:, at : at + MOST_COLUMNS]
            )
            for at in spans
        ]
        parts.append(torch.cat(solved, 1))
    return torch.cat(parts).float().reshape(weight.shape)


def _round_columns(rows: Tensor, scale: Tensor, inputs: Tensor) -> Tensor:
    given = inputs.double()
    moments = given.T @ given
    diagonal = moments.diagonal()
    silent = diagonal == 0
    diagonal[silent] = 1.0
    diagonal += _DAMPING * float(diagonal[~silent].mean() if bool((~silent).any()) else 1.0)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True)
    left, result = rows.clone(), torch.empty_like(rows)
    step = scale.double()
    for start in range(0, rows.shape[1], _BLOCK):
        end = min(start + _BLOCK, rows.shape[1])
        errors = torch.empty(rows.shape[0], end - start, dtype=torch.float64)
        for column in range(start, end):
            codes = torch.clamp(torch.round(left[:, column] / step), *WEIGHT_RANGE)
            # The real value is that of float32 arithmetic, so that it is on the grid to the last bit.
            result[:, column] = (codes.float() * scale).double()
            error = (left[:, column] - result[:, column]) / factor[column, column]
            left[:, column:end] -= error[:, None] * factor[column, column:end]
            errors[:, column - start] = error
        left[:, end:] -= errors @ factor[start:end, end:]
    return result


def _inputs(partly: PartlyQuantized, path: str, runs: Sequence[Values], random: torch.Generator) -> Tensor:
    """Return what a layer reads, a row for each position that is looked at, columns as the weights have them."""
    found = []
    for node in partly.nodes_of(path):
        for values in runs:
            read: Tensor = values[argument_node(node)]
            if op_name(node) == "conv2d":
                read = _patches(node, read, partly.weight_shape(path))
            chosen = torch.randperm(read.shape[0], generator=random)[:MOST_POSITIONS]
            found.append(read[chosen])
    return torch.cat(found)


def _patches(node: Node, read: Tensor, weight_shape: tuple[int, ...]) -> Tensor:
    """Return (positions, channels * kernel) of a (1, C, H, W) map."""
    height, width = weight_shape[2:]
    stride, padding, dilation = (_pair(node, at, default) for at, default in ((3, 1), (4, 0), (5, 1)))
    unfolded = F.unfold(read, (height, width), dilation=dilation, padding=padding, stride=stride)
    return unfolded[0].T


def _pair(node: Node, index: int, default: int) -> tuple[int, int]:
    """Return an argument of a convolution that has a value for each axis."""
    given = node.args[index] if len(node.args) > index else [default, default]
    assert isinstance(given, (list, tuple))
    first, second = given
    assert isinstance(first, int)
    assert isinstance(second, int)
    return first, second


def _groups(node: Node) -> int:
    groups = node.args[6] if op_name(node) == "conv2d" and len(node.args) > 6 else 1
    assert isinstance(groups, int)
    return groups
