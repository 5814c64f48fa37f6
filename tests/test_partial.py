"""Quantizers switched off one by one: what runs then is what `keep_float` exports."""

from __future__ import annotations

import pytest
import torch
from conftest import Frame

from qexport.detectors.static import StaticDetector
from qexport.encodings import Encodings
from qexport.quantization.local import proposals_node
from qexport.quantization.partial import PartlyQuantized
from qexport.quantization.reference import QuantizedDetector, quantize

PATTERNS = (
    ("backbone.body.layer1",),
    ("backbone.fpn", "rpn.head.conv"),
    ("roi_heads.box_head.fc6",),
    ("*",),
)


@pytest.fixture(scope="module")
def partly(demo_quantized: QuantizedDetector) -> PartlyQuantized:
    return PartlyQuantized(demo_quantized)


def test_all_rows_on_is_the_quantized_reference(
    partly: PartlyQuantized, demo_quantized: QuantizedDetector, demo_frames: list[Frame]
) -> None:
    frame = torch.from_numpy(demo_frames[0])
    found = partly.outputs(partly.run(frame, partly.keys))
    assert all(torch.equal(a, b) for a, b in zip(found, demo_quantized.graph(frame), strict=True))


def test_all_rows_off_is_the_float_graph(
    partly: PartlyQuantized, demo_quantized: QuantizedDetector, demo_frames: list[Frame]
) -> None:
    frame = torch.from_numpy(demo_frames[0])
    found = partly.outputs(partly.run(frame, frozenset()))
    assert all(torch.equal(a, b) for a, b in zip(found, demo_quantized.float_graph(frame), strict=True))


@pytest.mark.parametrize("patterns", PATTERNS)
def test_rows_that_patterns_leave_run_as_the_detector_that_is_quantized_with_them(
    partly: PartlyQuantized,
    demo_static: StaticDetector,
    demo_encodings: Encodings,
    demo_frames: list[Frame],
    patterns: tuple[str, ...],
) -> None:
    frame = torch.from_numpy(demo_frames[0])
    base = partly.run(frame, partly.keys)
    keys, _ = partly.keys_with(patterns)
    found = partly.outputs(partly.rerun(base, partly.keys, keys))
    wanted = quantize(demo_static, partly.encodings_with(demo_encodings, patterns)).graph(frame)
    assert keys < partly.keys
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_rerun_with_pinned_proposals_keeps_them(
    partly: PartlyQuantized, demo_quantized: QuantizedDetector, demo_frames: list[Frame]
) -> None:
    frame, boxes = torch.from_numpy(demo_frames[0]), proposals_node(demo_quantized.graph)
    base = partly.run(frame, frozenset())
    assert not torch.equal(partly.rerun(base, frozenset(), partly.keys)[boxes], base[boxes])
    pinned = partly.rerun(base, frozenset(), partly.keys, pinned={boxes})
    whole = partly.run(frame, partly.keys, pinned={boxes: base[boxes]})
    assert torch.equal(pinned[boxes], base[boxes])
    assert all(torch.equal(a, b) for a, b in zip(partly.outputs(pinned), partly.outputs(whole), strict=True))


def test_head_outputs_are_the_logits_and_deltas_of_both_heads(partly: PartlyQuantized) -> None:
    outputs = partly.head_outputs()
    assert set(outputs) == {
        "rpn.head.cls_logits",
        "rpn.head.bbox_pred",
        "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred",
    }
    assert len(outputs["rpn.head.cls_logits"]) > 1  # one for each level
