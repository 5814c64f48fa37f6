"""Every format of QAT checkpoints: the same scale, to the bit, in checkpoint, encodings and artifact."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest
import qat_models
import torch
from conftest import Frame
from qat_cases import CASES, FX, Case, artifact_scales, scale_in
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d
from torchvision_detectors import FRAME_PX, build_single_level, texture

from qexport.calibration.checkpoints import QatCheckpoint, format_of, read_checkpoint
from qexport.calibration.claims import norm_factor
from qexport.calibration.filling import encodings_from_checkpoint
from qexport.detectors.demo.scenes import HEIGHT, WIDTH
from qexport.detectors.load import LoadedDetector
from qexport.detectors.static import StaticDetector, make_static
from qexport.detectors.weights import apply_weights
from qexport.encodings import Encodings, load_encodings, origin_of, save_encodings
from qexport.errors import CheckpointError
from qexport.exporters.onnx import export
from qexport.quantization.graph import constant_of, is_dequantize, op_name, site_of
from qexport.quantization.reference import QuantizedDetector, quantize
from qexport.target_options import TargetOptions

_BUFFER = re.compile(r"^\w+: (?P<buffer>[^,;]+)")


@dataclass(frozen=True, slots=True)
class Read:
    """A checkpoint that became encodings."""

    case: Case
    path: Path
    checkpoint: QatCheckpoint
    static: StaticDetector
    encodings: Encodings
    quantized: QuantizedDetector


@pytest.fixture(scope="module", params=CASES)
def read(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    calibration_frames: list[Frame],
) -> Read:
    return read_case(CASES[request.param], tmp_path_factory.mktemp("qat"), calibration_frames[:1])


def read_case(case: Case, folder: Path, frames: list[Frame]) -> Read:
    torch.set_num_threads(1)  # tests share the machine
    path, detector = case.write(folder), case.build()
    checkpoint = read_checkpoint(path, detector, prepare=case.prepare)
    if checkpoint.state is not None:
        apply_weights(detector, checkpoint.state, source=str(path))
    small = case.build is not FX.build
    static = make_static(detector.eval(), frame_px=FRAME_PX if small else (HEIGHT, WIDTH))
    encodings = encodings_from_checkpoint(static, checkpoint, [texture(0).numpy()] if small else frames)
    # As a run does: through the file.
    encodings = load_encodings(save_encodings(encodings, folder / "encodings.json"))
    return Read(case, path, checkpoint, static, encodings, quantize(static, encodings))


def test_format_is_recognised_by_its_contents(read: Read, tmp_path: Path) -> None:
    renamed = tmp_path / "file.bin"
    renamed.write_bytes(read.path.read_bytes())
    assert format_of(renamed).name == read.checkpoint.format == read.case.name


def test_scales_of_the_checkpoint_are_those_of_encodings_and_artifact_to_the_bit(
    read: Read, tmp_path: Path
) -> None:
    artifact = export(
        read.quantized,
        read.encodings,
        tmp_path,
        labels=("__background__",) + ("a",) * 3,
        options=TargetOptions(),
    )
    stored = artifact_scales(artifact, tmp_path)
    taken = [row for row in read.encodings.rows if origin_of(row) == "checkpoint"]
    assert taken
    for row in taken:
        match = _BUFFER.match(row.source)
        assert match is not None
        wanted = scale_in(read.path, match["buffer"])
        scale = np.float32(row.params.scale)
        if "BatchNorm's factor" in row.source:
            factor = norm_factor(read.static.get_submodule(read.checkpoint.norms[row.path]))
            wanted = wanted * factor.abs().numpy()
        assert scale.tobytes() == np.broadcast_to(wanted, scale.shape).tobytes(), row.key
        assert row.params.scale == tuple(float(value) for value in scale)
    exported = [row for row in read.encodings.rows if row.key in stored]
    assert len(exported) > 0.9 * len(read.encodings.rows)
    for row in exported:
        assert stored[row.key].tobytes() == np.float32(row.params.scale).tobytes(), row.key


def test_rows_come_from_the_buffers_of_their_own_tensors(read: Read) -> None:
    rows = read.encodings.by_key()
    for key, buffer in read.case.pairs.items():
        assert _BUFFER.match(rows[key].source)["buffer"] == buffer, rows[key]  # type: ignore[index]
    assert dict(Counter(map(origin_of, read.encodings.rows))) == read.case.origins


def test_calibrated_rows_have_rounded_scales_and_trained_ones_have_not(read: Read) -> None:
    bits = {"checkpoint": 0, "calibrated": 0}
    for row in read.encodings.rows:
        if row.port != "weight" and origin_of(row) in bits:
            mantissa = np.frexp(np.float32(row.params.scale[0]))[0] * 2**12
            bits[origin_of(row)] += mantissa != round(mantissa)
    assert bits["checkpoint"] > 0
    assert bits["calibrated"] == 0


def test_fused_batch_norm_gives_the_very_weights_that_were_fake_quantized(
    tmp_path: Path, calibration_frames: list[Frame]
) -> None:
    model = qat_models.train_parts(qat_models.prepare_fx()).eval()
    path = qat_models.save(model, tmp_path / "checkpoint.pt")
    case = Case("", lambda _: path, {}, {}, prepare=FX.prepare)
    graph = read_case(case, tmp_path, calibration_frames[:1]).quantized.graph
    compared = 0
    for node in graph.graph.nodes:
        if op_name(node) != "conv2d" or not is_dequantize(node.args[1]):
            continue
        layer = site_of(node).path
        trained = model.get_submodule(layer)
        if not isinstance(trained, nn.Conv2d) or not hasattr(trained, "bn"):
            continue
        factor = trained.bn.weight / torch.sqrt(trained.bn.running_var + trained.bn.eps)
        with torch.no_grad():
            wanted = trained.weight_fake_quant(trained.weight * factor.reshape(-1, 1, 1, 1))
        dequantize = node.args[1]
        scale = constant_of(graph, dequantize.args[1]).reshape(-1, 1, 1, 1)
        codes = constant_of(graph, dequantize.args[0])
        assert int((torch.round(wanted / scale) != codes).sum()) <= codes.numel() // 10_000, layer
        compared += 1
    assert compared == 15


def test_own_table_gives_the_same_table_again(
    demo_static: StaticDetector, demo: LoadedDetector, demo_encodings: Encodings, tmp_path: Path
) -> None:
    path = save_encodings(demo_encodings, tmp_path / "any.txt")
    checkpoint = read_checkpoint(path, demo.module)
    assert (checkpoint.format, checkpoint.state) == ("qexport encodings", None)
    again = encodings_from_checkpoint(demo_static, checkpoint, [], strict=True)
    assert [(row.key, row.params) for row in again.rows] == [
        (row.key, row.params) for row in demo_encodings.rows
    ]
    assert again.calibration["images"] == 0
    assert {origin_of(row) for row in again.rows} == {"checkpoint", "shared"}


@pytest.mark.parametrize("as_text", [True, False], ids=["text", "bytes"])
def test_checkpoint_of_qexport_qat_gives_its_weights_and_its_table(
    demo_static: StaticDetector,
    demo: LoadedDetector,
    demo_encodings: Encodings,
    tmp_path: Path,
    as_text: bool,
) -> None:
    table = msgspec.json.encode(demo_encodings)
    path = tmp_path / "qat.pt"
    torch.save(
        {
            "format": "qexport qat 1",
            "state": demo.module.state_dict(),
            "encodings": table.decode() if as_text else table,
            "notes": "epoch 3",
        },
        path,
    )
    checkpoint = read_checkpoint(path, demo.module)
    assert checkpoint.format == "qexport QAT"
    assert checkpoint.state is not None
    assert all(torch.equal(value, demo.module.state_dict()[key]) for key, value in checkpoint.state.items())
    again = encodings_from_checkpoint(demo_static, checkpoint, [], strict=True)
    assert [(row.key, row.params) for row in again.rows] == [
        (row.key, row.params) for row in demo_encodings.rows
    ]


def test_own_table_of_another_detector_raises(
    small_static: StaticDetector, demo: LoadedDetector, demo_encodings: Encodings, tmp_path: Path
) -> None:
    path = save_encodings(demo_encodings, tmp_path / "encodings.json")
    with pytest.raises(CheckpointError, match="scales are of another detector"):
        encodings_from_checkpoint(small_static, read_checkpoint(path, demo.module), [])


def test_weights_quantized_before_a_frozen_batch_norm_keep_their_codes(tmp_path: Path) -> None:
    detector = build_single_level()
    norm = detector.backbone[1]
    frozen = FrozenBatchNorm2d(norm.num_features, eps=norm.eps)
    frozen.load_state_dict(norm.state_dict())
    frozen.weight[::2] *= -1  # a negative factor turns the codes around
    detector.backbone[1] = frozen
    weight = detector.backbone[0].weight.detach()
    amax = weight.abs().amax((1, 2, 3), keepdim=True)
    state = dict(detector.state_dict())
    for layer in (0, 3):
        state[f"backbone.{layer}.input_quantizer._amax"] = torch.tensor(2.5)
        own = detector.backbone[layer].weight.detach()
        state[f"backbone.{layer}.weight_quantizer._amax"] = own.abs().amax((1, 2, 3), keepdim=True)
    torch.save(state, tmp_path / "checkpoint.pt")
    checkpoint = read_checkpoint(tmp_path / "checkpoint.pt", detector)
    assert dict(checkpoint.norms) == {"backbone.0": "backbone.1"}
    static = make_static(detector, frame_px=FRAME_PX)
    encodings = encodings_from_checkpoint(static, checkpoint, [texture(0).numpy()])
    graph = quantize(static, encodings).graph
    node = next(node for node in graph.graph.nodes if op_name(node) == "conv2d")
    codes = constant_of(graph, node.args[1].args[0])
    trained = torch.clamp(torch.round(weight * (127 / amax)), -128, 127)
    sign = frozen.weight.sign().reshape(-1, 1, 1, 1)
    assert int((codes != trained * sign).sum()) <= 1  # a value that lies on the edge of two codes
