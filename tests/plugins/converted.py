"""One call of a torch function converted to a TensorRT network, built, read back and evaluated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from qexport.runtimes.tensorrt_library import installed_flavour

if installed_flavour() is None:
    pytest.skip("TensorRT is not installed (the extra tensorrt-cpu)", allow_module_level=True)

from qexport.emulation.tensorrt_network import EvaluatedNetwork
from qexport.runtimes.tensorrt_library import load_library, network_flags
from qexport.runtimes.tensorrt_network import read_network

TRT = load_library().trt
_TYPES = {torch.float32: TRT.float32, torch.uint8: TRT.uint8, torch.bool: TRT.bool, torch.int32: TRT.int32}


class EmptyNetwork:
    """A network to add layers to."""

    def __init__(self) -> None:
        self._builder = TRT.Builder(TRT.Logger(TRT.Logger.INTERNAL_ERROR))
        self.network = self._builder.create_network(network_flags(TRT))
        self._feeds: dict[str, Tensor] = {}

    def input(self, tensor: Tensor) -> Any:
        """Add an input that is fed with `tensor`."""
        name = f"input_{len(self._feeds)}"
        self._feeds[name] = tensor
        return self.network.add_input(name, _TYPES[tensor.dtype], tuple(tensor.shape))

    def run(self, *outputs: Any) -> list[Tensor]:
        """Return the outputs of the network that TensorRT was given, once TensorRT has built it."""
        for output in outputs:
            self.network.mark_output(output)
        built = self._builder.build_serialized_network(self.network, self._builder.create_builder_config())
        assert built is not None
        found = EvaluatedNetwork(read_network(TRT, self.network, library="")).run(self._feeds)
        return [found[output.name] for output in outputs]


class Call(EmptyNetwork):
    """A call as torch2trt shows it to a converter: the function has run, its inputs have TensorRT tensors."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        super().__init__()
        self.method_args, self.method_kwargs = arguments, named
        for tensor in _tensors(arguments):
            tensor._trt = self.input(tensor)
        self.method_return = function(*arguments, **named)

    def results(self) -> list[Tensor]:
        """Return what the function returned."""
        return [self.method_return] if isinstance(self.method_return, Tensor) else list(self.method_return)

    def converted(self, convert: Callable[[Any], None]) -> list[Tensor]:
        """Return what the converted network returns."""
        convert(self)
        return self.run(*(result._trt for result in self.results()))


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list):
            found += _tensors(value)
    return found
