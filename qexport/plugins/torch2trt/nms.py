"""Greedy NMS of fixed shape, as a loop of matrix products."""

from __future__ import annotations

from qexport.errors import UnsupportedOperator
from qexport.plugins.fixed_point_nms import kept_boxes
from qexport.plugins.tensorrt.network_builder import NetworkBuilder
from qexport.plugins.torch2trt.interface import ConversionContext, argument, give, trt_tensor
from qexport.runtimes.tensorrt_library import load_library

FUNCTIONS: tuple[str, ...] = (
    "qexport.detectors.operators.batched_nms_mask",
    "torchvision.ops.nms",
    "torchvision.ops.batched_nms",
)


def convert(context: ConversionContext) -> None:
    """Add the layers of one call of batched_nms_mask(boxes, scores, valid, iou_threshold).

    Raises:
        UnsupportedOperator: the call is of torchvision's, whose result has a dynamic length.
    """
    if context.method_return.dim() == 1:
        raise UnsupportedOperator(
            "torchvision's nms returns as many indices as boxes survive, a length that is known only when the image "
            "is; the layers after it are converted for one fixed shape. Use qexport.detectors.operators."
            "batched_nms_mask, which returns one bool a box (qexport's static form of a detector does)."
        )
    scores = argument(context, 1, "scores")
    build = NetworkBuilder(load_library().trt, context.network)
    boxes, ranked, valid = (
        trt_tensor(context, argument(context, position, name))
        for position, name in enumerate(("boxes", "scores", "valid"))
    )
    threshold = float(argument(context, 3, "iou_threshold"))
    give(
        context,
        kept_boxes(build, boxes, ranked, valid, iou_threshold=threshold, number=scores.shape[1]),
    )
