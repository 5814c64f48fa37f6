"""The demo detector at every stage, made once a session: small and fast, with everything that a large one has.

torch is imported by the fixtures, not here, so that tests of what runs without it run without it.
"""

# ruff: noqa: PLC0415 - see above

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import NDArray

from qexport.detectors.demo.scenes import HEIGHT, WIDTH, draw_scene

if TYPE_CHECKING:
    from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

    from qexport.artifact import Artifact
    from qexport.detectors.load import LoadedDetector
    from qexport.detectors.static import StaticDetector
    from qexport.encodings import Encodings
    from qexport.quantization.reference import QuantizedDetector

# The same examples in every run; `pytest --hypothesis-profile default` draws new ones.
settings.register_profile("same", deadline=None, derandomize=True)
settings.load_profile("same")

Frame = NDArray[np.uint8]
BCCD = Path(__file__).parents[2] / "shared"
CALIBRATION_SEED, TEST_SEED = 41, 42
KEPT_FLOAT = ("backbone.body.conv1", "roi_heads.box_head", "*.downsample.0", "rpn.head.bbox_pred")
"""By path, by what is above it, by glob, and a layer that is called once per level."""
KEPT_FLOAT_PATHS = {
    "backbone.body.conv1",
    "roi_heads.box_head.fc6",
    "roi_heads.box_head.fc7",
    "rpn.head.bbox_pred",
    *(f"backbone.body.layer{stage}.0.downsample.0" for stage in (1, 2, 3, 4)),
}
"""The convolutions and linears that these patterns match."""


@dataclasses.dataclass(frozen=True, slots=True)
class Bccd:
    """The blood cell detector and the frames of its test split."""

    detector: GeneralizedRCNN
    images: tuple[Path, ...]


@pytest.fixture(scope="session")
def demo() -> LoadedDetector:
    import torch

    from qexport.detectors.load import load_detector

    torch.set_num_threads(1)  # tests share the machine
    return load_detector("demo", None)


@pytest.fixture(scope="session")
def calibration_frames() -> list[Frame]:
    return [draw_scene(CALIBRATION_SEED, index).pixels for index in range(8)]


@pytest.fixture(scope="session")
def demo_frames() -> list[Frame]:
    """Scenes that the encodings were not made from, and a blank one that has no part in it."""
    return [
        *(draw_scene(TEST_SEED, index).pixels for index in range(2)),
        np.full((HEIGHT, WIDTH, 3), 90, np.uint8),
    ]


@pytest.fixture(scope="session")
def small_static() -> StaticDetector:
    """A detector of a dozen layers, for what any detector can show."""
    from torchvision_detectors import FRAME_PX, build_single_level

    from qexport.detectors.static import make_static

    return make_static(build_single_level(), frame_px=FRAME_PX)


@pytest.fixture(scope="session")
def small_frames() -> list[Frame]:
    from torchvision_detectors import texture

    return [texture(seed).numpy() for seed in range(4)]


@pytest.fixture(scope="session")
def small_encodings(small_static: StaticDetector, small_frames: list[Frame]) -> Encodings:
    from qexport.calibration.calibrator import calibrate

    return calibrate(small_static, small_frames[:2])


@pytest.fixture(scope="session")
def demo_static(demo: LoadedDetector) -> StaticDetector:
    from qexport.detectors.static import make_static

    return make_static(demo.module, frame_px=(HEIGHT, WIDTH))


@pytest.fixture(scope="session")
def demo_encodings(demo_static: StaticDetector, calibration_frames: list[Frame]) -> Encodings:
    from qexport.calibration.calibrator import calibrate

    return calibrate(demo_static, calibration_frames)


@pytest.fixture(scope="session")
def demo_quantized(demo_static: StaticDetector, demo_encodings: Encodings) -> QuantizedDetector:
    from qexport.quantization.reference import quantize

    return quantize(demo_static, demo_encodings)


@pytest.fixture(scope="session")
def kept_float(
    demo_static: StaticDetector, calibration_frames: list[Frame]
) -> tuple[Encodings, QuantizedDetector]:
    """The demo detector with `KEPT_FLOAT_PATHS` in float."""
    from qexport.calibration.calibrator import calibrate
    from qexport.quantization.reference import quantize

    encodings = calibrate(demo_static, calibration_frames[:1], keep_float=KEPT_FLOAT)
    return encodings, quantize(demo_static, encodings)


@pytest.fixture(scope="session")
def demo_export(
    demo: LoadedDetector,
    demo_quantized: QuantizedDetector,
    demo_encodings: Encodings,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Artifact, Path]:
    """The ONNX artifact and its folder; a test that edits files copies the folder first."""
    from qexport.exporters.onnx import export
    from qexport.target_options import TargetOptions

    folder = tmp_path_factory.mktemp("demo-artifact")
    return export(demo_quantized, demo_encodings, folder, labels=demo.labels, options=TargetOptions()), folder


@pytest.fixture(scope="session")
def demo_artifact(demo_export: tuple[Artifact, Path]) -> Path:
    return demo_export[1]


@pytest.fixture(scope="session")
def tensorrt_export(
    demo: LoadedDetector,
    demo_quantized: QuantizedDetector,
    demo_encodings: Encodings,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Artifact, Path]:
    """The TensorRT artifact, its engines and their folder; a test that edits files copies the folder first."""
    from qexport.runtimes.tensorrt_library import RTX, installed_flavour

    if installed_flavour() != RTX:
        pytest.skip("no builder that works without a GPU: pip install 'qexport[tensorrt-cpu]'")
    from qexport.exporters.tensorrt import export
    from qexport.target_options import TensorrtOptions

    folder = tmp_path_factory.mktemp("tensorrt-artifact")
    artifact = export(demo_quantized, demo_encodings, folder, labels=demo.labels, options=TensorrtOptions())
    return artifact, folder


@pytest.fixture(scope="session")
def tensorrt_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with scenes in `data`, a finished run of target tensorrt in `mine`, and what it printed."""
    from cli_fixtures import DETECTOR, MEASURED, call

    from qexport.detectors.demo.scenes import write_scenes
    from qexport.runtimes.tensorrt import has_device
    from qexport.runtimes.tensorrt_library import RTX, installed_flavour

    if installed_flavour() != RTX or has_device():
        pytest.skip(
            "needs the builder that works without a GPU, and no GPU: pip install 'qexport[tensorrt-cpu]'"
        )
    folder = tmp_path_factory.mktemp("tensorrt-run")
    write_scenes(folder / "data", train=2, val=2, test=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "200")
        patch.setattr("os.cpu_count", lambda: 1)  # tests share the machine
        answer = call("run", *DETECTOR, "--target", "tensorrt", "--out", "mine", *MEASURED)
    assert answer.code == 0, answer.err
    (folder / "answer.txt").write_text(answer.out)
    return folder


@pytest.fixture(scope="session")
def bccd() -> Bccd:
    """The real detector and data set, which are not part of the repository."""
    from qexport.detectors.load import load_detector

    model = BCCD / "models" / "bccd_resnet18_fpn"
    data = BCCD / "data" / "bccd"
    for needed in (model / "model.py", data / "test.coco.json"):
        if not needed.is_file():
            pytest.skip(f"the blood cell data set is not here: no {needed.name} under {needed.parent.name}")
    names = [entry["file_name"] for entry in json.loads((data / "test.coco.json").read_bytes())["images"]]
    loaded = load_detector(f"{model / 'model.py'}:build", model / "weights_fp16.pt")
    return Bccd(loaded.module, tuple(data / "JPEGImages" / name for name in names))
