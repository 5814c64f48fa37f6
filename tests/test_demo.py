from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import msgspec
import numpy as np
import pytest
from PIL import Image

from qexport.detections import Detections
from qexport.detectors.demo import demo_weights
from qexport.detectors.demo.scenes import HEIGHT, PARTS, WIDTH, draw_scene, write_scenes
from qexport.errors import RunFolderError

HELD_OUT_MAP_LEAST = 0.85
NEEDS_TORCH = "the demo detector needs torch: pip install 'qexport[torch]'"


@pytest.fixture(scope="module")
def train_demo() -> ModuleType:
    pytest.importorskip("torch", reason=NEEDS_TORCH)
    path = Path(__file__).parents[1] / "tools" / "train_demo.py"
    spec = importlib.util.spec_from_file_location("train_demo", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # slotted dataclasses look their module up while it is executed
    spec.loader.exec_module(module)
    return module


def read_folder(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_scenes_with_the_same_seed_are_the_same_bytes(tmp_path: Path) -> None:
    first = read_folder(write_scenes(tmp_path / "a", train=2, val=1, test=2, seed=3))
    second = read_folder(write_scenes(tmp_path / "b", train=2, val=1, test=2, seed=3))
    assert len(first) == 5 + 3
    assert first == second


def test_scenes_of_another_seed_or_split_or_index_are_other_pixels() -> None:
    seeds = [(0, 2, 0), (1, 2, 0), (0, 1, 0), (0, 2, 1)]
    assert len({draw_scene(*seed).pixels.tobytes() for seed in seeds}) == len(seeds)


def test_scenes_boxes_are_inside_the_image_and_labels_are_parts() -> None:
    scenes = [draw_scene(11, index) for index in range(30)]
    for scene in scenes:
        assert scene.pixels.shape == (HEIGHT, WIDTH, 3)
        assert scene.pixels.dtype == np.uint8
        assert len(scene.boxes) == len(scene.labels) >= 1
        left, top, right, bottom = scene.boxes.T
        assert left.min() >= 0
        assert top.min() >= 0
        assert right.max() <= WIDTH
        assert bottom.max() <= HEIGHT
        assert (right - left).min() >= 4
        assert (bottom - top).min() >= 4
    assert set(np.concatenate([scene.labels for scene in scenes]).tolist()) == set(range(1, len(PARTS) + 1))


def test_written_annotations_name_the_images_and_hold_the_boxes_drawn(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path, train=1, val=1, test=3, seed=5)
    coco = msgspec.json.decode((folder / "test.coco.json").read_bytes())
    assert [entry["name"] for entry in coco["categories"]] == list(PARTS)
    for index, image in enumerate(coco["images"]):
        scene = draw_scene(5, 2, index)
        with Image.open(folder / "images" / image["file_name"]) as picture:
            np.testing.assert_array_equal(np.asarray(picture), scene.pixels)
        assert (image["width"], image["height"]) == (WIDTH, HEIGHT)
        own = [entry for entry in coco["annotations"] if entry["image_id"] == image["id"]]
        boxes = np.array([entry["bbox"] for entry in own])
        np.testing.assert_array_equal(boxes[:, :2], scene.boxes[:, :2])
        np.testing.assert_array_equal(boxes[:, :2] + boxes[:, 2:], scene.boxes[:, 2:])
        assert [entry["category_id"] for entry in own] == scene.labels.tolist()


def test_write_scenes_again_writes_nothing_and_restores_a_lost_image(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path, train=1, val=1, test=1)
    lost = folder / "images" / "val_0000.png"
    pixels = lost.read_bytes()
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path != lost}
    lost.unlink()
    seen: list[tuple[int, int]] = []
    write_scenes(tmp_path, train=1, val=1, test=1, progress=lambda done, total: seen.append((done, total)))
    assert lost.read_bytes() == pixels
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_write_scenes_over_another_seed_raises_and_leaves_it_alone(tmp_path: Path) -> None:
    before = read_folder(write_scenes(tmp_path, train=1, val=1, test=1, seed=0))
    with pytest.raises(RunFolderError, match=r"seed 1.*seed 0"):
        write_scenes(tmp_path, train=1, val=1, test=1, seed=1)
    assert read_folder(tmp_path) == before


def test_demo_classes_are_the_background_and_the_parts_drawn(train_demo: ModuleType) -> None:
    assert list(train_demo.CLASSES) == ["__background__", *PARTS]


def test_demo_weights_are_small_finite_and_half_precision() -> None:
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    assert demo_weights().stat().st_size <= 8_000_000
    state = torch.load(demo_weights(), weights_only=True)
    floating = [value for value in state.values() if value.is_floating_point()]
    assert {value.dtype for value in floating} == {torch.float16}
    assert all(bool(value.isfinite().all()) for value in floating)


def test_demo_half_weights_saved_again_detect_the_same(train_demo: ModuleType, tmp_path: Path) -> None:
    scenes = [draw_scene(12, index) for index in range(2)]
    detector = train_demo.load_half(demo_weights())
    train_demo.save_half(detector, tmp_path / "again.pt")
    first = train_demo.detect(detector, scenes)
    second = train_demo.detect(train_demo.load_half(tmp_path / "again.pt"), scenes)
    for one, other in zip(first, second, strict=True):
        assert len(one) > 0
        np.testing.assert_array_equal(one.boxes, other.boxes)
        np.testing.assert_array_equal(one.scores, other.scores)
        np.testing.assert_array_equal(one.labels, other.labels)


def test_average_precision_of_the_truth_is_one_and_of_wrong_labels_is_zero(train_demo: ModuleType) -> None:
    scenes = [draw_scene(13, index) for index in range(8)]
    exact = [
        Detections(boxes=scene.boxes, scores=np.ones(len(scene.labels), np.float32), labels=scene.labels)
        for scene in scenes
    ]
    off = [
        Detections(boxes=one.boxes, scores=one.scores, labels=one.labels % len(PARTS) + 1) for one in exact
    ]
    assert train_demo.voc_average_precisions(scenes, exact) == pytest.approx({1: 1.0, 2: 1.0, 3: 1.0})
    assert max(train_demo.voc_average_precisions(scenes, off).values()) < 0.2


def test_demo_detector_on_held_out_scenes_reaches_its_map(train_demo: ModuleType) -> None:
    scenes = [
        draw_scene(train_demo.HELD_OUT_SEED, train_demo.HELD_OUT_SPLIT, index)
        for index in range(train_demo.HELD_OUT_COUNT)
    ]
    found = train_demo.detect(train_demo.load_half(demo_weights()), scenes)
    per_class = train_demo.voc_average_precisions(scenes, found)
    assert float(np.mean(list(per_class.values()))) >= HELD_OUT_MAP_LEAST, per_class
