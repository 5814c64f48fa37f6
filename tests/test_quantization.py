"""The quantized graph: rebuilt from the table bit for bit, and refused where the table does not fit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from conftest import Frame
from torch import Tensor, nn
from torch.fx import GraphModule

from qexport.benchmarks.recall import RecallCounter
from qexport.calibration.calibrator import calibrate
from qexport.detections import Detections
from qexport.detectors.load import LoadedDetector
from qexport.detectors.static import StaticDetector, make_static
from qexport.encodings import (
    EncodingRow,
    Encodings,
    QuantParams,
    digest_of_rows,
    load_encodings,
    save_encodings,
)
from qexport.errors import EncodingsError
from qexport.quantization.graph import constant_of, is_dequantize, op_name
from qexport.quantization.inspection import inspect_layers
from qexport.quantization.local import LocalReference, Recorder, proposals_node
from qexport.quantization.reference import QuantizedDetector, quantize

FC6 = "roi_heads.box_head.fc6@0"
STEM = "backbone.body.conv1"
HUGE = 1e6
Edit = Callable[[EncodingRow], EncodingRow | None]


def edit_rows(encodings: Encodings, edit: Edit, *extra: EncodingRow) -> Encodings:
    """Return the table with each row replaced or, where `edit` says None, removed; its digest fits again."""
    rows = (*(row for row in map(edit, encodings.rows) if row is not None), *extra)
    return msgspec.structs.replace(
        encodings, rows=rows, rows_sha256=digest_of_rows(rows, encodings.float_rows)
    )


def rescale(key: str, scale: tuple[float, ...]) -> Edit:
    """Return an edit that gives one row other scales."""

    def edit(row: EncodingRow) -> EncodingRow:
        if row.key != key:
            return row
        return msgspec.structs.replace(row, params=msgspec.structs.replace(row.params, scale=scale))

    return edit


def everything(quantized: QuantizedDetector, frame: Frame) -> dict[str, Tensor]:
    """Return every tensor of integers and every output that the quantized graph computes."""
    recorder = Recorder(quantized.graph, {node.name: key for key, node in quantized.quantize_nodes.items()})
    with torch.no_grad():
        outputs = recorder.run(torch.from_numpy(frame))
    return {**recorder.values, **dict(zip(("boxes", "scores", "labels", "count"), outputs, strict=True))}


def test_graph_rebuilt_from_saved_encodings_is_bit_identical(
    demo_static: StaticDetector,
    demo_encodings: Encodings,
    demo_quantized: QuantizedDetector,
    demo_frames: list[Frame],
    tmp_path: Path,
) -> None:
    read = load_encodings(save_encodings(demo_encodings, tmp_path / "encodings.json"))
    assert read == demo_encodings
    again = quantize(demo_static, read)
    for frame in demo_frames:
        first, second = everything(demo_quantized, frame), everything(again, frame)
        assert len(first) == len(demo_quantized.quantize_nodes) + 4
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_quantized_graph_finds_what_the_float_detector_finds(
    demo_quantized: QuantizedDetector, demo_static: StaticDetector, demo_frames: list[Frame]
) -> None:
    counter = RecallCounter()
    for frame in demo_frames:
        with torch.no_grad():
            wanted = demo_static(torch.from_numpy(frame))
        found = everything(demo_quantized, frame)
        number = int(found["count"])
        boxes, scores, labels = (found[name][:number].numpy() for name in ("boxes", "scores", "labels"))
        counter.add_detections("fp32", wanted=wanted, found=Detections(boxes, scores, labels))
    detections = counter.results()[2]
    assert detections.boxes > 10
    assert detections.matched >= detections.boxes - 1


def test_every_row_is_used_and_every_layer_has_its_rows(
    demo_encodings: Encodings, demo_quantized: QuantizedDetector, demo_static: StaticDetector
) -> None:
    activations = {row.key for row in demo_encodings.rows if row.port != "weight"}
    assert activations == set(demo_quantized.quantize_nodes)
    for layer in inspect_layers(demo_static):
        if layer.quantized and layer.stage != "preprocess":
            assert f"{layer.path}@{layer.call}/output:{layer.op}" in activations
            assert (layer.macs > 0) == (layer.kind in ("convolution", "linear"))


@pytest.mark.parametrize(
    ("key", "producer"),
    [
        ("backbone.body.maxpool@0/output:max_pool2d", f"{STEM}@0/output:conv2d"),
        ("backbone.fpn@0/output:upsample_nearest2d", "backbone.fpn.inner_blocks.2.0@0/output:conv2d"),
        ("backbone.fpn@0/output:upsample_nearest2d#1", "backbone.fpn@0/output:add"),
        ("backbone.fpn.extra_blocks@0/output:slice", "backbone.fpn.layer_blocks.2.0@0/output:conv2d"),
        ("backbone.fpn.extra_blocks@0/output:slice#1", "backbone.fpn.layer_blocks.2.0@0/output:conv2d"),
        ("roi_heads.box_head@0/output:view", "roi_heads.box_roi_pool@0/output:multiscale_roi_align"),
    ],
)
def test_row_of_an_operator_that_moves_values_equals_its_producers(
    demo_encodings: Encodings, key: str, producer: str
) -> None:
    rows = demo_encodings.by_key()
    assert rows[key].params == rows[producer].params
    assert rows[key].source == f"shared with {producer}"


def test_biases_lie_on_the_int32_grid_of_their_call(demo_quantized: QuantizedDetector) -> None:
    layers = 0
    for step, bias in bias_steps(demo_quantized.graph):
        codes = bias.double() / step.double()
        # As float32, a bias of many steps lies beside the grid by its own last bit.
        assert bool(((codes - codes.round()).abs() <= 1e-4 + codes.abs() * 2.0**-23).all())
        assert float(codes.abs().max()) < 2**31
        layers += 1
    assert (
        layers == 37
    )  # 28 convolutions and linears; the RPN head's three are called once for each of four levels


def bias_steps(graph: GraphModule) -> list[tuple[Tensor, Tensor]]:
    """Return, for each convolution and linear, the step of its accumulator per channel, and its bias."""
    found = []
    for node in graph.graph.nodes:
        if op_name(node) in ("conv2d", "linear"):
            source, weight, bias = node.args[:3]
            assert is_dequantize(source)
            assert is_dequantize(weight)
            scale = constant_of(graph, weight.args[1])
            found.append(
                (torch.tensor(source.args[1], dtype=torch.float32) * scale, constant_of(graph, bias))
            )
    return found


def with_dead_channel(demo: LoadedDetector) -> StaticDetector:
    """Return the demo detector with one channel whose weights are zero and whose bias is huge."""
    detector = copy.deepcopy(demo.module)
    with torch.no_grad():
        conv, norm = (detector.get_submodule(f"backbone.body.{name}") for name in ("conv1", "bn1"))
        assert isinstance(conv, nn.Conv2d)
        conv.weight[0] = 0
        conv.weight[1] *= 1e-12
        norm.bias[:2] = HUGE  # type: ignore[operator, index]
        norm.running_mean[:2] = 0  # type: ignore[operator, index]
    return make_static(detector, frame_px=(240, 320))


def test_channel_of_zero_weights_and_huge_bias_keeps_its_bias(
    demo: LoadedDetector, calibration_frames: list[Frame]
) -> None:
    static = with_dead_channel(demo)
    encodings = calibrate(static, calibration_frames[:1])
    row = encodings.by_key()[f"{STEM}@0/weight"]
    assert row.source == "min-max, 2 channels raised for the bias"
    quantized = quantize(static, encodings)
    step, bias = bias_steps(quantized.graph)[0]
    assert float((bias / step).abs().max()) <= 2**30
    assert bias[:2].tolist() == pytest.approx([HUGE, HUGE], rel=1e-6)
    codes = everything(quantized, calibration_frames[0])[f"{STEM}@0/output:conv2d"]
    scale = encodings.by_key()[f"{STEM}@0/output:conv2d"].params.scale[0]
    assert float((codes[0, :2].float() * scale - HUGE).abs().max()) <= scale


EDITS: dict[str, tuple[Edit, str]] = {
    "an activation's row missing": (lambda row: None if row.key == f"{FC6}/output:linear" else row, FC6),
    "a weight's row missing": (lambda row: None if row.key == f"{FC6}/weight" else row, FC6),
    "a weight of too few scales": (rescale(f"{FC6}/weight", (0.1,) * 64), "1024 output channels.* 64 scales"),
    "an activation of several scales": (rescale(f"{FC6}/output:linear", (0.1, 0.2)), "has 2 scales"),
}


@pytest.mark.parametrize(("edit", "message"), EDITS.values(), ids=EDITS.keys())
def test_quantize_with_rows_that_do_not_fit_raises(
    small_static: StaticDetector, small_encodings: Encodings, edit: Edit, message: str
) -> None:
    with pytest.raises(EncodingsError, match=message):
        quantize(small_static, edit_rows(small_encodings, edit))


@pytest.mark.parametrize("port", ["output:conv2d", "weight"])
def test_quantize_with_a_row_left_over_raises(
    small_static: StaticDetector, small_encodings: Encodings, port: str
) -> None:
    extra = EncodingRow("backbone.body.layer9", 0, port, QuantParams((0.1,)), "min-max")
    with pytest.raises(EncodingsError, match=r"name nothing .* backbone\.body\.layer9@0/"):
        quantize(small_static, edit_rows(small_encodings, lambda row: row, extra))


def test_quantize_with_encodings_of_other_weights_raises(
    demo: LoadedDetector, demo_encodings: Encodings
) -> None:
    other = copy.deepcopy(demo.module)
    with torch.no_grad():
        other.roi_heads.box_predictor.cls_score.bias += 0.01
    with pytest.raises(EncodingsError, match="of another detector"):
        quantize(make_static(other, frame_px=(240, 320)), demo_encodings)


def test_quantize_with_other_numbers_of_proposals_and_detections_takes_the_same_encodings(
    demo: LoadedDetector, demo_encodings: Encodings
) -> None:
    static = make_static(demo.module, frame_px=(240, 320), proposals=20, detections=5, preprocess="outside")
    assert quantize(static, demo_encodings).quantize_nodes.keys() == {
        row.key for row in demo_encodings.rows if row.port != "weight"
    }


@pytest.mark.parametrize(
    ("scale", "message"),
    [(0.0, "has scale 0.0"), (-0.5, "has scale -0.5"), (None, "scale missing")],
    ids=["zero", "negative", "none"],
)
def test_load_encodings_with_a_scale_that_is_none_raises(
    demo_encodings: Encodings, tmp_path: Path, scale: float | None, message: str
) -> None:
    edit = rescale(f"{FC6}/output:linear", () if scale is None else (scale,))
    path = save_encodings(edit_rows(demo_encodings, edit), tmp_path / "encodings.json")
    with pytest.raises(EncodingsError, match=message):
        load_encodings(path)


def test_load_encodings_with_a_scale_that_is_not_a_number_raises(
    demo_encodings: Encodings, tmp_path: Path
) -> None:
    path = save_encodings(demo_encodings, tmp_path / "encodings.json")
    scale = msgspec.json.encode(demo_encodings.rows[0].params.scale[0]).decode()
    for text in ("NaN", "null", '"0.1"', "1e999"):
        path.write_text(save_encodings(demo_encodings, path).read_text().replace(scale, text, 1))
        with pytest.raises(EncodingsError, match=r"encodings\.json"):
            load_encodings(path)


def test_load_encodings_with_an_edited_scale_raises(demo_encodings: Encodings, tmp_path: Path) -> None:
    edited = edit_rows(demo_encodings, rescale(f"{FC6}/output:linear", (0.123,)))
    forged = msgspec.structs.replace(edited, rows_sha256=demo_encodings.rows_sha256)
    path = save_encodings(forged, tmp_path / "encodings.json")
    with pytest.raises(EncodingsError, match="edited after calibration"):
        load_encodings(path)


def test_local_reference_answers_what_the_whole_graph_computes(
    demo_quantized: QuantizedDetector, demo_frames: list[Frame]
) -> None:
    proposals_name = "proposals"
    reference = LocalReference(demo_quantized)
    names = {node.name: key for key, node in demo_quantized.quantize_nodes.items()}
    names[proposals_node(demo_quantized.graph).name] = proposals_name
    recorder = Recorder(demo_quantized.graph, names)
    frame = torch.from_numpy(demo_frames[0])
    with torch.no_grad():
        recorder.run(frame)
    codes = recorder.values
    proposals = codes.pop(proposals_name)
    for key, wanted in codes.items():
        assert torch.equal(reference.expected(key, codes, frame, proposals), wanted), key


def test_local_reference_of_a_layer_given_other_integers_answers_for_those(
    demo_quantized: QuantizedDetector, demo_frames: list[Frame]
) -> None:
    codes = everything(demo_quantized, demo_frames[0])
    key, source = "backbone.body.layer1.0.conv1@0/output:conv2d", "backbone.body.maxpool@0/output:max_pool2d"
    frame, proposals = torch.from_numpy(demo_frames[0]), torch.zeros(100, 4)
    reference = LocalReference(demo_quantized)
    changed = {**codes, source: torch.zeros_like(codes[source])}
    same = reference.expected(key, codes, frame, proposals)
    other = reference.expected(key, changed, frame, proposals)
    assert torch.equal(same, codes[key])
    assert other.float().std(dim=(2, 3))[0, :, None].max() < same.float().std(dim=(2, 3))[0].max()
