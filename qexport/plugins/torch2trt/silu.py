"""SiLU, `x * sigmoid(x)`."""

from __future__ import annotations

from qexport.plugins.torch2trt.data_types import live
from qexport.plugins.torch2trt.interface import ConversionContext, argument, give
from qexport.runtimes.tensorrt_library import load_library

FUNCTIONS = ("torch.nn.functional.silu",)  # in place by its own argument


def convert(context: ConversionContext) -> None:
    """Add both layers."""
    trt = load_library().trt
    tensor = live(context, argument(context, 0, "input"))
    gate = context.network.add_activation(tensor, trt.ActivationType.SIGMOID).get_output(0)
    give(context, context.network.add_elementwise(tensor, gate, trt.ElementWiseOperation.PROD).get_output(0))
