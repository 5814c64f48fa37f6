"""The camera frame to the detector's image."""

from __future__ import annotations

from qexport.plugins.frame_to_image import Preprocessing, make_image
from qexport.plugins.tensorrt.network_builder import NetworkBuilder
from qexport.plugins.torch2trt.interface import ConversionContext, argument, give, trt_tensor
from qexport.runtimes.tensorrt_library import load_library

FUNCTIONS: tuple[str, ...] = ("qexport.detectors.operators.normalised_image",)


def convert(context: ConversionContext) -> None:
    """Add the layers of one call of normalised_image(frame, mean, std, resized, padded)."""
    frame = argument(context, 0, "frame")
    resized, padded = argument(context, 3, "resized"), argument(context, 4, "padded")
    asked = Preprocessing(
        frame=(frame.shape[0], frame.shape[1]),
        resized=(resized[0], resized[1]),
        padded=(padded[0], padded[1]),
        mean=argument(context, 1, "mean"),
        std=argument(context, 2, "std"),
    )
    build = NetworkBuilder(load_library().trt, context.network)
    give(context, make_image(build, trt_tensor(context, frame), asked, integers_move=False))
