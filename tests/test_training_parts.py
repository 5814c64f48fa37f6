"""Images, losses, learning rate: the parts of a training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models.detection.image_list import ImageList

from qexport.dataset import load_dataset
from qexport.detectors.demo.scenes import HEIGHT, WIDTH, write_scenes
from qexport.detectors.load import LoadedDetector
from qexport.detectors.static import StaticDetector, make_static
from qexport.quantization.fold import fold_batch_norm
from qexport.samples import Box, Sample
from qexport.training.distillation import box_distance, feature_distance, proposal_distance
from qexport.training.images import Batch, batches, load, order_of_epoch
from qexport.training.losses import Losses, total
from qexport.training.network import Head, Trunk, TrunkOutput
from qexport.training.schedule import learning_rate
from qexport.training.settings import TrainingSettings
from qexport.training_history import Measured


class FloatNetwork(nn.Module):
    """What is trained, without quantizers."""

    def __init__(self, static: StaticDetector) -> None:
        super().__init__()
        self.trunk, self.head = Trunk(static), Head(static)

    def forward(self, images: torch.Tensor) -> TrunkOutput:
        found: TrunkOutput = self.trunk(images)
        return found


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sample, ...]:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, train=3, val=1, test=1)
    return load_dataset(folder, "train").samples


@pytest.fixture(scope="module")
def folded(demo_static: StaticDetector) -> StaticDetector:
    return fold_batch_norm(demo_static)


@pytest.fixture(scope="module")
def batch(scenes: tuple[Sample, ...], folded: StaticDetector) -> Batch:
    return next(batches(scenes, folded.spec, size=2))


@pytest.fixture
def narrow_image(tmp_path: Path) -> Sample:
    """Half as wide as the frame, with a box, a difficult one and a crowd."""
    pixels = np.zeros((HEIGHT // 2, WIDTH // 4, 3), np.uint8)
    pixels[10:20, 5:15] = 255
    Image.fromarray(pixels).save(tmp_path / "image.png")
    boxes = (
        Box(2, (5.0, 10.0, 15.0, 20.0)),
        Box(1, (0.0, 0.0, 9.0, 9.0), difficult=True),
        Box(1, (0.0, 0.0, 9.0, 9.0), crowd=True),
    )
    return Sample(tmp_path / "image.png", 1, WIDTH // 4, HEIGHT // 2, boxes)


@pytest.mark.parametrize("flip", [False, True])
def test_image_loaded_has_its_box_where_the_pixels_are(
    narrow_image: Sample, demo_static: StaticDetector, flip: bool
) -> None:
    image, target = load(narrow_image, demo_static.spec, flip=flip)
    assert target["labels"].tolist() == [2]
    left, top, right, bottom = target["boxes"][0].tolist()
    assert (left, top, right, bottom) == ((130.0, 20.0, 150.0, 40.0) if flip else (10.0, 20.0, 30.0, 40.0))
    bright = image[0, :, :HEIGHT].amax(0) > 1.5  # of white, normalised; padding is 0
    rows, columns = torch.nonzero(bright, as_tuple=True)
    assert abs(int(columns.min()) - left) <= 1
    assert abs(int(columns.max()) + 1 - right) <= 1
    assert abs(int(rows.min()) - top) <= 1


def test_image_loaded_is_scaled_with_its_boxes(narrow_image: Sample, demo: LoadedDetector) -> None:
    small = make_static(demo.module, frame_px=(HEIGHT // 2, WIDTH // 2))
    _, target = load(narrow_image, small.spec)
    scale = small.spec.resized_height_px / (HEIGHT // 2)
    assert target["boxes"][0].tolist() == pytest.approx([5 * scale, 10 * scale, 15 * scale, 20 * scale])


def test_order_of_an_epoch_is_decided_by_seed_and_number(scenes: tuple[Sample, ...]) -> None:
    many = scenes * 20
    first = order_of_epoch(many, 1, images=None, seed=0)
    assert first == order_of_epoch(many, 1, images=None, seed=0)
    assert first != order_of_epoch(many, 2, images=None, seed=0)
    assert first != order_of_epoch(many, 1, images=None, seed=1)
    assert len(order_of_epoch(many, 1, images=7, seed=0)) == 7


def test_losses_of_the_float_network_are_torchvisions_own(
    demo: LoadedDetector, folded: StaticDetector, batch: Batch
) -> None:
    detector = copy.deepcopy(demo.module).train()
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    detector.transform = _Given(batch)
    torch.manual_seed(5)
    expected = detector([torch.zeros(3, 8, 8)] * 2, batch.targets)
    torch.manual_seed(5)
    losses = Losses(demo.module, folded, TrainingSettings(), torch.device("cpu"))
    found = losses(FloatNetwork(folded), batch)  # type: ignore[arg-type]
    names = {
        "objectness": "loss_objectness",
        "rpn box": "loss_rpn_box_reg",
        "class": "loss_classifier",
        "box": "loss_box_reg",
    }
    assert found.keys() == names.keys()
    for name, theirs in names.items():
        assert float(found[name]) == pytest.approx(float(expected[theirs]), rel=1e-3)


class _Given(nn.Module):
    """A transform that gives what it was made with."""

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        self._batch = batch

    def forward(self, images: object, targets: object) -> tuple[object, object]:
        return ImageList(self._batch.images, [(HEIGHT, WIDTH)] * 2), targets

    def postprocess(self, found: object, *_: object) -> object:
        return found


@pytest.mark.parametrize("only", [False, True])
def test_distances_of_the_teacher_itself_are_zero(
    demo: LoadedDetector, folded: StaticDetector, batch: Batch, only: bool
) -> None:
    settings = TrainingSettings(distill_features=1.0, distill_outputs=2.0, distill_only=only)
    losses = Losses(demo.module, folded, settings, torch.device("cpu"))
    found = losses(FloatNetwork(folded), batch)  # type: ignore[arg-type]
    distances = {name: float(part) for name, part in found.items() if name.endswith("from float")}
    assert len(distances) == 3
    assert all(abs(value) < 1e-4 for value in distances.values()), distances
    assert (len(found) == 3) == only
    assert float(total(found)) == pytest.approx(sum(float(part) for part in found.values()))


def test_distances_grow_with_the_difference() -> None:
    random = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 6, 4, 5, generator=random)]
    objects, deltas = (
        [torch.randn(2, 3, 4, 5, generator=random)],
        [torch.randn(2, 12, 4, 5, generator=random)],
    )
    boxes = (torch.randn(7, 4, generator=random), torch.randn(7, 16, generator=random))
    for_shift = [
        (
            float(feature_distance(student=[maps[0] + shift], teacher=maps)),
            float(
                proposal_distance(
                    student=(maps, [objects[0] + shift], [deltas[0] + shift]), teacher=(maps, objects, deltas)
                )
            ),
            float(box_distance(student=(boxes[0] * (1 + shift), boxes[1] + shift), teacher=boxes)),
        )
        for shift in (0.0, 0.1, 0.4)
    ]
    for of_none, of_some, of_more in zip(*for_shift, strict=True):
        assert abs(of_none) < 1e-5
        assert of_none < of_some < of_more


def _rates() -> Iterator[float]:
    return (learning_rate(step, steps=100, peak=2.0, warm_up=0.1) for step in range(100))


def test_learning_rate_rises_then_falls_to_a_hundredth() -> None:
    rates = list(_rates())
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(0.02)
    assert min(rates) > 0


def test_learning_rate_of_a_single_step_is_above_zero() -> None:
    assert learning_rate(0, steps=1, peak=1.0, warm_up=0.0) > 0
    assert learning_rate(0, steps=1, peak=1.0, warm_up=1.0) > 0


@pytest.mark.parametrize(
    ("now", "fallen"),
    [
        (Measured(coco_map=0.5, voc_map50=0.8), False),
        (Measured(coco_map=0.41, voc_map50=0.8), False),
        (Measured(coco_map=0.39, voc_map50=0.8), True),
    ],
)
def test_map_fallen_by_more_than_the_margin_is_divergence(now: Measured, fallen: bool) -> None:
    assert now.has_fallen(Measured(coco_map=0.5, voc_map50=0.8), 0.1) is fallen


def test_distance_doubled_or_not_finite_is_divergence() -> None:
    start = Measured(distance=0.1)
    assert not Measured(distance=0.2).has_fallen(start, 0.1)
    assert Measured(distance=0.21).has_fallen(start, 0.1)
    assert Measured(distance=float("nan")).has_fallen(start, 0.1)
    assert Measured(distance=0.05).score > start.score
