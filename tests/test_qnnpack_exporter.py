"""The QNNPACK artifact of the demo detector: loaded by torch alone, read back, compared layer by layer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from conftest import KEPT_FLOAT, KEPT_FLOAT_PATHS, Frame
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign
from torchvision_detectors import FRAME_PX, build_torchvision, enliven, texture

from qexport.artifact import Artifact, load_artifact
from qexport.benchmarks.parity import compare
from qexport.calibration.calibrator import calibrate
from qexport.detectors.load import LoadedDetector
from qexport.detectors.static import StaticDetector, StaticOutput, make_static
from qexport.encodings import Encodings, digest_of_rows, load_encodings, save_encodings
from qexport.errors import EncodingsError
from qexport.exporters.qnnpack import FILE_NAMES, export
from qexport.quantization.inspection import inspect_layers
from qexport.quantization.reference import QuantizedDetector, quantize
from qexport.runtimes.qnnpack import RUNNER
from qexport.runtimes.runner import OUTPUTS
from qexport.target_options import TargetOptions

LABELS = ("__background__", "a", "b", "c")
ALONE = """
import sys
import numpy, torch, torchvision
torch.set_num_threads(1)
torch.backends.quantized.engine = "qnnpack"
module = torch.jit.load(sys.argv[1])
found = [module(torch.from_numpy(frame)) for frame in numpy.load(sys.argv[2])]
numpy.savez(sys.argv[3], **{f"{number}_{place}": value.numpy()
    for number, outputs in enumerate(found) for place, value in enumerate(outputs)})
assert not [name for name in sys.modules if name.partition(".")[0] in ("qexport", "torchao")]
"""


@pytest.fixture(scope="module")
def exported(
    demo: LoadedDetector,
    demo_quantized: QuantizedDetector,
    demo_encodings: Encodings,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Artifact, Path]:
    folder = tmp_path_factory.mktemp("qnnpack")
    artifact = export(demo_quantized, demo_encodings, folder, labels=demo.labels, options=TargetOptions())
    return artifact, folder


def assert_parity(
    folder: Path, quantized: QuantizedDetector, frames: list[Frame], keep_float: tuple[str, ...] = ()
) -> None:
    layers = inspect_layers(quantized.static, keep_float=keep_float)
    with RUNNER(folder) as runner:
        report = compare(quantized, runner, layers, frames, split="test")
    assert not [row for row in report.layers if row.failed]
    assert all(gate.passed for gate in report.gates)
    compared = [row for row in report.layers if row.max_step is not None]
    assert {row.path for row in compared} >= {row.path for row in layers if row.quantized and row.macs}
    assert max(row.max_step or 0 for row in compared) <= 1
    assert sum(row.differing or 0 for row in compared) < 1e-4 * sum(row.values for row in compared)


def test_export_writes_two_files_and_says_so(exported: tuple[Artifact, Path]) -> None:
    artifact, folder = exported
    assert artifact.target == "qnnpack"
    assert artifact.forms["engine"] == "qnnpack"
    assert {file.role: file.name for file in artifact.files} == FILE_NAMES
    assert load_artifact(folder)[0] == artifact
    assert {path.name for path in folder.iterdir()} == {*FILE_NAMES.values(), "artifact.json"}
    sizes = {file.role: file.size_bytes for file in artifact.files}
    assert sizes["fp32"] / sizes["int8"] > 3.4  # of a detector so small that names and code weigh


def test_export_leaves_torch_as_it_was(
    demo: LoadedDetector, demo_quantized: QuantizedDetector, demo_encodings: Encodings, tmp_path: Path
) -> None:
    before = (torch.backends.quantized.engine, torch.get_num_threads(), torch.is_grad_enabled())
    export(demo_quantized, demo_encodings, tmp_path, labels=demo.labels, options=TargetOptions())
    assert (torch.backends.quantized.engine, torch.get_num_threads(), torch.is_grad_enabled()) == before


def test_export_loads_in_a_fresh_process_with_torch_alone_and_is_the_same_bit_for_bit(
    exported: tuple[Artifact, Path], demo_frames: list[Frame], tmp_path: Path
) -> None:
    np.save(tmp_path / "frames.npy", np.stack(demo_frames))
    for role, name in FILE_NAMES.items():
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            ALONE,
            exported[1] / name,
            "frames.npy",
            f"{role}.npz",
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        found = np.load(tmp_path / f"{role}.npz")
        with RUNNER(exported[1], role=role) as runner:
            for number, frame in enumerate(demo_frames):
                here = runner.run(runner.input_of(frame))
                for place, output in enumerate(OUTPUTS):
                    np.testing.assert_array_equal(found[f"{number}_{place}"], here[output])
        assert found["0_3"] > 0


def test_export_float_file_is_torchs_own_bit_for_bit(
    exported: tuple[Artifact, Path], demo_quantized: QuantizedDetector, demo_frames: list[Frame]
) -> None:
    with RUNNER(exported[1], role="fp32") as runner, torch.no_grad():
        for frame in demo_frames:
            wanted = StaticOutput(*demo_quantized.float_graph(torch.from_numpy(frame)))
            found = runner.run(runner.input_of(frame))
            for name in OUTPUTS:
                np.testing.assert_array_equal(found[name], getattr(wanted, name).numpy())


def test_export_every_layer_is_a_quantized_module_at_its_own_path(
    exported: tuple[Artifact, Path], demo_encodings: Encodings, demo_static: StaticDetector
) -> None:
    artifact = exported[0]
    weights = {row.path for row in demo_encodings.rows if row.port == "weight"}
    weighted = [layer for layer in artifact.layers if layer.op in ("conv2d", "linear")]
    assert {layer.path for layer in weighted} == weights
    assert all(layer.integer and layer.kernels[0].startswith("quantized::") for layer in weighted)
    assert [layer.op for layer in artifact.layers if not layer.integer] == ["multiscale_roi_align"]
    tensors = {site.key: site.tensor for site in artifact.sites}
    assert tensors["rpn.head.conv.0.0@0/output:conv2d"] == "rpn.head.conv.0.0"
    assert tensors["rpn.head.conv.0.0@1/output:conv2d"] == "rpn.head.conv.0.0__call1"
    assert {site.zero_point for site in artifact.sites} == {128}
    assert {row.key for row in demo_encodings.rows if row.port != "weight"} == tensors.keys()
    own = dict(demo_static.named_modules())
    assert {layer.path for layer in weighted} <= own.keys()


def test_export_every_layer_is_within_a_step_of_the_reference(
    exported: tuple[Artifact, Path], demo_quantized: QuantizedDetector, demo_frames: list[Frame]
) -> None:
    assert_parity(exported[1], demo_quantized, demo_frames)


def test_export_keeps_layers_in_float_where_the_encodings_say_so(
    kept_float: tuple[Encodings, QuantizedDetector], demo_frames: list[Frame], tmp_path: Path
) -> None:
    encodings, quantized = kept_float
    artifact = export(quantized, encodings, tmp_path, labels=LABELS, options=TargetOptions())
    assert not KEPT_FLOAT_PATHS & {layer.path for layer in artifact.layers}
    assert_parity(tmp_path, quantized, demo_frames[:1], KEPT_FLOAT)


def test_export_with_preprocessing_outside_takes_the_image(
    demo: LoadedDetector, calibration_frames: list[Frame], demo_frames: list[Frame], tmp_path: Path
) -> None:
    height, width = demo_frames[0].shape[:2]
    inside = make_static(demo.module, frame_px=(height, width))
    static = make_static(demo.module, frame_px=(height, width), preprocess="outside")
    images = [inside.preprocess(torch.from_numpy(frame)).numpy() for frame in calibration_frames[:1]]
    encodings = calibrate(static, images)
    quantized = quantize(static, encodings)
    artifact = export(quantized, encodings, tmp_path, labels=demo.labels, options=TargetOptions())
    assert artifact.input.preprocess == "outside"
    assert_parity(tmp_path, quantized, demo_frames[:1])


@pytest.mark.parametrize(
    "name",
    [
        "fasterrcnn_mobilenet_v3_large_320_fpn",
        pytest.param("fasterrcnn_resnet50_fpn", marks=pytest.mark.slow),
    ],
)
def test_export_of_torchvisions_detectors_agrees_layer_by_layer(name: str, tmp_path: Path) -> None:
    frames = [texture(seed).numpy() for seed in range(2)]
    static = make_static(build_torchvision(name), frame_px=FRAME_PX)
    encodings = calibrate(static, frames)
    quantized = quantize(static, encodings)
    artifact = export(quantized, encodings, tmp_path, labels=LABELS, options=TargetOptions())
    sizes = {file.role: file.size_bytes for file in artifact.files}
    assert sizes["fp32"] / sizes["int8"] > 3.5
    assert_parity(tmp_path, quantized, frames[:1])


def build_with_relu6() -> FasterRCNN:
    """Return a detector of depthwise convolutions with ReLU6 and no pyramid, as MobileNetV2 has them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=4, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU6(inplace=True),
            nn.Conv2d(16, 16, 3, padding=1, groups=16),
            nn.ReLU6(inplace=True),
            nn.Conv2d(16, 24, 3, stride=8, padding=1),
            nn.Hardtanh(-1.0, 2.0),
        )
        backbone.out_channels = 24  # type: ignore[assignment] # where torchvision looks for it
        detector = FasterRCNN(
            backbone,
            num_classes=4,
            min_size=min(FRAME_PX),
            max_size=max(FRAME_PX),
            rpn_anchor_generator=AnchorGenerator(((32, 64),), ((0.5, 1.0, 2.0),)),
            box_roi_pool=MultiScaleRoIAlign(["0"], output_size=5, sampling_ratio=2),
            rpn_post_nms_top_n_test=50,
        )
    return enliven(detector.eval())


def test_export_of_saturating_activations_agrees_layer_by_layer(tmp_path: Path) -> None:
    frames = [texture(seed).numpy() for seed in range(2)]
    static = make_static(build_with_relu6(), frame_px=FRAME_PX)
    encodings = calibrate(static, frames)
    quantized = quantize(static, encodings)
    export(quantized, encodings, tmp_path, labels=LABELS, options=TargetOptions())
    assert_parity(tmp_path, quantized, frames)


def test_export_of_a_zero_point_that_quint8_with_128_cannot_hold_is_refused(
    small_static: StaticDetector, small_encodings: Encodings, tmp_path: Path
) -> None:
    rows = list(small_encodings.rows)
    place = next(number for number, row in enumerate(rows) if row.port != "weight")
    params = msgspec.structs.replace(rows[place].params, zero_point=-128)
    rows[place] = msgspec.structs.replace(rows[place], params=params)
    odd = msgspec.structs.replace(
        small_encodings, rows=tuple(rows), rows_sha256=digest_of_rows(tuple(rows), small_encodings.float_rows)
    )
    message = rf"{rows[place].key} has zero point -128"
    with pytest.raises(EncodingsError, match=message):
        export(quantize(small_static, small_encodings), odd, tmp_path, labels=LABELS, options=TargetOptions())
    assert not list(tmp_path.iterdir())
    with pytest.raises(EncodingsError, match=message):
        load_encodings(save_encodings(odd, tmp_path / "encodings.json"))
