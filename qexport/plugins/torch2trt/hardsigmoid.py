"""Hardsigmoid, one activation layer: `clip(x / 6 + 0.5, 0, 1)`, within 1e-7 of torch's `clip(x + 3, 0, 6) / 6`."""

from __future__ import annotations

from typing import Any

from qexport.plugins.torch2trt.data_types import live
from qexport.plugins.torch2trt.interface import ConversionContext, argument, give
from qexport.runtimes.tensorrt_library import load_library

FUNCTIONS = ("torch.nn.functional.hardsigmoid",)  # in place by its own argument


def convert(context: ConversionContext) -> None:
    """Add the layer."""
    give(context, hard_sigmoid(context, live(context, argument(context, 0, "input"))))


def hard_sigmoid(context: ConversionContext, tensor: Any) -> Any:
    """Return hardsigmoid of a TensorRT tensor."""
    layer = context.network.add_activation(tensor, load_library().trt.ActivationType.HARD_SIGMOID)
    layer.alpha, layer.beta = 1 / 6, 0.5
    return layer.get_output(0)
