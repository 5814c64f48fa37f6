"""Products of matrices and of batches of them."""

from __future__ import annotations

from qexport.errors import UnsupportedOperator
from qexport.plugins.torch2trt.data_types import operand
from qexport.plugins.torch2trt.dotted import forms
from qexport.plugins.torch2trt.interface import ConversionContext, argument, give
from qexport.runtimes.tensorrt_library import load_library

FUNCTIONS = (*forms("matmul", "mm", "bmm"), "torch.Tensor.__matmul__")


def convert(context: ConversionContext) -> None:
    """Add the product.

    Raises:
        UnsupportedOperator: of vectors, which torch gives an axis for the time of the product.
    """
    left, right = argument(context, 0, "input"), argument(context, 1, "other")
    if min(left.dim(), right.dim()) < 2:
        raise UnsupportedOperator("a product of a matrix and a vector: give the vector a second axis.")
    result, plain = context.method_return, load_library().trt.MatrixOperation.NONE
    sides = [operand(context, value, result.dtype, result.dim()) for value in (left, right)]
    give(context, context.network.add_matrix_multiply(sides[0], plain, sides[1], plain).get_output(0))
