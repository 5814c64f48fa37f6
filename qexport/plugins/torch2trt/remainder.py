"""The remainder of a division of integers, with the divisor's sign as in Python."""

from __future__ import annotations

from qexport.errors import UnsupportedOperator
from qexport.plugins.torch2trt.data_types import operand
from qexport.plugins.torch2trt.dotted import forms
from qexport.plugins.torch2trt.interface import ConversionContext, argument, give
from qexport.runtimes.tensorrt_library import load_library

FUNCTIONS = (*forms("remainder"), "torch.Tensor.__mod__")


def convert(context: ConversionContext) -> None:
    """Add `x - floor(x / y) * y`.

    Raises:
        UnsupportedOperator: floats, of which that is not exact.
    """
    result = context.method_return
    if result.is_floating_point():
        raise UnsupportedOperator("remainder of floats: TensorRT has no exact one.")
    operations, network = load_library().trt.ElementWiseOperation, context.network
    x, y = (
        operand(context, argument(context, position, name), result.dtype, result.dim())
        for position, name in enumerate(("input", "other"))
    )
    whole = network.add_elementwise(x, y, operations.FLOOR_DIV).get_output(0)
    product = network.add_elementwise(whole, y, operations.PROD).get_output(0)
    give(context, network.add_elementwise(x, product, operations.SUB).get_output(0))
