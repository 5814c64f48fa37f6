"""The conversion: nothing is dropped, nothing stays behind, every layer has a name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name
import torchvision
from torch import Tensor, nn
from torch2trt_networks import assert_converts, convert_model
from torchvision.ops.misc import FrozenBatchNorm2d

from qexport.errors import TargetUnavailable, UnsupportedOperator
from qexport.plugins.torch2trt import hardswish, registry
from qexport.plugins.torch2trt.compatibility import add_missing, import_torch2trt
from qexport.plugins.torch2trt.dotted import exists, lookup
from qexport.plugins.torch2trt.interface import TRT_TENSOR, ConversionContext, give
from qexport.plugins.torch2trt.registry import converters
from qexport.runtimes.tensorrt_library import load_library
from qexport.versions import is_importable

X = torch.linspace(-4, 4, 24).reshape(1, 4, 6)


class Unknown(nn.Module):
    """A module whose only operator has no converter of ours."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.logcumsumexp(x, 1)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ReLU()
        self.body = nn.ModuleDict({"block": Unknown()})

    def forward(self, x: Tensor) -> Tensor:
        return self.body["block"](self.stem(x)) + 1


DROPPED = {
    "a result that a converter takes": lambda x: torch.logcumsumexp(x, 1) + 1,
    "an output": lambda x: torch.logcumsumexp(x * 2, 1),
    "one of two outputs": lambda x: (x * 2, torch.logcumsumexp(x, 1))[1],
    "through a view": lambda x: torch.diagonal(x * 2, 0, 1, 2) + 1,
    "an operator inside a function without a converter": lambda x: F.pairwise_distance(x * 2, torch.zeros(6)),
    "an argument in a list": lambda x: torch.cat([x, torch.logcumsumexp(x, 1)]),
    "a keyword argument": lambda x: torch.add(x, other=torch.logcumsumexp(x, 1)),
    "a constant that the input was written into": lambda x: _written(torch.zeros(1, 4, 6), x) * 2,
}
IN_PLACE = {
    "function": lambda y: torch.logit_(y.mul_(0), 0.1),
    "method": lambda y: y.cumsum_(1),
    "setitem": lambda y: y.__setitem__((0, 0), 1.0),
    "view": lambda y: y[0].mul_(2),
    "view of a view": lambda y: y[0][1:].zero_(),
    "copy": lambda y: y.copy_(torch.ones(6)),
    "out": lambda y: torch.logcumsumexp(y.clone(), 1, out=y),
    "data": lambda y: y.data.zero_(),
}
NUMBERS = {
    "item": lambda x: x * x.sum().item(),
    "float": lambda x: x * float(x.max()),
    "condition": lambda x: x * 2 if x.sum() > 0 else x,
    "tolist": lambda x: x * torch.tensor(x.flatten().tolist()[0]),
    "numpy": lambda x: x * torch.from_numpy(x.numpy()),
    "equal": lambda x: x * torch.equal(x, x + 1),
}


def _written(total: Tensor, x: Tensor) -> Tensor:
    total[:, 1:] = x[:, 1:]
    return total


@pytest.mark.parametrize("where", DROPPED)
def test_operator_without_converter_reaching_an_output_raises_error(where: str) -> None:
    with pytest.raises(UnsupportedOperator, match=r"no converter for torch\.\w"):
        convert_model(DROPPED[where], X)


@pytest.mark.parametrize("how", IN_PLACE)
def test_change_in_place_without_converter_raises_error(how: str) -> None:
    def model(x: Tensor) -> Tensor:
        y = x * 2
        IN_PLACE[how](y)
        return y + 1

    with pytest.raises(UnsupportedOperator, match=r"no converter for torch\.\w.* in place what"):
        convert_model(model, X)


@pytest.mark.parametrize("how", NUMBERS)
def test_number_made_of_the_input_raises_error(how: str) -> None:
    with pytest.raises(UnsupportedOperator, match="Python number"):
        convert_model(NUMBERS[how], X)


def test_error_names_operator_module_and_guide() -> None:
    with pytest.raises(UnsupportedOperator) as raised:
        convert_model(Nested(), X)
    message = str(raised.value)
    assert "no converter for torch.logcumsumexp in module body.block" in message
    assert "docs/plugins.md" in message


def test_operator_whose_result_reaches_no_output_is_left_out() -> None:
    def model(x: Tensor) -> Tensor:
        torch.logcumsumexp(x, 1)
        torch.zeros_like(torch.logcumsumexp(x, 1))
        return x + torch.ones_like(x)

    assert assert_converts(model, X).kinds == ["ELEMENTWISE"]


@pytest.mark.parametrize("function", [torch.relu, F.hardswish, torch.Tensor.exp], ids=lambda f: f.__name__)
def test_function_imported_by_name_is_converted(function: Callable[..., Tensor]) -> None:
    # A reference from before the conversion, as `from torch import relu` gives.
    assert_converts(lambda x: function(x * 2) + 1, X, tolerance=1e-4)


def test_view_of_a_tensor_changed_in_place_afterwards_raises_error() -> None:
    def model(x: Tensor) -> Tensor:
        y = x * 2
        view = y.view(24)
        y.add_(1)
        return view * 3  # torch's has the 1, TensorRT's layer has not

    with pytest.raises(UnsupportedOperator, match=r"torch\.Tensor\.add_"):
        convert_model(model, X)


def test_tensor_changed_in_place_after_it_was_read_keeps_what_was_read() -> None:
    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        before = y + 1
        y.relu_()
        return before, y

    assert_converts(model, X, outputs=2)


def test_constants_alone_become_no_layers() -> None:
    weight = nn.Parameter(torch.ones(6))

    def model(x: Tensor) -> Tensor:
        scale = (weight * 2 + 1).sqrt().cumsum(0)
        return x * scale

    assert assert_converts(model, X, tolerance=1e-6).kinds == ["ELEMENTWISE"]


def test_inputs_and_constants_given_back_are_outputs() -> None:
    converted = assert_converts(lambda x: (x, torch.arange(3), x, x + 1), X, outputs=4)
    assert [tensor.name for tensor in converted.network.described.outputs] == ["y0", "y1", "y2", "y3"]


def test_output_given_twice_is_two_outputs() -> None:
    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        return y, y

    assert_converts(model, X, outputs=2)


def test_model_converted_twice_leaves_nothing_behind() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Hardswish(inplace=True)).eval()
    before = {name: lookup(name) for name in converters()}
    for seed in range(2):
        image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        assert_converts(model, image, tolerance=1e-6)
    assert not [value for value in model.state_dict().values() if hasattr(value, TRT_TENSOR)]
    assert {name: lookup(name) for name in converters()} == before
    assert "__getitem__" not in vars(torch.Tensor)  # inherited, as before


def test_failed_conversion_leaves_nothing_behind() -> None:
    before = lookup("torch.nn.functional.relu")
    with pytest.raises(UnsupportedOperator):
        convert_model(Nested(), X)
    assert lookup("torch.nn.functional.relu") is before
    assert isinstance(X + 1, Tensor)
    assert isinstance(X.shape, torch.Size)


def test_layers_are_named_after_module_and_function() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)
            self.head = nn.Sequential(nn.Hardswish())

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(self.conv(x))) + 0.5

    converted = convert_model(Model().eval(), torch.rand(1, 1, 4, 4))
    layers = converted.network.described.layers
    assert [layer.name for layer in layers] == [
        *("conv/conv2d", "conv/conv2d_1", "head.0/hardswish", "head.0/hardswish_1"),
        *("add/constant", "add"),
    ]
    assert layers[2].outputs == ("head.0/hardswish/output",)
    assert converted.conversion.functions["head.0/hardswish_1"] == "torch.nn.functional.hardswish"


def test_converters_of_ones_own_go_before_ours() -> None:
    def negated(context: ConversionContext) -> None:
        trt = load_library().trt
        x = getattr(context.method_args[0], TRT_TENSOR)
        give(context, context.network.add_unary(x, trt.UnaryOperation.NEG).get_output(0))

    own = SimpleNamespace(FUNCTIONS=("torch.relu",), convert=negated)
    converted = convert_model(torch.relu, X, extra=(own,))
    assert torch.equal(converted.run(X)[0], -X)


def test_registry_names_functions_that_pytorch_has() -> None:
    assert [name for name in converters() if not exists(name)] == []


def test_registry_of_two_files_for_one_function_raises_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "OPERATORS", (hardswish, hardswish))
    with pytest.raises(ValueError, match="hardswish"):
        converters()


def test_compatibility_of_a_tensorrt_that_lacks_nothing_touches_nothing() -> None:
    enumeration = SimpleNamespace(EXPLICIT_BATCH=0)
    tensor = type("ITensor", (), {"location": "its own"})
    calibrator, algorithm = object(), object()
    trt = SimpleNamespace(
        NetworkDefinitionCreationFlag=enumeration,
        ITensor=tensor,
        IInt8Calibrator=calibrator,
        CalibrationAlgoType=algorithm,
    )
    assert add_missing(trt) == ()
    assert (trt.IInt8Calibrator, trt.CalibrationAlgoType, tensor.location) == (
        calibrator,
        algorithm,
        "its own",
    )
    assert vars(enumeration) == {"EXPLICIT_BATCH": 0}


def test_conversion_without_torch2trt_raises_error_that_says_how_to_get_it() -> None:
    if is_importable("torch2trt"):
        pytest.skip("torch2trt is here")
    with pytest.raises(TargetUnavailable, match="NVIDIA-AI-IOT/torch2trt"):
        import_torch2trt()


def test_real_torch2trt_imported_leaves_no_alias_of_tensorrt() -> None:
    if not is_importable("torch2trt"):
        pytest.skip("torch2trt is not here: make torch2trt-check TORCH2TRT=path/to/checkout")
    module = import_torch2trt()
    assert module.ConversionContext.__module__ == "torch2trt.torch2trt"
    assert sys.modules.get("tensorrt", load_library().trt) is load_library().trt
    if load_library().trt.__name__ != "tensorrt":
        assert "tensorrt" not in sys.modules


@pytest.mark.parametrize("name", ["mobilenet_v3_large", "resnet18", "efficientnet_b0"])
def test_backbone_of_torchvision_converted_as_it_is_gives_what_it_gives(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(torchvision.models, name)(weights=None).eval()
        image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(image)
    actual = convert_model(model, image).run(image)[0]
    assert float((actual - expected).norm() / expected.norm()) < 1e-4


def test_feature_pyramid_of_torchvision_converted_as_it_is_gives_what_it_gives() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torchvision.models.detection.fasterrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, norm_layer=FrozenBatchNorm2d
        ).backbone.eval()
        image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = list(model(image).values())
    for reference, actual in zip(expected, convert_model(model, image, outputs=5).run(image), strict=True):
        assert float((actual - reference).norm() / reference.norm()) < 1e-4
