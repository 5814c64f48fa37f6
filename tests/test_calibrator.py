"""Calibration: images become scales, one image at a time, and layers stay float where they are told to."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
import torch
from conftest import KEPT_FLOAT_PATHS, Frame
from torch.fx import Node

from qexport.calibration.calibrator import calibrate
from qexport.detectors.fingerprint import fingerprint
from qexport.detectors.static import StaticDetector
from qexport.encodings import PER_CHANNEL, PER_TENSOR, Encodings
from qexport.errors import CalibrationError
from qexport.quantization.graph import is_dequantize, op_name, site_of
from qexport.quantization.reference import QuantizedDetector, quantize
from qexport.settings import ObserverName


def test_encodings_say_what_they_were_made_of(
    demo_static: StaticDetector, demo_encodings: Encodings, calibration_frames: list[Frame]
) -> None:
    assert demo_encodings.detector_sha256 == fingerprint(demo_static)
    assert demo_encodings.scheme == PER_CHANNEL
    assert demo_encodings.calibration == {"observer": "min-max", "images": len(calibration_frames)}
    assert {row.path for row in demo_encodings.float_rows} == {
        "preprocess",
        "rpn.proposals",
        "roi_heads.detections",
    }
    for row in demo_encodings.rows:
        assert row.params.zero_point == 0
        assert (row.params.qmin, row.params.qmax) == ((-127, 127) if row.port == "weight" else (-128, 127))


def test_rpn_head_has_a_row_for_each_level(demo_encodings: Encodings) -> None:
    keys = demo_encodings.by_key()
    levels = [keys[f"rpn.head.cls_logits@{call}/output:conv2d"].params.scale for call in range(4)]
    assert len(set(levels)) > 1
    assert "rpn.head.cls_logits@0/weight" in keys
    assert "rpn.head.cls_logits@1/weight" not in keys


def test_calibrate_twice_gives_the_same_table_and_notes_are_kept(
    small_static: StaticDetector, small_encodings: Encodings, small_frames: list[Frame]
) -> None:
    seen: list[int] = []
    again = calibrate(small_static, small_frames[:2], notes={"seed": 7}, on_image=lambda: seen.append(1))
    assert again.calibration == {**small_encodings.calibration, "seed": 7}
    assert msgspec.structs.replace(again, calibration=small_encodings.calibration) == small_encodings
    assert len(seen) == 2


def test_calibrate_leaves_the_static_form_as_it_is_and_holds_one_frame_at_a_time(
    small_static: StaticDetector, small_frames: list[Frame]
) -> None:
    given_out: list[weakref.ref[Frame]] = []
    most = 0

    def frames() -> Iterator[Frame]:
        nonlocal most
        for given in small_frames:
            frame = given.copy()
            given_out.append(weakref.ref(frame))
            yield frame
            del frame
            gc.collect()
            most = max(most, sum(reference() is not None for reference in given_out))

    before = fingerprint(small_static)
    frame = torch.from_numpy(small_frames[0])
    with torch.no_grad():
        wanted = small_static(frame)
        calibrate(small_static, frames())
        found = small_static(frame)
    assert most == 1
    assert fingerprint(small_static) == before
    assert all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True))


@pytest.mark.parametrize(
    ("observer", "source"), [("percentile", "percentile 99"), ("mse", "mse")], ids=["percentile", "mse"]
)
def test_observer_that_clips_gives_smaller_scales_and_says_its_name(
    demo_static: StaticDetector,
    demo_encodings: Encodings,
    calibration_frames: list[Frame],
    observer: ObserverName,
    source: str,
) -> None:
    clipped = calibrate(demo_static, calibration_frames, observer=observer, percentile=99.0)
    assert clipped.calibration["observer"] == source
    smaller = 0
    widest = demo_encodings.by_key()
    for key, row in clipped.by_key().items():
        if row.port == "weight":
            assert row == widest[key]
        elif not row.source.startswith("shared"):
            assert row.source == source
            assert row.params.scale[0] <= widest[key].params.scale[0]
            smaller += row.params.scale[0] < 0.95 * widest[key].params.scale[0]
    assert smaller > 10


def test_weight_scales_per_tensor_give_every_channel_that_of_the_widest(
    small_static: StaticDetector, small_encodings: Encodings, small_frames: list[Frame]
) -> None:
    found = calibrate(small_static, small_frames[:2], weight_scales="per-tensor")
    assert (small_encodings.scheme, found.scheme) == (PER_CHANNEL, PER_TENSOR)
    for own, whole in zip(small_encodings.rows, found.rows, strict=True):
        if own.port == "weight":
            assert whole.params.scale == (max(own.params.scale),) * len(own.params.scale)
        else:
            assert whole == own


def test_calibrate_without_images_raises(small_static: StaticDetector) -> None:
    with pytest.raises(CalibrationError, match="no image"):
        calibrate(small_static, [])


@pytest.mark.parametrize("observer", ["min-max", "percentile", "auto"])
def test_calibrate_a_detector_that_overflows_raises_and_names_the_layer(
    small_static: StaticDetector, small_frames: list[Frame], observer: ObserverName
) -> None:
    static = copy.deepcopy(small_static)
    with torch.no_grad():
        static.get_submodule("backbone.3").weight.mul_(3e38)  # type: ignore[operator, union-attr]
    with pytest.raises(CalibrationError, match=r"backbone\.3.*not finite"):
        calibrate(static, small_frames[:2], observer=observer)


def test_keep_float_by_path_by_what_is_above_and_by_glob_leaves_the_layers_float(
    kept_float: tuple[Encodings, QuantizedDetector],
) -> None:
    encodings, quantized = kept_float
    assert {row.path for row in encodings.rows if row.port == "weight"}.isdisjoint(KEPT_FLOAT_PATHS)
    kept = {row.path: row.reason for row in encodings.float_rows if row.reason.startswith("kept in float")}
    assert kept.keys() >= KEPT_FLOAT_PATHS
    assert kept["roi_heads.box_head.fc6"] == "kept in float by 'roi_heads.box_head'"
    weighted = [node for node in quantized.graph.graph.nodes if op_name(node) in ("conv2d", "linear")]
    assert {site_of(node).path for node in weighted if not is_integer(node)} == KEPT_FLOAT_PATHS


def is_integer(node: Node) -> bool:
    return is_dequantize(node.args[0]) and is_dequantize(node.args[1])


def test_keep_float_of_everything_quantizes_nothing(
    small_static: StaticDetector, small_frames: list[Frame]
) -> None:
    encodings = calibrate(small_static, small_frames[:1], keep_float=("backbone", "rpn", "roi_heads"))
    assert encodings.rows == ()
    quantized: QuantizedDetector = quantize(small_static, encodings)
    frame = torch.from_numpy(small_frames[0])
    with torch.no_grad():
        wanted, found = quantized.static(frame), quantized.graph(frame)
    assert all(np.array_equal(one, other) for one, other in zip(wanted, found, strict=True))


def test_keep_float_pattern_that_matches_nothing_raises_the_nearest_paths(
    small_static: StaticDetector, small_frames: list[Frame]
) -> None:
    with pytest.raises(CalibrationError, match=r"'roi_heads\.box_head\.fc9' matches.*fc[67]"):
        calibrate(small_static, small_frames[:1], keep_float=("backbone", "roi_heads.box_head.fc9"))
