"""Each converter's network, evaluated, against the torch function itself."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name
from torch import Tensor, nn
from torch2trt_networks import assert_converts, convert_model
from torchvision.ops.misc import FrozenBatchNorm2d

from qexport.errors import UnsupportedOperator
from qexport.runtimes.tensorrt_library import load_library

Function = Callable[..., Any]


ROUNDED = 1e-6
"""A few roundings of float32 at values of this size."""


def values(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers, a few of which are zero."""
    tensor = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    tensor.flatten()[::7] = 0
    return tensor


def whole(*shape: int, below: int = 50) -> Tensor:
    return torch.randint(-below, below, shape, generator=torch.Generator().manual_seed(1))


IMAGE = values(1, 4, 12, 10)
MATRIX, OTHER = values(5, 6), values(5, 6, seed=2)
POSITIVE = MATRIX.abs() + 0.1
FLAGS, OTHER_FLAGS = MATRIX > 0, OTHER > 0
ROW = values(6, seed=3)
INDEX = torch.tensor([4, 0, 0, 3])
WEIGHT, BIAS = values(8, 4, 3, 3, seed=4) / 10, values(8, seed=5)

ONE_LAYER: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    # arithmetic
    "add": (torch.add, (MATRIX, OTHER)),
    "add a row": (torch.add, (MATRIX, ROW)),
    "add with alpha": (lambda x: torch.add(x, 3, alpha=2), (MATRIX,)),
    "add number first": (lambda x: 2 + x, (MATRIX,)),
    "sub": (operator.sub, (MATRIX, OTHER)),
    "sub from number": (lambda x: 1 - x, (MATRIX,)),
    "rsub": (torch.rsub, (MATRIX, OTHER)),
    "mul": (operator.mul, (MATRIX, OTHER)),
    "mul by flags": (operator.mul, (MATRIX, FLAGS)),
    "mul integers by flags": (operator.mul, (whole(5, 6), FLAGS)),
    "div": (torch.div, (MATRIX, POSITIVE)),
    "div of integers": (lambda x: x / 4, (whole(5, 6),)),
    "div number by": (lambda x: 2 / x, (POSITIVE,)),
    "div to floor": (lambda x: torch.div(x, 3, rounding_mode="floor"), (whole(5, 6),)),
    "div to zero": (lambda x: torch.div(x, 3, rounding_mode="trunc"), (whole(5, 6),)),
    "floor_divide": (lambda x: x // 3, (whole(5, 6),)),
    "pow": (lambda x: x**2, (MATRIX,)),
    "maximum": (torch.maximum, (MATRIX, OTHER)),
    "minimum": (torch.minimum, (MATRIX, OTHER)),
    "remainder": (lambda x: x % 7, (whole(5, 6),)),
    "remainder by negative": (lambda x: torch.remainder(x, -7), (whole(5, 6),)),
    "of a constant": (lambda x: x * torch.arange(6), (MATRIX,)),
    # comparison and logic
    "eq": (operator.eq, (whole(5, 6, below=2), whole(5, 6, below=2).flip(0))),
    "ne": (operator.ne, (MATRIX, 0 * OTHER)),
    "gt": (lambda x: x > 0.5, (MATRIX,)),
    "ge": (operator.ge, (MATRIX, torch.full((5, 6), float("nan")))),
    "ge number": (lambda x: x >= 0.0, (MATRIX,)),
    "lt": (operator.lt, (MATRIX, OTHER)),
    "le": (lambda x: x <= 0, (MATRIX,)),
    "eq of flags": (operator.eq, (FLAGS, OTHER_FLAGS)),
    "and": (operator.and_, (FLAGS, OTHER_FLAGS)),
    "or": (torch.logical_or, (FLAGS, OTHER_FLAGS)),
    "xor": (torch.bitwise_xor, (FLAGS, OTHER_FLAGS)),
    "not": (operator.invert, (FLAGS,)),
    "logical and of numbers": (torch.logical_and, (MATRIX, OTHER)),
    # unary
    **{
        name: (getattr(torch, name), (MATRIX,))
        for name in ("exp", "abs", "neg", "floor", "ceil", "round", "sign")
    },
    **{name: (getattr(torch, name), (POSITIVE,)) for name in ("log", "sqrt", "reciprocal")},
    "sin": (torch.sin, (MATRIX,)),
    "cos": (torch.cos, (MATRIX,)),
    "erf": (torch.erf, (MATRIX,)),
    "minus": (operator.neg, (MATRIX,)),
    # activations
    "relu": (torch.relu, (IMAGE,)),
    "relu6": (F.relu6, (IMAGE,)),
    "sigmoid": (torch.sigmoid, (IMAGE,)),
    "tanh": (torch.tanh, (IMAGE,)),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.2), (IMAGE,)),
    "elu": (lambda x: F.elu(x, 0.7), (IMAGE,)),
    "hardtanh": (lambda x: F.hardtanh(x, -0.5, 2.0), (IMAGE,)),
    "gelu": (F.gelu, (IMAGE,)),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), (IMAGE,)),
    "softplus": (F.softplus, (MATRIX,)),
    "softplus steep": (lambda x: F.softplus(x, 2.5), (MATRIX,)),
    "log_softmax": (lambda x: F.log_softmax(x, 0), (MATRIX,)),
    "matmul": (lambda x: x @ ROW[:, None], (MATRIX,)),
    "matmul of two": (torch.matmul, (MATRIX, OTHER.t())),
    "bmm": (lambda x: torch.bmm(x, x.transpose(1, 2)), (values(2, 3, 4),)),
    "matmul broadcast": (lambda x: x @ MATRIX.t(), (values(2, 3, 6),)),
    "softmax": (lambda x: torch.softmax(x, -1), (MATRIX,)),
    # shapes
    "reshape": (lambda x: x.reshape(3, -1), (MATRIX,)),
    "view": (lambda x: x.view(x.shape[0] * 2, x.size(1) // 2), (MATRIX,)),
    "flatten": (lambda x: x.flatten(1), (IMAGE,)),
    "unflatten": (lambda x: x.unflatten(1, (2, 2)), (IMAGE,)),
    "unsqueeze": (lambda x: x.unsqueeze(-1), (MATRIX,)),
    "squeeze": (lambda x: x.squeeze(0), (IMAGE,)),
    "permute": (lambda x: x.permute(0, 2, 3, 1), (IMAGE,)),
    "permute by list": (lambda x: torch.permute(x, [3, 0, 1, 2]), (IMAGE,)),
    "transpose": (lambda x: x.transpose(-1, 1), (IMAGE,)),
    "t": (torch.t, (MATRIX,)),
    "expand": (lambda x: x.expand(5, 6), (ROW,)),
    "expand_as": (lambda x, y: x.expand_as(y), (ROW, MATRIX)),
    "cat": (lambda x, y: torch.cat([x, y, torch.ones(5, 1)], -1), (MATRIX, OTHER)),
    "cat of types": (lambda x, y: torch.cat([x, y]), (MATRIX, whole(5, 6))),
    "stack": (lambda x, y: torch.stack([x, y], 1), (MATRIX, OTHER)),
    # parts
    "getitem": (lambda x: x[..., 1:9:3], (IMAGE,)),
    "getitem number": (lambda x: x[0, -1], (IMAGE,)),
    "getitem none": (lambda x: x[:, None, 2], (MATRIX,)),
    "getitem last": (lambda x: x[:, :, -3:], (IMAGE,)),
    "getitem by tensor": (lambda x, i: x[i], (MATRIX, INDEX)),
    "getitem by list": (lambda x: x[:, [1, -1, 0]], (MATRIX,)),
    "select": (lambda x: x.select(1, -2), (IMAGE,)),
    "narrow": (lambda x: x.narrow(2, 3, 5), (IMAGE,)),
    "index_select": (lambda x, i: x.index_select(0, i), (MATRIX, INDEX)),
    "index_select from constant": (lambda i: MATRIX.index_select(0, i), (INDEX,)),
    "gather": (lambda x, i: x.gather(1, i), (MATRIX, whole(5, 2).remainder(6))),
    # reductions
    "sum": (lambda x: x.sum(1), (MATRIX,)),
    "sum of flags": (torch.sum, (FLAGS,)),
    "mean": (lambda x: x.mean((2, 3), keepdim=True), (IMAGE,)),
    "amax": (lambda x: x.amax(-1), (MATRIX,)),
    "amin": (lambda x: x.amin((0, 1)), (MATRIX,)),
    # choices
    "where": (torch.where, (FLAGS, MATRIX, OTHER)),
    "where number": (lambda c, x: torch.where(c, x, -1.0), (FLAGS, MATRIX)),
    "where method": (lambda c, x: x.where(c, 0.0), (FLAGS, MATRIX)),
    "masked_fill": (lambda x, m: x.masked_fill(m, 2.0), (MATRIX, FLAGS)),
    "clamp": (lambda x: x.clamp(-1, 2), (MATRIX,)),
    "clamp from above": (lambda x: torch.clamp(x, max=0.5), (MATRIX,)),
    "clamp by tensor": (lambda x, y: x.clamp(min=y), (MATRIX, ROW)),
    "clamp of integers": (lambda x: x.clamp(0, 20), (whole(5, 6),)),
    "clamp_min": (lambda x: x.clamp_min(0.5), (MATRIX,)),
    "clamp_max": (lambda x: torch.clamp_max(x, 0.5), (MATRIX,)),
    # copies and casts
    "clone": (torch.clone, (MATRIX,)),
    "contiguous": (lambda x: x.t().contiguous(), (MATRIX,)),
    "to integers": (lambda x: x.to(torch.int64), (MATRIX,)),
    "to float": (lambda x: x.float(), (whole(5, 6),)),
    "to bool": (lambda x: x.bool(), (whole(5, 6, below=2),)),
    "dropout": (lambda x: F.dropout(x, training=False), (MATRIX,)),
    # images
    "conv2d": (lambda x: F.conv2d(x, WEIGHT, BIAS, stride=2, padding=1), (IMAGE,)),
    "conv2d by groups": (lambda x: F.conv2d(x, WEIGHT[:4, :1], None, 1, (1, 0), 1, 4), (IMAGE,)),
    "conv2d dilated": (lambda x: F.conv2d(x, WEIGHT, BIAS, dilation=2), (IMAGE,)),
    "conv2d same": (lambda x: F.conv2d(x, WEIGHT, padding="same", dilation=(1, 2)), (IMAGE,)),
    "conv2d valid": (lambda x: F.conv2d(x, WEIGHT, padding="valid"), (IMAGE,)),
    "linear": (lambda x: F.linear(x, MATRIX, values(5)), (OTHER,)),
    "linear of three axes": (lambda x: F.linear(x, WEIGHT[0, 0]), (values(2, 4, 3),)),
    "max_pool2d": (lambda x: F.max_pool2d(x, 3, 2, 1), (IMAGE,)),
    "max_pool2d up": (lambda x: F.max_pool2d(x, (2, 3), ceil_mode=True), (IMAGE,)),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 3, 2, 1), (IMAGE,)),
    "avg_pool2d of pixels": (lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), (IMAGE,)),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (7, None)), (IMAGE,)),
    "adaptive_avg_pool2d to one": (lambda x: F.adaptive_avg_pool2d(x, 1), (IMAGE,)),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, (5, 7)), (IMAGE,)),
    "pad": (lambda x: F.pad(x, (1, 2, 0, 3), value=1.5), (IMAGE,)),
    "pad nothing": (lambda x: F.pad(x, (0, 0)), (IMAGE,)),
    "pad and crop": (lambda x: F.pad(x, (-1, 2)), (IMAGE,)),
    "pad integers": (lambda x: F.pad(x, (1, 1), value=-1), (whole(5, 6),)),
    "pad reflected": (lambda x: F.pad(x, (3, 2, 1, 4), mode="reflect"), (IMAGE,)),
    "pad repeated": (lambda x: F.pad(x, (3, 2, 1, 4), mode="replicate"), (IMAGE,)),
    "pad circular": (lambda x: F.pad(x, (3, 2, 1, 4), mode="circular"), (IMAGE,)),
    "batch_norm": (
        lambda x: F.batch_norm(x, BIAS[:4], BIAS[4:].abs() + 1, BIAS[1:5], BIAS[2:6], eps=1e-3),
        (IMAGE,),
    ),
    "batch_norm of rows": (lambda x: F.batch_norm(x, ROW, ROW.abs() + 1), (MATRIX,)),
}
SEVERAL: dict[str, tuple[Function, tuple[Tensor, ...], int]] = {
    "topk": (lambda x: x.topk(3), (torch.randperm(40).float(),), 2),
    "topk smallest": (lambda x: x.topk(2, 0, largest=False), (torch.randperm(30).reshape(5, 6).float(),), 2),
    "split": (lambda x: x.split(4, 1), (MATRIX,), 2),
    "split by sizes": (lambda x: torch.split(x, [1, 2, 3], -1), (MATRIX,), 3),
    "chunk": (lambda x: x.chunk(3, dim=2), (IMAGE,), 3),
    "unbind": (lambda x: x.unbind(1), (MATRIX,), 6),
}


@pytest.mark.parametrize("name", ONE_LAYER)
def test_function_converted_computes_what_torch_does(name: str) -> None:
    function, inputs = ONE_LAYER[name]
    assert_converts(function, *inputs, tolerance=4 * ROUNDED)


@pytest.mark.parametrize("name", SEVERAL)
def test_function_of_several_results_converted_computes_what_torch_does(name: str) -> None:
    function, inputs, outputs = SEVERAL[name]
    assert_converts(function, *inputs, outputs=outputs)


SMOOTH = (
    *({"mode": "nearest"}, {"mode": "nearest-exact"}, {"mode": "bilinear"}, {"mode": "bicubic"}),
    *({"mode": "bilinear", "align_corners": True}, {"mode": "bicubic", "align_corners": True}),
)
SIZES = ({"size": (24, 20)}, {"size": (7, 15)}, {"size": 9}, {"size": (1, 1)}, {"scale_factor": 2})
MORE_SIZES = (
    {"scale_factor": (0.5, 1.5)},
    {"scale_factor": 1.3, "recompute_scale_factor": True},
)


@pytest.mark.parametrize("how", SMOOTH, ids=lambda how: "-".join(map(str, how.values())))
@pytest.mark.parametrize("size", SIZES + MORE_SIZES, ids=str)
def test_interpolate_converted_computes_what_torch_does(how: dict[str, Any], size: dict[str, Any]) -> None:
    assert_converts(lambda x: F.interpolate(x, **size, **how), IMAGE, tolerance=1e-5)


IN_PLACE: dict[str, Function] = {
    "relu": lambda x: F.relu(x, inplace=True),
    "relu_": torch.relu_,
    "relu6": lambda x: F.relu6(x, inplace=True),
    "hardswish": lambda x: F.hardswish(x, inplace=True),
    "hardsigmoid": lambda x: F.hardsigmoid(x, inplace=True),
    "silu": lambda x: F.silu(x, inplace=True),
    "leaky_relu_": lambda x: F.leaky_relu_(x, 0.1),
    "hardtanh_": lambda x: F.hardtanh_(x, -1, 1),
    "sigmoid_": lambda x: x.sigmoid_(),
    "clamp_": lambda x: x.clamp_(-1, 1),
    "add_": lambda x: x.add_(1),
    "iadd": lambda x: operator.iadd(x, 2),
    "imul": lambda x: operator.imul(x, 2),
    "isub": lambda x: operator.isub(x, 2),
    "itruediv": lambda x: operator.itruediv(x, 2),
    "mul_": lambda x: x.mul_(0.5),
    "div_": lambda x: x.div_(4),
    "exp_": lambda x: x.exp_(),
    "neg_": torch.neg_,
    "pow_": lambda x: x.pow_(2),
    "masked_fill_": lambda x: x.masked_fill_(x > 1, 0.0),
    "unsqueeze_": lambda x: x.unsqueeze_(0),
    "squeeze_": lambda x: x.squeeze_(0),
    "transpose_": lambda x: x.transpose_(1, 2),
    "dropout": lambda x: F.dropout(x, training=False, inplace=True),
    "out": lambda x: torch.add(x, 1, out=torch.empty_like(x)),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_function_converted_changes_the_tensor_itself(name: str) -> None:
    change = IN_PLACE[name]

    def model(x: Tensor) -> Tensor:
        y = x * 1.5
        changed = change(y)
        # What follows reads the tensor that was changed, not the function's result.
        return (changed if name == "out" else y) + 0.25

    assert_converts(model, IMAGE, tolerance=4 * ROUNDED)


def test_constant_changed_in_place_by_the_input_keeps_its_former_values() -> None:
    def model(x: Tensor) -> Tensor:
        total = torch.full((5, 6), 2.0)
        total += x
        total *= 3
        return total

    assert_converts(model, MATRIX)


@pytest.mark.parametrize("function", ["hardswish", "hardsigmoid", "silu"])
def test_activation_of_two_layers_converted_computes_what_torch_does(function: str) -> None:
    x = torch.cat([torch.linspace(-8, 8, 4001), torch.tensor([-3.0, 3.0, 0.0])])
    assert_converts(getattr(F, function), x, tolerance=ROUNDED)


def test_frozen_batch_norm_converted_is_one_layer() -> None:
    norm = FrozenBatchNorm2d(4)
    norm.weight.copy_(BIAS[:4])
    norm.bias.copy_(BIAS[1:5])
    norm.running_mean.copy_(BIAS[2:6])
    norm.running_var.copy_(BIAS[4:].abs() + 0.5)
    converted = assert_converts(norm, IMAGE, tolerance=4 * ROUNDED)
    assert converted.kinds == ["SCALE"]


def test_batch_norm_module_converted_is_one_layer() -> None:
    norm = nn.BatchNorm2d(4).eval()
    norm.running_mean.copy_(BIAS[2:6])
    converted = assert_converts(nn.Sequential(norm), IMAGE, tolerance=4 * ROUNDED)
    assert converted.kinds == ["SCALE"]


REFUSED: dict[str, tuple[Function, str]] = {
    "max_pool2d dilated": (lambda x: F.max_pool2d(x, 2, dilation=2), "dilation"),
    "avg_pool2d hanging over": (lambda x: F.avg_pool2d(x, 5, 4, ceil_mode=True), "ceil_mode"),
    "topk of too many": (lambda x: x.flatten().repeat(20).topk(3841)[0], "repeat"),
    "interpolate antialiased": (
        lambda x: F.interpolate(x, (6, 5), mode="bilinear", antialias=True),
        "antialias",
    ),
    "interpolate to a broken size": (lambda x: F.interpolate(x, scale_factor=1.3), "no whole size"),
    "interpolate by area": (lambda x: F.interpolate(x, (6, 5), mode="area"), "mode 'area'"),
    "remainder of floats": (lambda x: x % 2, "remainder of floats"),
    "batch_norm in training": (lambda x: F.batch_norm(x, None, None, training=True), "training"),
    "dropout in training": (F.dropout, "training"),
    "mask": (lambda x: x[x > 0].sum(), "mask"),
    "two tensors": (lambda x: x[torch.tensor([0]), torch.tensor([1])], "several tensors"),
    "where alone": (lambda x: torch.where(x > 0)[0], "fixed shape"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_call_that_tensorrt_cannot_express_raises_and_says_so(name: str) -> None:
    function, said = REFUSED[name]
    with pytest.raises(UnsupportedOperator, match=said):
        convert_model(function, IMAGE)


def test_topk_of_more_than_tensorrt_gives_raises_error() -> None:
    with pytest.raises(UnsupportedOperator, match="3840"):
        convert_model(lambda x: x.topk(3841), torch.rand(4000), outputs=2)


def test_every_network_built_by_tensorrt_gives_an_engine() -> None:
    every = [(function, inputs) for function, inputs in ONE_LAYER.values()]
    every += [(function, inputs) for function, inputs, _ in SEVERAL.values()]

    class Everything(nn.Module):
        def forward(self, *inputs: Tensor) -> list[Tensor]:
            rest, results = list(inputs), []
            for function, own in every:
                given, rest = rest[: len(own)], rest[len(own) :]
                results.append(function(*given))
            return results

    flat = [value for _, inputs in every for value in inputs]
    outputs = len(ONE_LAYER) + sum(count for *_, count in SEVERAL.values())
    conversion = convert_model(Everything(), *flat, outputs=outputs).conversion
    config = conversion.builder.create_builder_config()
    assert load_library().trt  # the library outlives the network
    assert conversion.builder.build_serialized_network(conversion.network, config) is not None
