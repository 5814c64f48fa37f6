"""Operators in float32 that every runtime with a lowering of our own computes as torch does."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name
from graph_cases import Case, case
from torch import Tensor, nn

MAP, ROWS = (1, 6, 5, 7), (4, 9)


class Select(nn.Module):
    """Rows of a table, by constant indices."""

    index: Tensor

    def __init__(self, index: list[int], axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("index", torch.tensor(index))

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(self.axis, self.index)


FLOAT_CASES: dict[str, Case] = {
    "conv2d": case(nn.Conv2d(6, 4, 3, padding=1), MAP),
    "conv2d, padding on both sides": case(nn.Conv2d(6, 4, 3, 2, 1), (1, 6, 8, 12)),
    "conv2d of padding same, dilated": case(
        nn.Conv2d(6, 4, (3, 4), padding="same", dilation=2), (1, 6, 9, 11)
    ),
    "conv2d of padding valid": case(nn.Conv2d(6, 4, 3, padding="valid"), MAP),
    "conv2d depthwise, no bias": case(nn.Conv2d(6, 12, 3, padding=1, groups=6, bias=False), MAP),
    "conv2d then relu6": case(nn.Sequential(nn.Conv2d(6, 4, 1), nn.ReLU6()), MAP, scales=[0.5]),
    "linear": case(nn.Linear(9, 5), ROWS),
    "linear of a flat map": case(nn.Sequential(nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(140, 3)), MAP),
    "linear of three axes": case(nn.Linear(7, 3), (2, 5, 7)),
    "linear of a map": case(nn.Sequential(nn.Conv2d(6, 4, 1), nn.Linear(7, 3)), MAP),
    "adaptive_avg_pool2d": case(nn.AdaptiveAvgPool2d(1), MAP),
    "adaptive_avg_pool2d of equal windows": case(nn.AdaptiveAvgPool2d((2, 3)), (1, 6, 8, 9)),
    "avg_pool2d": case(nn.AvgPool2d(2), MAP),
    "avg_pool2d, other stride": case(nn.AvgPool2d((3, 2), (1, 2)), MAP),
    "avg_pool2d that leaves one pixel of more": case(nn.AvgPool2d(3, 6), MAP),
    "mean of a map": case(lambda x: x.mean((2, 3)), MAP),
    "mean of one axis": case(lambda x: x.mean(2), MAP),
    "mean of channels, axis kept": case(lambda x: x.mean(1, keepdim=True), MAP),
    "mean of channels of a column": case(lambda x: x.mean(1), (1, 6, 5, 1)),
    "mean of everything": case(lambda x: x.mean().reshape(1), MAP),
    "mean of rows": case(lambda x: x.mean(-1), ROWS),
    "max_pool2d": case(nn.MaxPool2d(3, 2, 1), MAP),
    "max_pool2d of negative values": case(lambda x: F.max_pool2d(x - 10, 3, 2, 1), MAP),
    "upsample_nearest2d": case(nn.Upsample(size=(11, 20)), MAP),
    "add": case(lambda x, y: x + y, MAP, (1, 6, 1, 1)),
    "add of a map and a row of columns": case(lambda x, y: x + y, MAP, (7,)),
    "add of a number": case(lambda x: 3 + x, MAP),
    "sub": case(lambda x, y: x - y, MAP, MAP),
    "mul": case(lambda x, y: 2 * x * y, MAP, (1, 6, 1, 1)),
    "mul of numbers and bools": case(lambda x, y: x * (y > 0), ROWS, ROWS),
    "mul of integers and numbers": case(lambda x: (x > 0).sum(1) * x[:, 0], ROWS),
    "div": case(lambda x, y: x / y.exp(), ROWS, ROWS),
    "div by a number": case(lambda x: x / 3, MAP),
    "exp": case(torch.exp, MAP),
    "remainder": case(lambda x: x.remainder(0.7), ROWS),
    "comparisons": case(lambda x, y: torch.stack([x < y, x <= y, x > y, x >= y, x > 0]), ROWS, ROWS),
    "and, or": case(lambda x, y: torch.stack([(x > 0) & (y > 0), (x > 0) | (y > 0)]), ROWS, ROWS),
    "clamp": case(lambda x: x.clamp(-1, 2), MAP),
    "clamp from below": case(lambda x: x.clamp(min=0.5), MAP),
    "clamp from above": case(lambda x: x.clamp(max=0.5), MAP),
    "hardtanh": case(nn.Hardtanh(), MAP),
    "hardtanh of other limits": case(nn.Hardtanh(-0.5, 3.0), MAP),
    "hardsigmoid": case(nn.Hardsigmoid(), MAP, scales=[1 / 16]),
    "hardswish": case(nn.Hardswish(), MAP, scales=[1 / 16]),
    "sigmoid": case(nn.Sigmoid(), MAP),
    "silu": case(nn.SiLU(), MAP),
    "relu": case(nn.ReLU(), MAP),
    "softmax": case(lambda x: x.softmax(-1), ROWS),
    "softmax of the last axis by number": case(lambda x: x.softmax(3), MAP),
    "sum of a map": case(lambda x: x.sum().reshape(1), MAP),
    "sum over axes": case(lambda x: x.sum((0, 2)), MAP),
    "sum over an axis, kept": case(lambda x: x.sum(1, keepdim=True), ROWS),
    "sum of bools": case(lambda x: (x > 0).sum().reshape(1), ROWS),
    "topk": case(lambda x: x.topk(3)[0], ROWS),
    "where": case(lambda x, y: torch.where(x > 0, x, y), MAP, MAP),
    "where, else a number": case(lambda x: torch.where(x > 0, x, -1.0), MAP),
    "pad": case(lambda x: F.pad(x, (1, 2, 0, 3)), MAP),
    "pad of another number": case(lambda x: F.pad(x, (0, 0, 2, 0), value=-4.5), ROWS),
    "cat": case(lambda x, y: torch.cat([x, y], -1), ROWS, (4, 2)),
    "cat of maps and their sum": case(lambda x, y: torch.cat([F.max_pool2d(x, 1), y], 1), MAP, MAP),
    "clone": case(lambda x: x.permute(1, 0).clone(memory_format=torch.contiguous_format), ROWS),
    "contiguous": case(lambda x: x.permute(1, 0).contiguous(), ROWS),
    "dropout": case(nn.Sequential(nn.Dropout(), nn.ReLU()), ROWS),
    "flatten": case(lambda x: x.flatten(2), MAP),
    "index_select": case(Select([3, 0, 3], 0), ROWS),
    "index_select of columns": case(Select([8, 1], 1), ROWS),
    "permute": case(lambda x: x.permute(0, -1, 1, 2), MAP),
    "permute of a map": case(lambda x: F.max_pool2d(x, 2).permute(0, 2, 3, 1), MAP),
    "permute of a map to another order": case(lambda x: F.max_pool2d(x, 2).permute(0, 3, 1, 2), MAP),
    "reshape": case(lambda x: x.permute(1, 0).reshape(2, -1), ROWS),
    "reshape of a map": case(lambda x: F.max_pool2d(x, 2).reshape(3, -1), MAP),
    "select": case(lambda x: x[:, -2], ROWS),
    "select from a map": case(lambda x: F.max_pool2d(x, 2)[:, 1], MAP),
    "slice": case(lambda x: x[1:3, ::2], ROWS),
    "slice from the end": case(lambda x: x[-3:, :-1], ROWS),
    "slice of a map": case(lambda x: F.max_pool2d(x, 2)[:, 1:5:2, :, 1:], MAP),
    "stack": case(lambda x, y: torch.stack([x, y], 1), ROWS, ROWS),
    "stack along the last axis": case(lambda x, y: torch.stack([x, y], -1), ROWS, ROWS),
    "unsqueeze": case(lambda x: x.unsqueeze(-1), ROWS),
    "view": case(lambda x: x.view(2, 18), ROWS),
}
