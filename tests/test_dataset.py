from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from qexport.dataset import (
    Box,
    check_classes,
    load_dataset,
    require_boxes,
    splits_of,
)
from qexport.errors import DatasetError
from qexport.samples import Dataset, clip_box

BCCD = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "bccd"
needs_bccd = pytest.mark.skipif(not BCCD.is_dir(), reason="shared/data/bccd is not beside the repository")

WIDTH, HEIGHT = 40, 30


def save_image(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT), colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def coco(*bboxes: object, **changes: object) -> dict[str, object]:
    content: dict[str, object] = {
        "images": [{"id": 7, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"id": number, "image_id": 7, "category_id": 1, "bbox": bbox, "iscrowd": 0}
            for number, bbox in enumerate(bboxes or ([1, 2, 10, 20],))
        ],
    }
    return content | changes


def write_coco(
    root: Path, content: object = None, name: str = "train.coco.json", image: str = "a.png"
) -> Path:
    save_image(root / image)
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(coco() if content is None else content))
    return path


def voc_object(name: str, xyxy: tuple[object, ...], difficult: int = 0) -> str:
    corners = "".join(
        f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), xyxy, strict=True)
    )
    return (
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{corners}</bndbox>"
        "<part><name>head</name></part></object>"
    )


def write_voc(root: Path, images: dict[str, str], splits: dict[str, str]) -> Path:
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
    for stem, objects in images.items():
        save_image(root / "JPEGImages" / f"{stem}.png")
        (root / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    for split, lines in splits.items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(lines)
    return root


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("train.coco.json", "a.png"),
        ("train.coco.json", "JPEGImages/a.png"),
        ("train.coco.json", "images/a.png"),
        ("train.coco.json", "train/a.png"),
        ("annotations/instances_train.json", "train/a.png"),
        ("annotations/instances_train.json", "images/train/a.png"),
        ("annotations/train.json", "images/a.png"),
        ("train/_annotations.coco.json", "train/a.png"),
    ],
)
def test_load_dataset_coco_layouts_are_recognised(tmp_path: Path, name: str, image: str) -> None:
    write_coco(tmp_path, name=name, image=image)
    assert splits_of(tmp_path) == ("train",)
    dataset = load_dataset(tmp_path, "train")
    assert (dataset.format, dataset.split, dataset.classes) == (
        "coco",
        "train",
        ("__background__", "cat", "dog"),
    )
    (sample,) = dataset.samples
    assert sample.path == tmp_path / image
    assert (sample.image_id, sample.width_px, sample.height_px) == (7, WIDTH, HEIGHT)
    assert sample.boxes == (Box(1, (1.0, 2.0, 11.0, 22.0)),)


def test_load_dataset_single_json_needs_no_split(tmp_path: Path) -> None:
    path = write_coco(tmp_path, name="some.json")
    dataset = load_dataset(path, None)
    assert (dataset.split, dataset.name, dataset.objects) == ("some", tmp_path.name, 1)
    assert splits_of(path) == ("some",)


def test_load_dataset_relative_path_gives_absolute_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_coco(tmp_path / "pets", name="annotations/instances_train.json", image="images/a.png")
    monkeypatch.chdir(tmp_path)
    for root in (Path("pets"), path.relative_to(tmp_path)):
        dataset = load_dataset(root, "train")
        assert (dataset.name, dataset.root) == ("pets", tmp_path.resolve() / "pets")
        assert dataset.samples[0].path == dataset.root / "images" / "a.png"
        assert dataset.name_of(dataset.samples[0]) == "images/a.png"


def test_splits_of_other_coco_tasks_are_left_out(tmp_path: Path) -> None:
    write_coco(tmp_path, name="annotations/instances_val2017.json")
    write_coco(tmp_path, name="annotations/captions_val2017.json")
    assert splits_of(tmp_path) == ("val2017",)


def test_load_dataset_plain_folder_lists_images_recursively_sorted(tmp_path: Path) -> None:
    for name in ("b.png", "a/z.JPG", "a/b.png", ".hidden/c.png"):
        save_image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    dataset = load_dataset(tmp_path, "whatever")
    assert (dataset.format, dataset.classes) == ("folder", ("__background__",))
    assert [s.path.relative_to(tmp_path).as_posix() for s in dataset.samples] == [
        "a/b.png",
        "a/z.JPG",
        "b.png",
    ]
    assert [s.image_id for s in dataset.samples] == [1, 2, 3]
    assert splits_of(tmp_path) == ()
    assert load_dataset(tmp_path, None, classes=("cat",)).classes == ("__background__", "cat")


def test_load_dataset_coco_gaps_are_named(tmp_path: Path) -> None:
    categories = [{"id": 4, "name": "dog"}, {"id": 1, "name": "cat"}]
    write_coco(tmp_path, coco(categories=categories))
    expected = ("__background__", "cat", "N/A", "N/A", "dog")
    for classes in ((), ("cat", "dog"), expected):
        assert load_dataset(tmp_path, "train", classes=classes).classes == expected


def test_load_dataset_roboflow_heading_category_is_background(tmp_path: Path) -> None:
    write_coco(tmp_path, coco(categories=[{"id": 0, "name": "pets"}, {"id": 1, "name": "cat"}]))
    assert load_dataset(tmp_path, "train").classes == ("__background__", "cat")


def test_load_dataset_voc_without_class_names_sorts_those_of_all_splits(tmp_path: Path) -> None:
    images = {"one": voc_object("dog", (1, 2, 11, 22), 1), "two": voc_object("cat", (1, 2, 11, 22))}
    lists = {"train": "one\n", "val": "two\n\n", "dog_train": "one  1\n"}
    write_voc(tmp_path, images, lists)
    assert splits_of(tmp_path) == ("train", "val")
    dataset = load_dataset(tmp_path, "train")
    assert dataset.classes == ("__background__", "cat", "dog")
    assert dataset.samples[0].boxes == (Box(2, (1.0, 2.0, 11.0, 22.0), difficult=True),)
    ordered = load_dataset(tmp_path, "train", classes=("__background__", "dog", "cat"))
    assert ordered.samples[0].boxes[0].label == 1


def test_load_dataset_coco_beside_voc_is_preferred(tmp_path: Path) -> None:
    write_voc(tmp_path, {"a": voc_object("cat", (0, 0, 5, 5))}, {"train": "a", "other": "a"})
    write_coco(tmp_path, image="JPEGImages/a.png")
    assert load_dataset(tmp_path, "train").format == "coco"
    assert splits_of(tmp_path) == ("train",)


@pytest.mark.parametrize(
    ("xyxy", "expected"),
    [
        ((1, 2, 3, 4), (1, 2, 3, 4)),
        ((-5, -5, 3, 4), (0, 0, 3, 4)),
        ((1, 2, 99, 99), (1, 2, WIDTH, HEIGHT)),
        ((1, 2, 1, 4), "zero size"),
        ((3, 2, 1, 4), "inverted"),
        ((WIDTH, 2, WIDTH + 5, 4), "outside the image"),
        ((-9, 2, -3, 4), "outside the image"),
        ((float("nan"), 2, 3, 4), "not finite"),
        ((1, 2, float("inf"), 4), "not finite"),
    ],
)
def test_clip_box_keeps_the_part_inside_or_says_why_not(
    xyxy: tuple[float, float, float, float], expected: object
) -> None:
    assert clip_box(xyxy, (HEIGHT, WIDTH)) == expected


def test_load_dataset_unusable_boxes_are_dropped_with_reasons(tmp_path: Path) -> None:
    # json.dumps writes NaN, as many tools do.
    bboxes = [[1, 1, 5, 5], [1, 1, 0, 5], [1, 1, -3, 5], [90, 1, 5, 5], [float("nan"), 1, 5, 5], []]
    write_coco(tmp_path, coco(*bboxes))
    dataset = load_dataset(tmp_path, "train")
    assert dataset.objects == 1
    assert [(item.image, item.reason) for item in dataset.dropped] == [
        ("a.png", "bbox has 0 numbers, expected 4"),
        ("a.png", "zero size"),
        ("a.png", "inverted"),
        ("a.png", "outside the image"),
        ("a.png", "not finite"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (coco(images=[]), "lists no images"),
        (coco(images=[{"id": 7, "file_name": "gone.png"}]), "'gone.png' is listed and absent.*images"),
        (
            coco(images=[{"id": 7, "file_name": "a.png"}, {"id": 7, "file_name": "b.png"}]),
            r"image id\(s\).*7",
        ),
        (coco(images=[{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "a.png"}]), "file_name.*a.png"),
        (coco(images=[{"id": 7, "file_name": "a.png", "width": 99, "height": 9}]), "40x30.*99x9"),
        (coco(categories=[]), "no categories|category_id"),
        (coco(categories=[{"id": 3, "name": "cat"}]), r"category_id 1; expected one of \[3\]"),
        (coco(categories=[{"id": -1, "name": "x"}, {"id": 1, "name": "cat"}]), "'x' has id -1.*1 and above"),
        (coco(categories=[{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]), "category name 'a'"),
        (coco(categories=[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]), "category id 1"),
        (coco(annotations=[{"image_id": 9, "category_id": 1, "bbox": [1, 1, 2, 2]}]), "image_id 9"),
        ({"images": []}, "not a COCO detection file.*annotations"),
        (coco(annotations=[{"image_id": 7, "category_id": "cat", "bbox": [1, 1, 2, 2]}]), "category_id"),
    ],
)
def test_load_dataset_bad_coco_raises_error(tmp_path: Path, content: object, message: str) -> None:
    path = write_coco(tmp_path, content)
    with pytest.raises(DatasetError, match=f"(?s){message}") as caught:
        load_dataset(tmp_path, "train")
    assert path.name in str(caught.value) or "a.png" in str(caught.value)


def test_load_dataset_used_category_zero_raises_error(tmp_path: Path) -> None:
    used = [{"image_id": 7, "category_id": 0, "bbox": [1, 1, 2, 2]}]
    write_coco(tmp_path, coco(categories=[{"id": 0, "name": "cat"}], annotations=used))
    with pytest.raises(DatasetError, match=r"'cat' has id 0.*Renumber"):
        load_dataset(tmp_path, "train")


@pytest.mark.parametrize("text", ["{", "", '{"images": [', "\x00"])
def test_load_dataset_malformed_json_raises_error(tmp_path: Path, text: str) -> None:
    path = write_coco(tmp_path)
    path.write_text(text)
    with pytest.raises(DatasetError, match=r"train\.coco\.json: not valid JSON"):
        load_dataset(tmp_path, "train")


@pytest.mark.parametrize("classes", [("cat",), ("cat", "cow"), ("dog", "cat")])
def test_load_dataset_coco_other_class_names_raise_error(tmp_path: Path, classes: tuple[str, ...]) -> None:
    write_coco(tmp_path)
    with pytest.raises(DatasetError, match="cat, dog; the class names given are"):
        load_dataset(tmp_path, "train", classes=classes)


def test_load_dataset_double_class_name_raises_error(tmp_path: Path) -> None:
    write_coco(tmp_path)
    with pytest.raises(DatasetError, match="'cat' is given more than once"):
        load_dataset(tmp_path, "train", classes=("cat", "cat"))


@pytest.mark.parametrize(
    ("lines", "objects", "message"),
    [
        ("", "", "lists no images"),
        ("a\na\n", "", "'a' is listed more than once"),
        ("b\n", "", r"b\.xml: no such annotation"),
        ("a\n", "<object></object>", "no <name>"),
        ("a\n", "<object><name>cat</name></object>", "no whole <bndbox>"),
        ("a\n", "<object>", "not valid XML"),
        ("a\n", voc_object("cow", (1, 1, 2, 2)), "'cow' is not among.*cat, dog"),
    ],
)
def test_load_dataset_bad_voc_raises_error(tmp_path: Path, lines: str, objects: str, message: str) -> None:
    write_voc(tmp_path, {"a": objects}, {"train": lines})
    with pytest.raises(DatasetError, match=message):
        load_dataset(tmp_path, "train", classes=("cat", "dog"))


def test_load_dataset_voc_image_absent_raises_error(tmp_path: Path) -> None:
    write_voc(tmp_path, {"a": voc_object("cat", (1, 1, 2, 2))}, {"train": "a"})
    (tmp_path / "JPEGImages" / "a.png").unlink()
    with pytest.raises(DatasetError, match="'a' is listed and absent"):
        load_dataset(tmp_path, "train")


def test_load_dataset_voc_without_any_object_raises_error(tmp_path: Path) -> None:
    write_voc(tmp_path, {"a": ""}, {"train": "a"})
    with pytest.raises(DatasetError, match="no class names"):
        load_dataset(tmp_path, "train")


def test_load_dataset_voc_corner_that_is_no_number_is_dropped(tmp_path: Path) -> None:
    objects = voc_object("cat", ("x", 1, 2, 2)) + voc_object("cat", ("nan", 1, 2, 2))
    write_voc(tmp_path, {"a": objects}, {"train": "a"})
    dataset = load_dataset(tmp_path, "train")
    assert [item.reason for item in dataset.dropped] == ["not numbers: x, 1, 2, 2", "not finite"]


def test_load_dataset_unknown_split_lists_those_there(tmp_path: Path) -> None:
    write_coco(tmp_path)
    write_coco(tmp_path, name="val.coco.json")
    with pytest.raises(DatasetError, match="no split 'test'; the splits there are: train, val"):
        load_dataset(tmp_path, "test")
    with pytest.raises(DatasetError, match=r"2 splits and none was named.*train, val"):
        load_dataset(tmp_path, None)


def test_load_dataset_nothing_there_raises_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no images and no annotations"):
        load_dataset(tmp_path, "train")
    with pytest.raises(DatasetError, match="no such folder"):
        load_dataset(tmp_path / "gone", "train")
    (tmp_path / "list.txt").write_text("")
    with pytest.raises(DatasetError, match=r"not \.json"):
        load_dataset(tmp_path / "list.txt", "train")


def test_load_dataset_image_that_is_none_raises_error(tmp_path: Path) -> None:
    write_coco(tmp_path)
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(DatasetError, match=r"a\.png: not a readable image"):
        load_dataset(tmp_path, "train")


def test_dataset_sha256_moved_folder_is_equal(tmp_path: Path) -> None:
    write_coco(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    first = load_dataset(tmp_path / "one", "train").sha256
    assert load_dataset(tmp_path / "two", "train").sha256 == first
    write_coco(tmp_path / "two", coco([1, 2, 10, 21]))
    moved_box = load_dataset(tmp_path / "two", "train").sha256
    write_coco(tmp_path / "two")
    save_image(tmp_path / "two" / "a.png", colour="blue")
    other_pixels = load_dataset(tmp_path / "two", "train").sha256
    assert len({first, moved_box, other_pixels}) == 3


def test_check_classes_other_count_names_both_lists(tmp_path: Path) -> None:
    write_coco(tmp_path)
    dataset = load_dataset(tmp_path, "train")
    check_classes(dataset, 3, "model.py:build")
    with pytest.raises(DatasetError, match=r"1 cat, 2 dog.*model\.py:build has labels 0 to 90"):
        check_classes(dataset, 91, "model.py:build")


def test_require_boxes_folder_and_empty_annotations_raise_error(tmp_path: Path) -> None:
    write_coco(tmp_path / "coco", coco(annotations=[]))
    save_image(tmp_path / "folder" / "a.png")
    folder = load_dataset(tmp_path / "folder", None)
    check_classes(folder, 91, "any")
    with pytest.raises(DatasetError, match="plain folder"):
        require_boxes(folder)
    with pytest.raises(DatasetError, match="no usable box in its 1 images"):
        require_boxes(load_dataset(tmp_path / "coco", "train"))
    write_coco(tmp_path / "coco")
    require_boxes(load_dataset(tmp_path / "coco", "train"))


@pytest.mark.parametrize(
    ("stated", "expected"), [((30, 40), (30, 40)), ((40, 30), (40, 30)), (None, (30, 40))]
)
def test_load_dataset_rotated_image_takes_the_raster_that_was_annotated(
    tmp_path: Path, stated: tuple[int, int] | None, expected: tuple[int, int]
) -> None:
    image = {"id": 7, "file_name": "a.jpg"}
    if stated:
        image |= {"width": stated[0], "height": stated[1]}
    write_coco(tmp_path, coco(images=[image]))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "a.jpg", exif=exif)
    sample = load_dataset(tmp_path, "train").samples[0]
    assert (sample.width_px, sample.height_px) == expected


@pytest.fixture(scope="module")
def bccd_voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bccd")
    for folder in ("Annotations", "ImageSets", "JPEGImages"):
        (root / folder).symlink_to(BCCD / folder, target_is_directory=True)
    return root


@needs_bccd
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_load_dataset_bccd_voc_and_coco_give_the_same_boxes(bccd_voc: Path, split: str) -> None:
    def content(dataset: Dataset) -> list[object]:
        return [
            (s.path.name, s.image_id, s.width_px, s.height_px, [(b.label, b.xyxy) for b in s.boxes])
            for s in dataset.samples
        ]

    from_coco = load_dataset(BCCD, split)
    from_voc = load_dataset(bccd_voc, split, classes=("RBC", "WBC", "Platelets"))
    assert (from_coco.format, from_voc.format) == ("coco", "voc")
    assert from_coco.classes == from_voc.classes
    assert content(from_coco) == content(from_voc)


@needs_bccd
def test_load_dataset_bccd_degenerate_boxes_are_dropped(bccd_voc: Path) -> None:
    dataset = load_dataset(bccd_voc, "train")
    assert (len(dataset.samples), dataset.objects) == (255, 3442)
    assert Counter(item.reason for item in dataset.dropped) == {"zero size": 2}
    assert {item.image for item in dataset.dropped} == {"BloodImage_00338.jpg", "BloodImage_00343.jpg"}
