"""Every operator that is computed in integers, against the quantized reference; what is refused; names of parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name
from graph_cases import Call, Case, case
from qnnpack_graphs import SCALE, Lowered, lower
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

from qexport.errors import UnsupportedOperator
from qexport.plugins.qnnpack.lowering import Lowering
from qexport.quantization.graph import export_graph, scale_of
from qexport.runtimes.qnnpack_program import module_of

MAP = (1, 8, 12, 10)
UNEQUAL = (1 / 32, 1 / 50)
"""Scales of two inputs whose sums do not lie halfway between two steps, where kernels round as they like."""


class TwoCalls(nn.Module):
    """One convolution on two maps of different spread."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 6, 3, padding=1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        both: Tensor = self.conv(x) + self.conv(y)
        return both


class ChannelsLast(nn.Module):
    """A linear layer of each cell."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        cells: Tensor = self.linear(x.permute(0, 2, 3, 1))
        return cells.permute(0, 3, 1, 2)


class Mixed(nn.Module):
    """Two maps that lie in memory in different orders: a convolution gives channels last."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *, last: bool = False) -> None:
        super().__init__()
        self.conv, self.function, self.last = nn.Conv2d(8, 8, 1), function, last

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.function(y, self.conv(x)) if self.last else self.function(self.conv(x), y)


def of_conv(function: Callable[[Tensor], Tensor], shape: tuple[int, ...] = MAP) -> Case:
    """Return a case of a function of what a convolution gives: channels last in memory."""
    return case(nn.Sequential(nn.Conv2d(8, 8, 1), Call(function)), shape)


def of_sum(function: Callable[[Tensor], Tensor], shape: tuple[int, ...] = MAP) -> Case:
    """Return a case of a function of a quantized map: nothing quantizes what is only moved."""
    return case(lambda x, y: function(x + y), shape, shape, scales=UNEQUAL)


def after(conv: nn.Conv2d, activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(conv, activation)


INTEGER: dict[str, tuple[Case, str]] = {
    "convolution": (case(nn.Conv2d(8, 6, 3, padding=1), MAP), "quantized::conv2d"),
    "convolution without bias": (case(nn.Conv2d(8, 6, 3, bias=False), MAP), "quantized::conv2d"),
    "convolution of 1x1": (case(nn.Conv2d(8, 6, 1), MAP), "quantized::conv2d"),
    "convolution and relu": (case(after(nn.Conv2d(8, 6, 3), nn.ReLU()), MAP), "quantized::conv2d_relu"),
    "convolution and relu6": (case(after(nn.Conv2d(8, 6, 3), nn.ReLU6()), MAP), "quantized::conv2d_relu"),
    "convolution and low ceiling": (
        case(after(nn.Conv2d(8, 6, 3), nn.Hardtanh(0.0, 1.0)), MAP),
        "quantized::conv2d_relu",
    ),
    "convolution and hardtanh": (
        case(after(nn.Conv2d(8, 6, 3), nn.Hardtanh(-0.3, 0.2)), MAP),
        "quantized::conv2d",
    ),
    "convolution and clamp from below": (
        case(nn.Sequential(nn.Conv2d(8, 6, 3), Call(lambda x: x.clamp(min=-0.25))), MAP),
        "quantized::conv2d",
    ),
    "strided": (case(nn.Conv2d(8, 6, 3, stride=2, padding=1), MAP), "quantized::conv2d"),
    "oblong": (case(nn.Conv2d(8, 6, (1, 5), stride=(2, 1), padding=(0, 2)), MAP), "quantized::conv2d"),
    "dilated": (case(nn.Conv2d(8, 6, 3, padding=2, dilation=2), MAP), "quantized::conv2d"),
    "grouped": (case(nn.Conv2d(8, 6, 3, groups=2), MAP), "quantized::conv2d"),
    "depthwise": (case(nn.Conv2d(8, 8, 3, padding=1, groups=8), MAP), "quantized::conv2d"),
    "depthwise of 5x5, strided": (
        case(nn.Conv2d(8, 8, 5, padding=2, stride=2, groups=8), MAP),
        "quantized::conv2d",
    ),
    "depthwise of 7x7": (case(nn.Conv2d(8, 8, 7, padding=3, groups=8), MAP), "quantized::conv2d"),
    "depthwise, dilated": (
        case(nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8), MAP),
        "quantized::conv2d",
    ),
    "depthwise with two outputs": (case(nn.Conv2d(8, 16, 3, groups=8), MAP), "quantized::conv2d"),
    "same padding": (case(nn.Conv2d(8, 6, 5, padding="same"), MAP), "quantized::conv2d"),
    "valid padding": (case(nn.Conv2d(8, 6, 5, padding="valid"), MAP), "quantized::conv2d"),
    "linear": (case(nn.Linear(20, 6), (3, 20)), "quantized::linear"),
    "linear and relu": (case(nn.Sequential(nn.Linear(20, 6), nn.ReLU()), (3, 20)), "quantized::linear_relu"),
    "linear of cells": (case(ChannelsLast(), MAP), "quantized::linear"),
    "add": (case(torch.add, MAP, MAP, scales=UNEQUAL), "quantized::add"),
    "add and relu": (of_sum(F.relu), "quantized::add_relu_out"),
    "add to channels last": (case(Mixed(torch.add), MAP, MAP), "quantized::add"),
    "add of channels last": (case(Mixed(torch.add, last=True), MAP, MAP), "quantized::add"),
    "product of channels last": (case(Mixed(torch.mul), MAP, (1, 8, 1, 1)), "quantized::mul"),
    "add of one number a channel": (case(torch.add, MAP, (1, 8, 1, 1), scales=UNEQUAL), "quantized::add_out"),
    "add of rows": (case(torch.add, (5, 9), (5, 9), scales=UNEQUAL), "quantized::add"),
    "add of scales far apart": (case(torch.add, MAP, MAP, scales=(1.0, 1e-6)), "quantized::add_out"),
    "product": (case(torch.mul, MAP, MAP), "quantized::mul"),
    "product with one number a channel": (case(torch.mul, MAP, (1, 8, 1, 1)), "quantized::mul"),
    "max pool": (of_sum(lambda x: F.max_pool2d(x, 3, 2, 1)), "aten::max_pool2d"),
    "max pool, ceiling": (of_sum(lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True), (1, 8, 11, 9)), "aten::max_pool2d"),
    "max pool of 1x1": (of_sum(lambda x: F.max_pool2d(x, 1, 2)), "aten::slice"),
    "upsampling": (
        of_sum(lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest")),
        "aten::upsample_nearest2d",
    ),
    "upsampling to a size": (of_sum(lambda x: F.interpolate(x, size=(17, 23))), "aten::upsample_nearest2d"),
    "concatenation": (of_sum(lambda x: torch.cat([x, F.max_pool2d(x, 3, 1, 1)], 1)), "aten::cat"),
    "relu alone": (of_sum(lambda x: F.relu(F.max_pool2d(x, 3, 1, 1))), "aten::relu"),
    "max pool, channels last": (of_conv(lambda x: F.max_pool2d(x, 3, 2, 1)), "aten::max_pool2d"),
    "max pool, ceiling, channels last": (
        of_conv(lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True), (1, 8, 11, 9)),
        "aten::max_pool2d",
    ),
    "max pool of 1x1, channels last": (of_conv(lambda x: F.max_pool2d(x, 1, 2)), "aten::slice"),
    "upsampling, channels last": (of_conv(lambda x: F.interpolate(x, size=(17, 23))), "aten::upsample_nearest2d"),
    "concatenation, channels last": (
        of_conv(lambda x: torch.cat([x, F.max_pool2d(x, 3, 1, 1)], 1)),
        "aten::cat",
    ),
    "relu alone, channels last": (of_conv(lambda x: F.relu(F.max_pool2d(x, 3, 1, 1))), "aten::relu"),
}  # fmt: skip
FLOAT: dict[str, Case] = {
    "sum with a factor": case(lambda x, y: torch.add(x, y, alpha=2), MAP, MAP),
    "hardswish": case(F.hardswish, MAP),
    "hardsigmoid": case(F.hardsigmoid, MAP),
    "silu": case(F.silu, MAP),
    "sigmoid": case(torch.sigmoid, MAP),
    "gelu": case(F.gelu, MAP),
    "leaky relu": case(lambda x: F.leaky_relu(x, 0.1), MAP),
    "mean": case(lambda x: x.mean((2, 3), keepdim=True), MAP),
    "adaptive pool": case(lambda x: F.adaptive_avg_pool2d(x, 1), MAP),
    "average pool": case(lambda x: F.avg_pool2d(x, 2), MAP),
}
ALONE: dict[str, Case] = {
    "two calls of different spread": case(TwoCalls(), MAP, MAP, scales=(1 / 32, 1 / 7)),
}


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    cases = [*(each for each, _ in INTEGER.values()), *FLOAT.values(), *ALONE.values()]
    return lower(cases, tmp_path_factory.mktemp("lowering") / "cases.pt")


NAMES = [*INTEGER, *FLOAT, *ALONE]


@pytest.mark.parametrize("name", NAMES)
def test_operator_is_within_a_step_of_the_reference(name: str, lowered: Lowered) -> None:
    place = NAMES.index(name)
    result = next(node for node in lowered.quantized.graph.graph.nodes if node.op == "output").args[0][place]  # type: ignore[index,union-attr,call-overload]
    found, wanted = lowered.results[place], lowered.wanted[place]
    steps = (found - wanted).abs() / scale_of(result)  # type: ignore[arg-type]
    assert float(steps.max()) < 1.01
    assert float((steps > 0.5).float().mean()) < 0.01
    assert wanted.unique().numel() > 5


@pytest.mark.parametrize("name", INTEGER)
def test_operator_with_an_integer_kernel_uses_it(name: str, lowered: Lowered) -> None:
    path = f"backbone.{NAMES.index(name)}"
    own = [layer for layer in lowered.layers if f"{layer.path}.".startswith(f"{path}.")]
    assert own
    assert all(layer.integer and not layer.reason for layer in own)
    assert INTEGER[name][1] in {kernel for layer in own for kernel in layer.kernels}


@pytest.mark.parametrize("name", FLOAT)
def test_operator_without_an_integer_kernel_says_why(name: str, lowered: Lowered) -> None:
    (layer,) = [one for one in lowered.layers if one.path == f"backbone.{NAMES.index(name)}"]
    assert not layer.integer
    assert "float32" in layer.reason
    assert layer.reformats == len(FLOAT[name].shapes) + 1


def test_layer_called_twice_has_a_part_for_each_call_and_one_weight(lowered: Lowered) -> None:
    path = f"backbone.{NAMES.index('two calls of different spread')}.conv"
    first, second = (lowered.file.program.parts[name] for name in (path, f"{path}__call1"))
    tensors = [lowered.file.tensors[name] for name in (path, f"{path}__call1")]
    assert tensors[0].q_scale() != tensors[1].q_scale()
    weights = [lowered.file.weight_and_bias(name)[0] for name in (path, f"{path}__call1")]
    assert torch.equal(weights[0].int_repr(), weights[1].int_repr())
    assert first is not second


def test_parts_are_named_after_the_modules_that_they_compute_for(lowered: Lowered) -> None:
    numbers = {f"backbone.{number}" for number in range(len(NAMES))}
    for step in lowered.file.program.steps:
        own = module_of(step.path)
        assert not own or any(f"{own}.".startswith(f"{each}.") for each in (*numbers, "preprocess"))


@pytest.mark.parametrize(
    ("part", "module"),
    [
        ("rpn.head.conv.0.0__call3", "rpn.head.conv.0.0"),
        ("backbone.body.layer1.0__op_add", "backbone.body.layer1.0"),
        ("backbone.fpn__op_upsample_nearest2d_1", "backbone.fpn"),
        ("rpn.head.conv.0__op_relu__call2", "rpn.head.conv.0"),
        ("backbone.my__conv", "backbone.my__conv"),
    ],
)
def test_module_of_a_part_is_what_stands_before_its_operator_and_call(part: str, module: str) -> None:
    assert module_of(part) == module


def test_layer_kept_in_float_is_a_float_module_with_its_weight(tmp_path: Path) -> None:
    body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 1))
    made = lower([case(body, MAP)], tmp_path / "kept.pt", keep_float=("backbone.0.0", "backbone.0.1"))
    assert made.file.operators("backbone.0.0") == ("aten::_convolution",)
    assert made.file.operators("backbone.0.2") == ("quantized::conv2d",)
    assert [layer.path for layer in made.layers] == ["backbone.0.2"]
    assert (
        float((made.results[0] - made.wanted[0]).abs().max())
        < 1.01 * made.file.tensors["backbone.0.2"].q_scale()
    )


def test_padding_of_same_that_is_uneven_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOperator, match=r"backbone\.0: padding 'same' of a 2x2 kernel"):
        lower([case(nn.Conv2d(8, 6, 2, padding="same"), MAP)], tmp_path / "same.pt")


@torch.library.custom_op("qexport_test::own", mutates_args=())
def _own(x: Tensor) -> Tensor:
    return x * 2


@_own.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_operator_of_another_library_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedOperator, match=r"qexport_test\.own\S* in module backbone\.0: .*torchvision alone"
    ):
        lower([case(torch.ops.qexport_test.own, MAP)], tmp_path / "own.pt")


class Deformed(nn.Module):
    """torchvision's own operator, which a process has that imports torchvision."""

    def __init__(self) -> None:
        super().__init__()
        self.deform = DeformConv2d(8, 6, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.deform(x, x[:, :2] * 0.1)
        return made


def test_operator_of_torchvision_is_kept_as_it_is(tmp_path: Path) -> None:
    made = lower([case(Deformed(), MAP)], tmp_path / "deformed.pt")
    assert torch.allclose(made.results[0], made.wanted[0], atol=SCALE / 100)
    kinds = {kind for step in made.file.program.steps for kind in made.file.operators(step.path)}
    assert "torchvision::deform_conv2d" in kinds


def test_results_of_one_operator_stay_in_one_part_of_the_file(tmp_path: Path) -> None:
    unbound = of_sum(lambda x: torch.stack([F.relu(part) for part in x.unbind(1)], 1))
    made = lower([unbound], tmp_path / "unbound.pt")
    steps = (made.results[0] - made.wanted[0]).abs() / made.file.tensors["backbone.0"].q_scale()
    assert float(steps.max()) < 1.01
    whole = [step for step in made.file.program.steps if "aten::unbind" in made.file.operators(step.path)]
    assert [len(step.outputs) for step in whole] == [MAP[1]]


def test_float_form_of_a_graph_is_bit_identical(tmp_path: Path) -> None:
    from graph_cases import Cases  # noqa: PLC0415

    module = Cases([each for each, _ in INTEGER.values()] + list(FLOAT.values()))
    graph = export_graph(module)  # type: ignore[arg-type]
    parts, names = Lowering(graph, {}).write()
    given = module.example_input()
    with torch.no_grad():
        for found, wanted in zip(parts(given), graph(given), strict=True):
            assert torch.equal(found, wanted)
    assert not names
