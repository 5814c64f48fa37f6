"""The static form gives what the eager detector gives, to the last bit."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import TEST_SEED, Bccd, Frame
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops.misc import FrozenBatchNorm2d
from torchvision_detectors import (
    CLASSES,
    FRAME_PX,
    Row,
    build_single_level,
    build_torchvision,
    detect,
    detect_static,
    texture,
)

from qexport.calibration.calibrator import calibrate
from qexport.detectors import operators
from qexport.detectors.demo.scenes import draw_scene
from qexport.detectors.load import LoadedDetector
from qexport.detectors.static import StaticDetector, make_static
from qexport.encodings import Encodings
from qexport.errors import CheckpointError
from qexport.frames import read_image
from qexport.quantization.fold import fold_batch_norm
from qexport.runtimes.preprocess import normalised_image

TORCHVISION = (
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
)
FRAMES_PX = {
    "unresized": (240, 320),
    "halved": (480, 640),
    "odd ratios": (333, 471),
    "upscaled": (100, 150),
    "upright": (320, 200),
}
FEW = 4


@pytest.fixture(scope="module", params=TORCHVISION)
def torchvision_detector(request: pytest.FixtureRequest) -> GeneralizedRCNN:
    return build_torchvision(request.param)


def as_tensor(frame: Frame) -> Tensor:
    return torch.from_numpy(frame)


def threshold_that_leaves(detector: GeneralizedRCNN, frame: Tensor, count: int) -> float:
    """Return a score threshold, between two scores of `frame`, that `count` detections pass."""
    scores = sorted((row[4] for row in detect(detector, frame)), reverse=True)
    assert len(scores) > count
    return (scores[count - 1] + scores[count]) / 2


def test_static_demo_on_scenes_and_a_blank_frame_equals_eager(
    demo: LoadedDetector, demo_static: StaticDetector, demo_frames: list[Frame]
) -> None:
    counts = []
    for frame in demo_frames:
        eager = detect(demo.module, as_tensor(frame))
        assert detect_static(demo_static, as_tensor(frame)) == eager
        counts.append(len(eager))
    assert min(counts[:-1]) > 2
    assert counts[-1] == 0


@pytest.mark.parametrize("frame_px", FRAMES_PX.values(), ids=FRAMES_PX.keys())
def test_static_of_a_frame_size_equals_eager_in_pixels_of_the_frame(
    demo: LoadedDetector, frame_px: tuple[int, int]
) -> None:
    static = make_static(demo.module, frame_px=frame_px)
    counts = []
    for seed in (3, 4):
        frame = texture(seed, frame_px)
        frame[10:60, 20:90] = 255  # something that looks like a part
        eager = detect(demo.module, frame)
        assert detect_static(static, frame) == eager
        counts.append(len(eager))
    assert max(counts) > 0


@pytest.mark.parametrize("wanted", ["many", "few", "none"])
def test_static_torchvision_detector_equals_eager(torchvision_detector: GeneralizedRCNN, wanted: str) -> None:
    heads = torchvision_detector.roi_heads
    heads.score_thresh = 0.05
    frame = texture(1)
    if wanted == "few":
        heads.score_thresh = threshold_that_leaves(torchvision_detector, frame, FEW)
    if wanted == "none":
        heads.score_thresh = 1.0
    static = make_static(torchvision_detector, frame_px=FRAME_PX)
    eager = detect(torchvision_detector, frame)
    assert {"many": len(eager) > 40, "few": len(eager) == FEW, "none": not eager}[wanted]
    assert detect_static(static, frame) == eager


def test_static_with_fewer_real_proposals_than_rows_equals_eager(
    torchvision_detector: GeneralizedRCNN,
) -> None:
    frame = texture(1)
    detector = keep_candidates(torchvision_detector, frame, 60)
    detector.roi_heads.score_thresh = 0.05
    static = make_static(detector, frame_px=FRAME_PX)
    assert 8 <= real_proposals(static, frame) < static.proposals
    eager = detect(detector, frame)
    assert eager
    assert detect_static(static, frame) == eager


def real_proposals(static: StaticDetector, frame: Tensor) -> int:
    with torch.no_grad():
        features = list(static.backbone(static.preprocess(frame)).values())
        _, real = static.rpn.proposals(*static.rpn.head(features))
    return int(real.sum())


def test_static_with_three_real_proposals_differs_by_float_rounding_alone(demo: LoadedDetector) -> None:
    # Below four rows MKL multiplies matrices by another kernel, which sums in another order.
    frame = torch.from_numpy(draw_scene(TEST_SEED, 0).pixels)
    detector = keep_candidates(demo.module, frame, 3)
    static = make_static(detector, frame_px=(240, 320))
    assert 1 <= real_proposals(static, frame) <= 3
    eager, found = detect(detector, frame), detect_static(static, frame)
    assert len(found) == len(eager) > 0
    np.testing.assert_allclose(np.array(found), np.array(eager), rtol=1e-5, atol=1e-4)


def keep_candidates(detector: GeneralizedRCNN, frame: Tensor, count: int) -> GeneralizedRCNN:
    """Return the detector with an RPN threshold that `count` anchors of `frame` pass, before NMS."""
    picky = copy.deepcopy(detector)
    with torch.no_grad():
        images, _ = picky.transform([frame.permute(2, 0, 1) / 255])
        features = list(picky.backbone(images.tensors).values())
        best = torch.cat([logits.flatten() for logits in picky.rpn.head(features)[0]]).sigmoid()
    picky.rpn.score_thresh = float(best.sort(descending=True).values[count - 1])
    return picky


def test_static_single_level_detector_with_few_anchors_equals_eager() -> None:
    detector = build_single_level()
    static = make_static(detector, frame_px=FRAME_PX)
    anchors = static.rpn.proposals.per_level
    assert anchors == [210]
    assert detector.rpn.pre_nms_top_n() > anchors[0]
    for seed in (1, 2):
        eager = detect(detector, texture(seed))
        assert len(eager) > FEW
        assert detect_static(static, texture(seed)) == eager


def test_static_with_more_proposals_than_anchors_has_as_many_rows_as_anchors() -> None:
    static = make_static(build_single_level(), frame_px=FRAME_PX, proposals=5000, detections=10_000)
    assert static.proposals == 210
    assert static.detections == 210 * (CLASSES - 1)
    assert len(detect_static(static, texture(1))) > FEW


def test_static_of_fewer_proposals_and_detections_keeps_the_best(
    demo: LoadedDetector, demo_frames: list[Frame]
) -> None:
    frame = as_tensor(demo_frames[0])
    whole: list[Row] = detect_static(make_static(demo.module, frame_px=(240, 320)), frame)
    static = make_static(demo.module, frame_px=(240, 320), detections=3)
    best = sorted(sorted(whole, key=lambda row: -row[4])[:3])
    assert detect_static(static, frame) == best


def test_static_leaves_the_detector_as_it_is(demo: LoadedDetector) -> None:
    before = {name: value.clone() for name, value in demo.module.state_dict().items()}
    blocks = demo.module.backbone.fpn.extra_blocks
    make_static(demo.module, frame_px=(240, 320))
    assert demo.module.backbone.fpn.extra_blocks is blocks
    assert all(torch.equal(value, before[name]) for name, value in demo.module.state_dict().items())


def test_static_of_a_detector_that_fails_raises_what_and_where(demo: LoadedDetector) -> None:
    broken = copy.deepcopy(demo.module)
    broken.roi_heads.box_head = nn.Flatten()
    with pytest.raises(CheckpointError, match=r"fails on a 240x320 frame.*--frame"):
        make_static(broken, frame_px=(240, 320))


def test_best_scores_ranks_equal_scores_by_place() -> None:
    scores = torch.tensor([0.5, 1.0, 0.5, 1.0, -1.0, 0.5]).repeat(200)
    ranked, index = operators.best_scores(scores, 700)
    expected = sorted(range(len(scores)), key=lambda place: -float(scores[place]))[:700]
    assert index.tolist() == expected
    assert torch.equal(ranked, scores[index])


def test_batched_nms_mask_ignores_invalid_boxes_and_other_groups() -> None:
    box = [10.0, 10.0, 50.0, 50.0]
    near = [11.0, 10.0, 50.0, 50.0]
    boxes = torch.tensor([[box, near, near], [box, near, [0.0, 0.0, 5.0, 5.0]]])
    scores = torch.tensor([[0.9, 0.8, 0.7], [0.5, 0.6, 0.1]])
    valid = torch.tensor([[False, True, True], [True, True, True]])
    kept = operators.batched_nms_mask(boxes, scores, valid, 0.5)
    assert kept.tolist() == [[False, True, False], [False, True, True]]


def test_static_bccd_images_equal_eager(bccd: Bccd) -> None:
    assert_bccd_equal(bccd, 6)


@pytest.mark.slow
def test_static_bccd_whole_test_split_equals_eager(bccd: Bccd) -> None:
    assert_bccd_equal(bccd, len(bccd.images))


def assert_bccd_equal(bccd: Bccd, count: int) -> None:
    static = make_static(bccd.detector, frame_px=(480, 640))
    found = 0
    for path in bccd.images[:count]:
        frame = as_tensor(read_image(path))
        eager = detect(bccd.detector, frame)
        assert detect_static(static, frame) == eager, path.name
        found += len(eager)
    assert found > 5 * count


def freeze(module: nn.Module) -> nn.Module:
    """Return the module with FrozenBatchNorm2d in place of BatchNorm2d."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, eps=child.eps)
            frozen.load_state_dict(child.state_dict())
            setattr(module, name, frozen)
        else:
            freeze(child)
    return module


@pytest.mark.parametrize("frozen", [False, True], ids=["BatchNorm", "FrozenBatchNorm"])
def test_fold_changes_features_by_float_rounding_alone(
    demo: LoadedDetector, demo_frames: list[Frame], frozen: bool
) -> None:
    detector = copy.deepcopy(demo.module)
    static = make_static(freeze(detector) if frozen else detector, frame_px=(240, 320))
    folded = fold_batch_norm(static)
    norms = (nn.BatchNorm2d, FrozenBatchNorm2d)
    assert any(isinstance(module, norms) for module in static.modules())
    assert not any(isinstance(module, norms) for module in folded.modules())
    image = static.preprocess(as_tensor(demo_frames[0]))
    with torch.no_grad():
        for reference, actual in zip(
            static.backbone(image).values(), folded.backbone(image).values(), strict=True
        ):
            noise = (reference - actual).double().square().sum()
            assert 10 * torch.log10(reference.double().square().sum() / noise) > 100


def test_fold_keeps_a_batch_norm_without_a_convolution_before_it() -> None:
    detector = build_single_level()
    detector.backbone.insert(3, nn.BatchNorm2d(16))
    detector.backbone.get_submodule("3").running_var.fill_(4.0)
    static = make_static(detector.eval(), frame_px=FRAME_PX)
    folded = fold_batch_norm(static)
    assert isinstance(folded.get_submodule("backbone.1"), nn.Identity)
    assert isinstance(folded.get_submodule("backbone.3"), nn.BatchNorm2d)
    image = static.preprocess(texture(1))
    with torch.no_grad():
        torch.testing.assert_close(folded.backbone(image), static.backbone(image))


@pytest.mark.parametrize("frame_px", FRAMES_PX.values(), ids=FRAMES_PX.keys())
def test_normalised_image_in_numpy_of_noise_equals_torchvisions_transform(
    demo: LoadedDetector, frame_px: tuple[int, int]
) -> None:
    static = make_static(demo.module, frame_px=frame_px, preprocess="outside")
    random = torch.Generator().manual_seed(1)
    frame = torch.randint(0, 256, (*frame_px, 3), dtype=torch.uint8, generator=random)
    images, _ = demo.module.transform([frame.permute(2, 0, 1).to(torch.float32) / 255])
    made = normalised_image(frame.numpy(), static.spec)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, images.tensors.numpy(), atol=1e-5, rtol=0)
    assert tuple(made.shape) == tuple(static.example_input().shape)


def test_static_with_preprocessing_outside_equals_eager_and_has_the_same_encodings(
    demo: LoadedDetector, demo_encodings: Encodings, calibration_frames: list[Frame], demo_frames: list[Frame]
) -> None:
    static = make_static(demo.module, frame_px=(240, 320), preprocess="outside")
    for frame in demo_frames:
        image = torch.from_numpy(normalised_image(frame, static.spec))
        assert detect_static(static, image) == detect(demo.module, as_tensor(frame))
    outside = calibrate(static, [normalised_image(frame, static.spec) for frame in calibration_frames])
    assert outside.rows == demo_encodings.rows
    assert outside.detector_sha256 == demo_encodings.detector_sha256
