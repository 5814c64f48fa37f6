"""qexport's own operators in a graph that torch.onnx exported: placeholders, until a target lowers them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnx.defs import OpSchema
from onnxscript import opset18, values

from qexport.detectors import operators  # noqa: F401 - registers torch.ops.qexport

DOMAIN = "qexport"
NORMALISED_IMAGE = "NormalisedImage"
ROI_ALIGN = "MultiScaleRoiAlign"
NMS_MASK = "BatchedNmsMask"

_OPSET = values.Opset(DOMAIN, 1)
_Type = OpSchema.AttrType
_Parameter = OpSchema.FormalParameter
_VARIADIC = OpSchema.FormalParameterOption.Variadic


def _operator(
    name: str,
    inputs: Sequence[OpSchema.FormalParameter],
    output: str,
    attributes: dict[str, OpSchema.AttrType],
) -> values.Op:
    schema = OpSchema(
        name,
        DOMAIN,
        1,
        inputs=list(inputs),
        outputs=[_Parameter("result", output)],
        attributes=[OpSchema.Attribute(key, kind) for key, kind in attributes.items()],
    )
    return values.Op(_OPSET, name, schema)


_image = _operator(
    NORMALISED_IMAGE,
    [_Parameter("frame", "tensor(uint8)")],
    "tensor(float)",
    {"mean": _Type.FLOATS, "std": _Type.FLOATS, "resized": _Type.INTS, "padded": _Type.INTS},
)
_roi_align = _operator(
    ROI_ALIGN,
    [_Parameter("boxes_and_features", "tensor(float)", param_option=_VARIADIC)],
    "tensor(float)",
    {
        "scales": _Type.FLOATS,
        "output_size": _Type.INTS,
        "sampling_ratio": _Type.INT,
        "canonical_scale": _Type.INT,
        "canonical_level": _Type.INT,
    },
)
_nms_mask = _operator(
    NMS_MASK,
    [
        _Parameter("boxes", "tensor(float)"),
        _Parameter("scores", "tensor(float)"),
        _Parameter("valid", "tensor(bool)"),
    ],
    "tensor(bool)",
    {"iou_threshold": _Type.FLOAT},
)


def _translate_image(
    frame: Any, mean: Sequence[float], std: Sequence[float], resized: Sequence[int], padded: Sequence[int]
) -> Any:
    return _image(frame, mean=mean, std=std, resized=resized, padded=padded)


def _translate_roi_align(
    features: Sequence[Any],
    boxes: Any,
    scales: Sequence[float],
    output_size: Sequence[int],
    sampling_ratio: int,
    canonical_scale: int,
    canonical_level: int,
) -> Any:
    return _roi_align(
        boxes,
        *features,
        scales=scales,
        output_size=output_size,
        sampling_ratio=sampling_ratio,
        canonical_scale=canonical_scale,
        canonical_level=canonical_level,
    )


def _translate_nms_mask(boxes: Any, scores: Any, valid: Any, iou_threshold: float) -> Any:
    return _nms_mask(boxes, scores, valid, iou_threshold=iou_threshold)


def _translate_best_scores(scores: Any, count: int) -> Any:
    # Of equal values, ONNX's TopK takes the one with the lower index first.
    return opset18.TopK(scores, opset18.Constant(value_ints=[count]), axis=0, largest=1, sorted=1)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what `torch.onnx.export` takes as `custom_translation_table`."""
    return {
        torch.ops.qexport.normalised_image.default: _translate_image,
        torch.ops.qexport.multiscale_roi_align.default: _translate_roi_align,
        torch.ops.qexport.batched_nms_mask.default: _translate_nms_mask,
        torch.ops.qexport.best_scores.default: _translate_best_scores,
    }
