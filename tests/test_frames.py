from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from qexport.errors import DatasetError
from qexport.frames import Frame, fit_frame, frame_size, read_frame, read_image, read_sample
from qexport.samples import Dataset, Sample

ORIENTATION = 0x0112


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)


def dataset_of(sizes: list[tuple[int, int]]) -> Dataset:
    samples = tuple(Sample(Path(f"{i}.png"), i, width, height) for i, (height, width) in enumerate(sizes, 1))
    return Dataset("d", Path("d"), "train", "folder", ("__background__",), samples, (), "")


def test_read_image_rgb_is_bit_for_bit(tmp_path: Path) -> None:
    pixels = noise(5, 7)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png")
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, pixels)
    read[0, 0] = 0  # the array is the caller's own


def test_read_image_grey_repeats_the_channel(tmp_path: Path) -> None:
    pixels = noise(5, 7, 1)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.repeat(pixels[..., None], 3, axis=2))


def test_read_image_transparency_is_dropped(tmp_path: Path) -> None:
    pixels = noise(5, 7, 4)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), pixels[..., :3])


@pytest.mark.parametrize("transparency", [None, 1, b"\x00\x80\xff"])
def test_read_image_palette_gives_its_colours(tmp_path: Path, transparency: object) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8)).convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    options = {} if transparency is None else {"transparency": transparency}
    image.save(tmp_path / "a.png", **options)
    assert read_image(tmp_path / "a.png").tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_read_image_16_bit_is_divided_by_256(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    read = read_image(tmp_path / f"a.{suffix}")
    assert read.shape == (1, 5, 3)
    assert read[0, :, 0].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["F", "I"])
def test_read_image_32_bit_raises_error(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (4, 3)).save(tmp_path / "a.tif")
    with pytest.raises(DatasetError, match=r"a\.tif: pixels are 32-bit"):
        read_image(tmp_path / "a.tif")


def test_read_image_cmyk_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    read = read_image(tmp_path / "a.jpg").astype(int)
    assert read.shape == (16, 16, 3)
    np.testing.assert_allclose(read[8, 8], [255, 0, 0], atol=4)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_read_image_exif_rotation_is_pillows(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = Image.fromarray(noise(4, 6))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if suffix == "webp" else {}
    upright.save(tmp_path / f"a.{suffix}", exif=exif, **options)
    read = read_image(tmp_path / f"a.{suffix}")
    first, last = upright.getpixel((0, 0)), upright.getpixel((5, 3))
    # EXIF 2.32: where the stored image's first pixel stands once it is upright.
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    row, column = corner[orientation]
    assert read.shape == ((4, 6, 3) if orientation <= 4 else (6, 4, 3))
    assert tuple(read[row, column]) == first
    assert tuple(read[-1 - row, -1 - column]) == last


def test_read_image_annotated_raw_raster_is_not_rotated(tmp_path: Path) -> None:
    pixels = noise(4, 6)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", size_px=(4, 6)), pixels)
    rotated = np.rot90(pixels, -1)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", size_px=(6, 4)), rotated)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), rotated)
    sample = Sample(tmp_path / "a.png", 1, width_px=6, height_px=4)
    np.testing.assert_array_equal(read_sample(sample, (4, 6)).pixels, pixels)
    with pytest.raises(DatasetError, match=r"a\.png: the image is 4x6 pixels, the annotations say 9x5"):
        read_image(tmp_path / "a.png", size_px=(5, 9))


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp"])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.6])
def test_read_image_truncated_raises_error(tmp_path: Path, suffix: str, kept: float) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise(40, 60)).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(DatasetError, match=rf"a\.{suffix}: not a readable image"):
        read_image(path)


def test_read_image_missing_file_raises_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"gone\.png: no such image"):
        read_image(tmp_path / "gone.png")


def test_read_frame_same_size_is_bit_for_bit(tmp_path: Path) -> None:
    pixels = noise(12, 16)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    frame = read_frame(tmp_path / "a.png", (12, 16))
    np.testing.assert_array_equal(frame.pixels, pixels)
    assert (frame.scale, frame.original_px) == (1.0, (12, 16))


@pytest.mark.parametrize(
    ("size", "content"), [((24, 64), (6, 16)), ((24, 12), (12, 6)), ((3, 2), (12, 8)), ((1, 900), (1, 16))]
)
def test_read_frame_other_size_is_fitted_and_padded(
    tmp_path: Path, size: tuple[int, int], content: tuple[int, int]
) -> None:
    Image.new("RGB", size[::-1], (200, 100, 50)).save(tmp_path / "a.png")
    frame = read_frame(tmp_path / "a.png", (12, 16))
    height, width = content
    assert frame.pixels.shape == (12, 16, 3)
    assert (frame.pixels[:height, :width] == (200, 100, 50)).all()
    assert not frame.pixels[height:].any()
    assert not frame.pixels[:, width:].any()
    # The content's corners are the image's corners.
    whole = frame.to_original(np.array([[0, 0, width, height]], dtype=np.float32))
    np.testing.assert_allclose(whole, [[0, 0, size[1], size[0]]], rtol=1e-6)


def test_read_frame_without_pixels_raises_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="frame of 0x5"):
        read_frame(tmp_path / "a.png", (0, 5))


@settings(max_examples=50)
@given(
    original=st.tuples(st.integers(1, 2000), st.integers(1, 2000)),
    target=st.tuples(st.integers(1, 2000), st.integers(1, 2000)),
    corners=st.lists(st.floats(-3000, 3000, width=32), min_size=4, max_size=4),
)
def test_to_original_boxes_stay_in_the_image(
    original: tuple[int, int], target: tuple[int, int], corners: list[float]
) -> None:
    scale = min(target[0] / original[0], target[1] / original[1])
    frame = Frame(np.zeros((1, 1, 3), np.uint8), scale, original)
    boxes = frame.to_original(np.array([corners], dtype=np.float32))
    assert boxes.shape == (1, 4)
    assert boxes.dtype == np.float32
    assert (boxes >= 0).all()
    assert (boxes <= [original[1], original[0]] * 2).all()


def test_to_original_no_boxes_gives_none() -> None:
    frame = Frame(np.zeros((4, 4, 3), np.uint8), 1.0, (4, 4))
    assert frame.to_original(np.zeros((0, 4), np.float32)).shape == (0, 4)


def test_frame_size_is_the_commonest_and_of_two_the_larger() -> None:
    assert frame_size(dataset_of([(9, 9), (4, 6), (4, 6)])) == (4, 6)
    assert frame_size(dataset_of([(4, 6), (9, 9), (4, 6), (9, 9)])) == (9, 9)
    with pytest.raises(DatasetError, match="no images"):
        frame_size(dataset_of([]))


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((12, 16, 3), np.float32),
        np.zeros((12, 16, 4), np.uint8),
        np.zeros((12, 16), np.uint8),
        np.zeros((3, 12, 16), np.uint8),
        np.zeros((0, 16, 3), np.uint8),
    ],
)
def test_image_of_another_type_or_shape_is_never_made_a_frame(pixels: NDArray[np.generic]) -> None:
    with pytest.raises(DatasetError, match=r"expected \(height, width, 3\) and uint8"):
        fit_frame(pixels, (12, 16))  # type: ignore[arg-type]
