"""Convert small models and run the networks: inside the real torch2trt where it is, else inside a double of it.

The double gives converters exactly what `qexport.plugins.torch2trt.interface.ConversionContext` names. That
nothing else of torch2trt is needed is what running both shows: `make torch2trt-check TORCH2TRT=checkout`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qexport.emulation.tensorrt_network import EvaluatedNetwork
from qexport.plugins.torch2trt.conversion import Conversion, Run, convert
from qexport.plugins.torch2trt.dotted import exists
from qexport.plugins.torch2trt.registration import Family, Operator
from qexport.plugins.torch2trt.registry import converters
from qexport.runtimes.tensorrt_library import load_library, network_flags
from qexport.runtimes.tensorrt_network import Network, read_network
from qexport.versions import is_importable

REQUIRED = "QEXPORT_REQUIRE_TORCH2TRT"
"""Set by `make torch2trt-check`: then the double is no substitute."""


def has_torch2trt() -> bool:
    """Tell whether the real torch2trt is here.

    Raises:
        RuntimeError: it has to be, and is not.
    """
    there = is_importable("torch2trt")
    if not there and os.environ.get(REQUIRED):
        raise RuntimeError("torch2trt is not importable: make torch2trt-check TORCH2TRT=path/to/checkout")
    return there


@dataclass
class Context:
    """What converters see of torch2trt, and nothing else."""

    network: Any
    method_args: Sequence[Any] = ()
    method_kwargs: dict[str, Any] = field(default_factory=dict)
    method_return: Any = None


class Call(nn.Module):
    """A model that is one function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


@dataclass(frozen=True)
class Converted:
    """A network that was read back."""

    conversion: Conversion
    network: Network

    @property
    def kinds(self) -> list[str]:
        """Kinds of its layers, constants left out."""
        return [layer.kind for layer in self.network.described.layers if layer.kind != "CONSTANT"]

    def run(self, *inputs: Tensor) -> list[Tensor]:
        """Return what the network computes."""
        feeds = {f"x{index}": value for index, value in enumerate(inputs)}
        return list(EvaluatedNetwork(self.network).run(feeds).values())


def convert_model(
    model: nn.Module | Callable[..., Any],
    *inputs: Tensor,
    outputs: int = 1,
    extra: tuple[Operator | Family, ...] = (),
) -> Converted:
    """Convert a model whose inputs are called x0, x1, ... and whose outputs y0, y1, ..."""
    module = model if isinstance(model, nn.Module) else Call(model)
    given, wanted = [f"x{i}" for i in range(len(inputs))], [f"y{i}" for i in range(outputs)]
    if has_torch2trt():
        conversion = convert(module, inputs, input_names=given, output_names=wanted, extra=extra)
    else:
        conversion = _convert_in_double(module, inputs, given, wanted, extra)
    library = load_library()
    return Converted(conversion, read_network(library.trt, conversion.network, library=library.name))


def _convert_in_double(
    module: nn.Module,
    inputs: Sequence[Tensor],
    given: Sequence[str],
    wanted: Sequence[str],
    extra: tuple[Operator | Family, ...],
) -> Conversion:
    trt = load_library().trt
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(network_flags(trt))
    chosen = {name: converter for name, converter in converters(extra).items() if exists(name)}
    with _paths(module) as stack:
        run = Run(Context(network), network, chosen, lambda: stack[-1] if stack else "")
        run.convert(module, inputs, given, wanted)
    return Conversion(network, builder, logger, run.functions)


@contextmanager
def _paths(module: nn.Module) -> Iterator[list[str]]:
    stack: list[str] = []
    handles = []

    def leave(*_: object) -> None:
        stack.pop()

    for path, each in module.named_modules():
        handles.append(each.register_forward_pre_hook(lambda *_, path=path: stack.append(path)))
        handles.append(each.register_forward_hook(leave))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def assert_converts(
    model: nn.Module | Callable[..., Any], *inputs: Tensor, tolerance: float = 0.0, outputs: int = 1
) -> Converted:
    """Convert a model, run the network, and hold it against the model itself."""
    copies = [value.clone() for value in inputs]
    with torch.no_grad():
        result = model(*copies)
    expected = [result] if isinstance(result, Tensor) else list(result)
    converted = convert_model(model, *inputs, outputs=outputs)
    for reference, actual in zip(expected, converted.run(*inputs), strict=True):
        assert actual.dtype == reference.dtype
        assert actual.shape == reference.shape
        torch.testing.assert_close(actual, reference, rtol=0, atol=tolerance, equal_nan=True)
    return converted
