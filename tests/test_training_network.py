"""The form in which a detector is trained: the keys, scales and integers of the export."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops.misc import FrozenBatchNorm2d
from torchvision_detectors import build_single_level

from qexport.calibration.calibrator import calibrate
from qexport.detectors.fingerprint import fingerprint
from qexport.detectors.load import LoadedDetector
from qexport.detectors.static import StaticDetector, make_static
from qexport.encodings import Encodings
from qexport.errors import CheckpointError, ExportError
from qexport.quantization.fold import fold_batch_norm, folded_pairs
from qexport.quantization.observers import round_up
from qexport.quantization.reference import QuantizedDetector, quantize
from qexport.training.agreement import Agreement, compare_codes
from qexport.training.network import TrainingNetwork
from qexport.training.state import neutral_variance, trained_state, with_state

Frame = np.ndarray


@pytest.fixture
def network(demo_static: StaticDetector, demo_encodings: Encodings) -> TrainingNetwork:
    return TrainingNetwork(fold_batch_norm(demo_static), demo_encodings)


def shake(network: TrainingNetwork, image: torch.Tensor) -> None:
    """Change weights, biases and scales a little, as training does."""
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, weight in network.named_weights():
            weight.add_(0.02 * weight.std() * torch.randn(weight.shape, generator=random))
        network.observe(True)
        network(image)
        network.follow(0.3)
        network.observe(False)


def export(
    network: TrainingNetwork, detector: GeneralizedRCNN, static: StaticDetector, encodings: Encodings
) -> tuple[StaticDetector, QuantizedDetector]:
    """Return the static detector and the reference that a network comes to."""
    state = trained_state(detector, folded_pairs(static), dict(network.named_weights()))
    spec = static.spec
    trained = make_static(with_state(detector, state), frame_px=(spec.frame_height_px, spec.frame_width_px))
    return trained, quantize(trained, network.encodings(encodings, fingerprint(trained)))


def test_network_before_training_has_every_row_with_its_scale(
    network: TrainingNetwork, demo_encodings: Encodings
) -> None:
    found = network.encodings(demo_encodings, demo_encodings.detector_sha256)
    assert {row.key for row in demo_encodings.rows} == network.activations.keys() | network.weights.keys()
    assert [row.params for row in found.rows] == [row.params for row in demo_encodings.rows]


def test_network_after_training_gives_the_codes_of_the_reference(
    network: TrainingNetwork,
    demo: LoadedDetector,
    demo_static: StaticDetector,
    demo_encodings: Encodings,
    demo_frames: list[Frame],
) -> None:
    shake(network, torch.randn(2, 3, 256, 320, generator=torch.Generator().manual_seed(1)))
    trained, quantized = export(network, demo.module, demo_static, demo_encodings)
    for frame in demo_frames:
        agreement = compare_codes(network, quantized, frame)
        assert agreement.tensors == len(quantized.quantize_nodes)
        assert agreement.values > 3_000_000
        assert agreement.differing == 0, agreement.first
    folded = fold_batch_norm(trained).state_dict()
    for name, weight in network.named_weights():
        assert torch.equal(folded[name], weight.detach()), name


def test_network_with_one_scale_for_a_weight_keeps_one_and_gives_the_codes_of_the_reference(
    demo: LoadedDetector, demo_static: StaticDetector, demo_frames: list[Frame]
) -> None:
    encodings = calibrate(demo_static, demo_frames[:1], weight_scales="per-tensor")
    network = TrainingNetwork(fold_batch_norm(demo_static), encodings)
    shake(network, torch.randn(2, 3, 256, 320, generator=torch.Generator().manual_seed(1)))
    after = network.encodings(encodings, encodings.detector_sha256)
    of_weights = [row.params.scale for row in after.rows if row.port == "weight"]
    assert all(len(set(scale)) == 1 for scale in of_weights)
    assert of_weights != [row.params.scale for row in encodings.rows if row.port == "weight"]
    _, quantized = export(network, demo.module, demo_static, encodings)
    assert compare_codes(network, quantized, demo_frames[0]).differing == 0


def test_agreement_of_another_reference_finds_the_first_tensor(
    network: TrainingNetwork, demo_quantized: QuantizedDetector, demo_frames: list[Frame]
) -> None:
    network.activations["backbone.body.layer2.0.conv1@0/output:conv2d"].current.mul_(1.01)
    agreement = compare_codes(network, demo_quantized, demo_frames[0])
    assert agreement.differing > 0
    assert agreement.first == "backbone.body.layer2.0.conv1@0/output:conv2d"
    with pytest.raises(ExportError, match=r"layer2\.0\.conv1@0/output:conv2d; expected 0"):
        agreement.require()
    Agreement(1, 1, 0).require()


def test_network_with_float_layers_gives_the_codes_of_the_reference(
    demo: LoadedDetector,
    demo_static: StaticDetector,
    kept_float: tuple[Encodings, QuantizedDetector],
    demo_frames: list[Frame],
) -> None:
    encodings, _ = kept_float
    network = TrainingNetwork(fold_batch_norm(demo_static), encodings)
    _, quantized = export(network, demo.module, demo_static, encodings)
    assert compare_codes(network, quantized, demo_frames[0]).differing == 0


@pytest.mark.parametrize(
    "kept", ["roi_heads", "roi_heads.box_roi_pool", "roi_heads.box_head", "rpn", "backbone"]
)
def test_network_with_a_float_stage_gives_the_codes_of_the_reference(
    kept: str, small_static: StaticDetector, small_frames: list[Frame]
) -> None:
    encodings = calibrate(small_static, small_frames[:1], keep_float=(kept,))
    network = TrainingNetwork(fold_batch_norm(small_static), encodings)
    _, quantized = export(network, build_single_level(), small_static, encodings)
    agreement = compare_codes(network, quantized, small_frames[0])
    assert agreement.tensors == len(quantized.quantize_nodes) > 2
    assert agreement.differing == 0


def test_network_without_a_pyramid_gives_the_codes_of_the_reference(
    small_static: StaticDetector, small_encodings: Encodings, small_frames: list[Frame]
) -> None:
    network = TrainingNetwork(fold_batch_norm(small_static), small_encodings)
    shake(network, torch.randn(3, 3, 160, 224, generator=torch.Generator().manual_seed(1)))
    _, quantized = export(network, build_single_level(), small_static, small_encodings)
    assert compare_codes(network, quantized, small_frames[0]).differing == 0


def test_scales_followed_have_few_bits_and_go_a_part_of_the_way(network: TrainingNetwork) -> None:
    key = "preprocess@0/output:image"
    before = network.activations[key].largest
    network.observe(True)
    with torch.no_grad():
        network(torch.full((1, 3, 256, 320), 10.0))
    network.follow(0.25)
    quantizer = network.activations[key]
    assert quantizer.largest == pytest.approx(before + 0.25 * (10.0 - before))
    assert float(quantizer.scale()) == np.float32(round_up(quantizer.largest / 127))
    assert quantizer.seen is None


def test_scales_frozen_stay_when_weights_change(network: TrainingNetwork) -> None:
    key = "rpn.head.cls_logits@0/weight"
    before = network.weights[key][0].scale().clone()
    with torch.no_grad():
        dict(network.named_weights())["rpn.head.cls_logits.weight"].mul_(2.0)
    assert torch.equal(network.weights[key][0].scale(), before)
    network.observe(True)
    assert torch.equal(network.weights[key][0].scale(), before * 2.0)


def test_snapshot_restored_is_the_network_as_it_was(
    network: TrainingNetwork, demo_encodings: Encodings
) -> None:
    image = torch.randn(1, 3, 256, 320, generator=torch.Generator().manual_seed(1))
    kept = network.snapshot()
    before = network.encodings(demo_encodings, "")
    with torch.no_grad():
        expected = network(image)[1][0]
        shake(network, image)
        assert not torch.equal(network(image)[1][0], expected)
        network.restore(kept)
        assert torch.equal(network(image)[1][0], expected)
    assert network.encodings(demo_encodings, "") == before


def test_gradients_reach_every_weight_and_bias(network: TrainingNetwork) -> None:
    for _, weight in network.named_weights():
        weight.requires_grad_(True)
    random = torch.Generator().manual_seed(1)
    features, objectness, deltas = network(torch.randn(1, 3, 256, 320, generator=random))
    logits, boxes = network.head(torch.rand(4, features[0].shape[1], 7, 7, generator=random))
    sum((level**2).sum() for level in (*objectness, *deltas, logits, boxes)).backward()
    without = [
        name for name, weight in network.named_weights() if weight.grad is None or not weight.grad.any()
    ]
    assert without == []


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-5, 1e-3, 0.1])
def test_neutral_variance_divides_by_exactly_one(eps: float) -> None:
    variance = neutral_variance(nn.BatchNorm2d(1, eps=eps), "norm")
    assert float(torch.rsqrt(torch.tensor(variance) + eps)) == 1.0


def test_neutral_variance_of_an_eps_above_one_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"backbone\.bn1: a BatchNorm with eps nan"):
        neutral_variance(nn.BatchNorm2d(1, eps=float("nan")), "backbone.bn1")


@pytest.mark.parametrize("kind", ["frozen", "without weight", "bias of its own"])
def test_state_of_another_norm_folds_to_the_trained_weights(kind: str, small_static: StaticDetector) -> None:
    detector = build_single_level()
    first, norm = detector.backbone[0], detector.backbone[1]
    if kind == "frozen":
        frozen = FrozenBatchNorm2d(16)
        frozen.load_state_dict({key: norm.state_dict()[key] for key in frozen.state_dict()})
        detector.backbone[1] = frozen
    elif kind == "without weight":
        detector.backbone[1] = nn.BatchNorm2d(16, affine=False).eval()
    else:
        first.bias = nn.Parameter(torch.linspace(-1, 1, 16))
    frame_px = (small_static.spec.frame_height_px, small_static.spec.frame_width_px)
    static = make_static(detector, frame_px=frame_px)
    before = fold_batch_norm(static).state_dict()
    weights = {name: tensor * 1.5 for name, tensor in before.items() if name.endswith(("weight", "bias"))}
    state = trained_state(detector, folded_pairs(static), weights)
    assert state.keys() == detector.state_dict().keys()
    copy.deepcopy(detector).load_state_dict(state, strict=True)
    after = fold_batch_norm(make_static(with_state(detector, state), frame_px=frame_px)).state_dict()
    assert weights.keys() <= after.keys()
    assert [name for name in weights if not torch.equal(after[name], weights[name])] == []
