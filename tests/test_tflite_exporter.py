"""The TFLite artifact of the demo detector: integers, scales and names read back; bytes repeated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import KEPT_FLOAT, KEPT_FLOAT_PATHS, Frame
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign
from torchvision_detectors import CLASSES, FRAME_PX, build_torchvision, enliven, texture

pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed (the extra tflite)")

from ai_edge_litert.interpreter import Interpreter

from qexport.artifact import Artifact, load_artifact
from qexport.benchmarks.parity import compare
from qexport.calibration.calibrator import calibrate
from qexport.detectors.load import LoadedDetector
from qexport.detectors.static import StaticDetector, StaticOutput, make_static
from qexport.encodings import Encodings
from qexport.exporters.tflite import FILE_NAMES, export
from qexport.layers import stage_of
from qexport.plugins.tflite.readback import ReadModel
from qexport.quantization.inspection import inspect_layers
from qexport.quantization.reference import QuantizedDetector, quantize
from qexport.runtimes.tflite import RUNNER
from qexport.target_options import TfliteOptions

LABELS = ("__background__", "a", "b", "c")
TRUNK = ("trunk", "fpn", "rpn_head")


@pytest.fixture(scope="module")
def exported(
    demo: LoadedDetector,
    demo_quantized: QuantizedDetector,
    demo_encodings: Encodings,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Artifact, Path]:
    folder = tmp_path_factory.mktemp("tflite")
    artifact = export(demo_quantized, demo_encodings, folder, labels=demo.labels, options=TfliteOptions())
    return artifact, folder


@pytest.fixture(scope="module")
def model(exported: tuple[Artifact, Path]) -> ReadModel:
    return ReadModel(exported[1] / FILE_NAMES["int8"])


def run(path: Path, given: np.ndarray[Any, Any]) -> StaticOutput:
    """Run a file; return its outputs by name."""
    interpreter = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], given)
    interpreter.invoke()
    found = {each["name"]: interpreter.get_tensor(each["index"]) for each in interpreter.get_output_details()}
    return StaticOutput(**{name: torch.from_numpy(np.asarray(value)) for name, value in found.items()})


def assert_same_detections(*, reference: StaticOutput, actual: StaticOutput, px: float, score: float) -> None:
    count = int(reference.count)
    assert count > 0
    assert int(actual.count) == count
    np.testing.assert_array_equal(actual.labels, reference.labels)
    np.testing.assert_allclose(actual.boxes, reference.boxes, atol=px, rtol=0)
    np.testing.assert_allclose(actual.scores, reference.scores, atol=score, rtol=0)


def float_output(quantized: QuantizedDetector, frame: Frame) -> StaticOutput:
    with torch.no_grad():
        return StaticOutput(*quantized.float_graph(torch.from_numpy(frame)))


def test_export_writes_three_files_and_says_so(exported: tuple[Artifact, Path]) -> None:
    artifact, folder = exported
    assert artifact.target == "tflite"
    assert {file.role: file.name for file in artifact.files} == FILE_NAMES
    assert load_artifact(folder)[0] == artifact
    assert {path.name for path in folder.iterdir()} == {*FILE_NAMES.values(), "artifact.json"}
    sizes = {file.role: file.size_bytes for file in artifact.files}
    assert sizes["fp32"] / sizes["int8"] > 3.3
    assert sizes["fp32"] / sizes["fp16"] > 1.85


@pytest.mark.parametrize("role", FILE_NAMES)
def test_export_takes_the_frame_and_returns_boxes_scores_labels_and_count(
    role: str, exported: tuple[Artifact, Path], demo_static: StaticDetector
) -> None:
    artifact, folder = exported
    interpreter = Interpreter(model_path=str(folder / FILE_NAMES[role]))
    (given,) = interpreter.get_input_details()
    spec = artifact.input
    assert given["name"] == "frame"
    assert given["dtype"] == np.uint8
    assert list(given["shape"]) == [spec.frame_height_px, spec.frame_width_px, 3]
    found = [(each["name"], list(each["shape"]), each["dtype"]) for each in interpreter.get_output_details()]
    rows = demo_static.detections
    assert found == [
        ("boxes", [rows, 4], np.float32),
        ("scores", [rows], np.float32),
        ("labels", [rows], np.int32),
        ("count", [], np.int32),
    ]


def test_export_twice_gives_the_same_bytes(
    demo: LoadedDetector,
    demo_quantized: QuantizedDetector,
    demo_encodings: Encodings,
    exported: tuple[Artifact, Path],
    tmp_path: Path,
) -> None:
    export(demo_quantized, demo_encodings, tmp_path, labels=demo.labels, options=TfliteOptions())
    for path in exported[1].iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_export_every_row_of_the_encodings_is_a_tensor_of_that_scale(
    exported: tuple[Artifact, Path], model: ReadModel, demo_encodings: Encodings
) -> None:
    rows = {row.key: row for row in demo_encodings.rows if row.port != "weight"}
    sites = {site.key: site for site in exported[0].sites}
    assert sites.keys() == rows.keys()
    for key, site in sites.items():
        index = model.index[site.tensor]
        assert model.is_int8(index), key
        assert model.scales(index) == (float(np.float32(rows[key].params.scale[0])),), key


def test_export_every_zero_point_is_0_weights_are_per_channel_and_biases_int32(
    model: ReadModel, demo_encodings: Encodings
) -> None:
    weights = {row.path: row.params.scale for row in demo_encodings.rows if row.port == "weight"}
    seen = set()
    for one in model.operators:
        if one.code not in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"):
            continue
        source, weight, bias = one.inputs
        path = one.place.partition("@")[0]
        seen.add(path)
        assert model.scales(weight) == tuple(float(np.float32(scale)) for scale in weights[path])
        assert str(model.tensors[bias].type) == "2"  # int32
        wanted = np.float32(model.scales(source)[0]) * np.asarray(model.scales(weight), np.float32)
        np.testing.assert_allclose(model.scales(bias), wanted, rtol=1e-6)
    assert seen == weights.keys()
    assert {zero for index in range(len(model.tensors)) for zero in model.zero_points(index)} == {0}


def test_export_trunk_and_rpn_head_are_int8_from_the_image_to_their_outputs(model: ReadModel) -> None:
    inside = [one for one in model.operators if stage_of(one.place.partition("@")[0]) in TRUNK]
    assert len(inside) > 40
    assert not [one for one in inside if one.code in ("QUANTIZE", "TRANSPOSE")]
    ends = [one for one in inside if one.code == "DEQUANTIZE"]
    assert {one.place.partition("@")[0] for one in ends} <= {"rpn.head.bbox_pred", "rpn.head.cls_logits"}
    assert all(model.is_int8(one.inputs[0]) for one in inside)


def test_export_every_quantized_layer_is_said_to_be_in_integers(
    exported: tuple[Artifact, Path], demo_encodings: Encodings
) -> None:
    layers = exported[0].layers
    weights = {row.path for row in demo_encodings.rows if row.port == "weight"}
    assert {layer.path for layer in layers if layer.op in ("conv2d", "linear")} == weights
    assert {layer.op for layer in layers if not layer.integer} == {"multiscale_roi_align"}
    assert all(layer.reason for layer in layers if not layer.integer)


def test_export_float_file_agrees_with_torch(
    exported: tuple[Artifact, Path], demo_quantized: QuantizedDetector, demo_frames: list[Frame]
) -> None:
    for frame in demo_frames[:2]:
        found = run(exported[1] / FILE_NAMES["fp32"], frame)
        wanted = float_output(demo_quantized, frame)
        assert_same_detections(reference=wanted, actual=found, px=1e-4, score=1e-5)


def test_export_half_file_agrees_with_torch_within_a_quarter_of_a_pixel(
    exported: tuple[Artifact, Path], demo_quantized: QuantizedDetector, demo_frames: list[Frame]
) -> None:
    for frame in demo_frames[:2]:
        found = run(exported[1] / FILE_NAMES["fp16"], frame)
        wanted = float_output(demo_quantized, frame)
        sure = int((wanted.scores > 0.5).sum())
        assert int((found.scores > 0.5).sum()) == sure > 0
        np.testing.assert_allclose(found.boxes[:sure], wanted.boxes[:sure], atol=0.25)
        np.testing.assert_allclose(found.scores[:sure], wanted.scores[:sure], atol=0.005)


def test_export_every_layer_is_within_a_step_of_the_reference(
    exported: tuple[Artifact, Path], demo_quantized: QuantizedDetector, demo_frames: list[Frame]
) -> None:
    assert_parity(exported[1], demo_quantized, demo_frames)


def assert_parity(
    folder: Path,
    quantized: QuantizedDetector,
    frames: list[Frame],
    keep_float: tuple[str, ...] = (),
) -> None:
    layers = inspect_layers(quantized.static, keep_float=keep_float)
    with RUNNER(folder) as runner:
        report = compare(quantized, runner, layers, frames, split="test")
    assert not [row for row in report.layers if row.failed]
    compared = [row for row in report.layers if row.max_step is not None]
    assert {row.path for row in compared} >= {row.path for row in layers if row.quantized and row.macs}
    assert max(row.max_step or 0 for row in compared) <= 1


def test_export_keeps_layers_in_float_where_the_encodings_say_so(
    kept_float: tuple[Encodings, QuantizedDetector], demo_frames: list[Frame], tmp_path: Path
) -> None:
    encodings, quantized = kept_float
    artifact = export(quantized, encodings, tmp_path, labels=LABELS, options=TfliteOptions())
    model = ReadModel(tmp_path / FILE_NAMES["int8"])
    weighted = [one for one in model.operators if one.code in ("CONV_2D", "FULLY_CONNECTED")]
    in_float = {one.place.partition("@")[0] for one in weighted if not model.is_int8(one.inputs[0])}
    assert in_float == KEPT_FLOAT_PATHS
    assert not KEPT_FLOAT_PATHS & {layer.path for layer in artifact.layers}
    assert_parity(tmp_path, quantized, demo_frames[:1], KEPT_FLOAT)


def test_export_with_portable_suppression_has_none_of_the_own_and_finds_the_same(
    demo: LoadedDetector,
    demo_quantized: QuantizedDetector,
    demo_encodings: Encodings,
    exported: tuple[Artifact, Path],
    demo_frames: list[Frame],
    tmp_path: Path,
) -> None:
    options = TfliteOptions(nms="portable")
    artifact = export(demo_quantized, demo_encodings, tmp_path, labels=demo.labels, options=options)
    assert artifact.forms["nms"] == "fixed point"
    codes = {one.code for one in ReadModel(tmp_path / FILE_NAMES["int8"]).operators}
    assert not [code for code in codes if code.startswith("NON_MAX_SUPPRESSION")]
    for frame in demo_frames:
        own, portable = (run(folder / FILE_NAMES["int8"], frame) for folder in (exported[1], tmp_path))
        for one, other in zip(own, portable, strict=True):
            np.testing.assert_array_equal(one, other)


def test_export_with_preprocessing_outside_takes_the_image(
    demo: LoadedDetector, calibration_frames: list[Frame], demo_frames: list[Frame], tmp_path: Path
) -> None:
    frame_px = demo_frames[0].shape[:2]
    inside = make_static(demo.module, frame_px=(frame_px[0], frame_px[1]))
    static = make_static(demo.module, frame_px=(frame_px[0], frame_px[1]), preprocess="outside")
    images = [inside.preprocess(torch.from_numpy(frame)).numpy() for frame in calibration_frames[:1]]
    encodings = calibrate(static, images)
    quantized = quantize(static, encodings)
    artifact = export(quantized, encodings, tmp_path, labels=demo.labels, options=TfliteOptions())
    assert artifact.input.preprocess == "outside"
    found = run(tmp_path / FILE_NAMES["fp32"], images[0])
    with torch.no_grad():
        wanted = StaticOutput(*quantized.float_graph(torch.from_numpy(images[0])))
    assert_same_detections(reference=wanted, actual=found, px=1e-4, score=1e-5)


class ChannelsLast(nn.Module):
    """A linear layer of each cell, as ConvNeXt has it: two changes of axes that move nothing in TFLite."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        cells: Tensor = self.linear(x.permute(0, 2, 3, 1))
        return cells.permute(0, 3, 1, 2)


def build_with_channels_last() -> FasterRCNN:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=4, padding=1),
            nn.ReLU6(),
            ChannelsLast(16),
            nn.ReLU(),
            nn.Conv2d(16, 24, 3, stride=8, padding=1),
        )
        backbone.out_channels = 24  # type: ignore[assignment] # where torchvision looks for it
        detector = FasterRCNN(
            backbone,
            num_classes=CLASSES,
            min_size=min(FRAME_PX),
            max_size=max(FRAME_PX),
            rpn_anchor_generator=AnchorGenerator(((32, 64),), ((0.5, 1.0, 2.0),)),
            box_roi_pool=MultiScaleRoIAlign(["0"], output_size=5, sampling_ratio=2),
            rpn_post_nms_top_n_test=50,
        )
    return enliven(detector.eval())


def test_export_of_layers_between_changes_of_axes_transposes_nothing(tmp_path: Path) -> None:
    frames = [texture(seed).numpy() for seed in range(2)]
    static = make_static(build_with_channels_last(), frame_px=FRAME_PX)
    encodings = calibrate(static, frames)
    quantized = quantize(static, encodings)
    artifact = export(quantized, encodings, tmp_path, labels=LABELS, options=TfliteOptions())
    model = ReadModel(tmp_path / FILE_NAMES["int8"])
    assert {site.tensor for site in artifact.sites} <= model.index.keys()
    assert_parity(tmp_path, quantized, frames)


def test_export_of_mobilenet_is_in_integers_and_agrees_layer_by_layer(tmp_path: Path) -> None:
    detector = build_torchvision("fasterrcnn_mobilenet_v3_large_320_fpn")
    frames = [texture(seed).numpy() for seed in range(2)]
    static = make_static(detector, frame_px=FRAME_PX)
    encodings = calibrate(static, frames)
    quantized = quantize(static, encodings)
    artifact = export(quantized, encodings, tmp_path, labels=LABELS, options=TfliteOptions())
    sizes = {file.role: file.size_bytes for file in artifact.files}
    assert sizes["fp32"] / sizes["int8"] > 3.8
    assert {"DEPTHWISE_CONV_2D", "MEAN", "MUL"} <= {
        code for layer in artifact.layers for code in layer.kernels
    }
    assert_parity(tmp_path, quantized, frames)
