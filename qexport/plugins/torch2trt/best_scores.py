"""The best scores, by TensorRT's TopK, which promises no order of equal scores."""

from __future__ import annotations

from qexport.plugins.tensorrt.network_builder import NetworkBuilder
from qexport.plugins.torch2trt.interface import ConversionContext, argument, give, trt_tensor
from qexport.runtimes.tensorrt_library import load_library

FUNCTIONS: tuple[str, ...] = ("qexport.detectors.operators.best_scores",)


def convert(context: ConversionContext) -> None:
    """Add the layers of one call of best_scores(scores, count).

    Raises:
        UnsupportedOperator: more scores are asked for than TensorRT's layer gives.
    """
    scores, count = argument(context, 0, "scores"), int(argument(context, 1, "count"))
    build = NetworkBuilder(load_library().trt, context.network)
    give(context, *build.top_k(trt_tensor(context, scores), count, axis=0))
