"""Draws the demo's images: washers, nuts and bolts on a cluttered ground, with their boxes.

The same seed gives the same pixels everywhere: shapes are integer polygons on a grid four times as fine as
the image, averaged down; colours are mixed in integers; the random numbers are PCG64's; and of sine and
cosine nothing is kept but coordinates rounded to that grid.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from qexport.errors import RunFolderError
from qexport.files import read_json, write_bytes, write_json

HEIGHT, WIDTH = 240, 320
PARTS = ("washer", "nut", "bolt")
_CLUTTER = ("disc", "ring", "rod", "plate", "blob", "wedge")
_FINE = 4  # drawing grid per image pixel, averaged down for soft edges
_LEAST_VISIBLE = 0.55  # of a part's own pixels: hidden further, a part would be guesswork
_MOST_OVERLAP = 0.25  # of a part's own pixels, by another part: further, both boxes would be ambiguous
_DRAWING = 1  # part of the annotations: a change of the drawing must not mix with images drawn before it

_Bytes = NDArray[np.uint8]
_Mask = NDArray[np.bool_]
_Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class _Layer:
    """A polygon in part units (the part's half length is 1); a tone of None cuts a hole."""

    points: tuple[_Point, ...]
    tone: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """One drawn image and what is on it.

    pixels: (240, 320, 3) uint8, RGB.
    boxes: (N, 4) float32, xyxy, pixels: the visible extent of each part.
    labels: (N,) int64, 1 and above: index into `PARTS`, plus one.
    """

    pixels: _Bytes
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclass(slots=True)
class _Placed:
    """A part on the canvas: its label, the pixels of it still seen, and how many it has in all."""

    label: int
    visible: _Mask
    pixels_total: int


def draw_scene(*seed: int) -> Scene:
    """Draw the scene of `seed`: any number of non-negative integers, e.g. seed, split and index."""
    random = np.random.Generator(np.random.PCG64(list(seed)))
    canvas = _ground(random)
    placed: list[_Placed] = []
    wanted = [*random.choice(PARTS, size=int(random.integers(2, 8)))]
    wanted += [*random.choice(_CLUTTER, size=int(random.integers(3, 9)))]
    for place in random.permutation(len(wanted)):
        _place(random, canvas, str(wanted[place]), placed)
    return Scene(
        pixels=_photograph(random, canvas),
        boxes=np.array([_extent(part.visible) for part in placed], np.float32).reshape(-1, 4),
        labels=np.array([part.label for part in placed], np.int64),
    )


def write_scenes(
    folder: Path,
    *,
    train: int = 64,
    val: int = 32,
    test: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write scenes as `images/*.png` and `{train,val,test}.coco.json` under `folder`; return `folder`.

    Every file is written whole or not at all, a split's annotations after its images. What is already there
    is not written again.

    Args:
        folder: made if missing.
        train: number of training images; likewise `val` and `test`.
        val: see `train`.
        test: see `train`.
        seed: scenes of different seeds have nothing in common.
        progress: called with (images done, images in all) after each image.

    Raises:
        RunFolderError: the folder cannot be written, or holds scenes of other settings.
    """
    counts = {"train": train, "val": val, "test": test}
    about = {
        name: f"qexport demo scenes, drawing {_DRAWING}, seed {seed}, {name}, {count} images"
        for name, count in counts.items()
    }
    # All splits are looked at before the first file is written.
    finished = {name: _is_annotated(folder / f"{name}.coco.json", about[name]) for name in counts}
    done = 0
    for split, (name, count) in enumerate(counts.items()):
        scenes: list[tuple[str, Scene]] = []
        for index in range(count):
            path = folder / "images" / f"{name}_{index:04d}.png"
            if not (finished[name] and path.exists()):
                scene = draw_scene(seed, split, index)
                scenes.append((path.name, scene))
                write_bytes(path, _png(scene.pixels))
            done += 1
            if progress is not None:
                progress(done, sum(counts.values()))
        if not finished[name]:
            write_json(folder / f"{name}.coco.json", _coco(about[name], scenes))
    return folder


class _Info(msgspec.Struct):
    description: str


class _Annotated(msgspec.Struct):
    info: _Info


def _is_annotated(path: Path, about: str) -> bool:
    """Return whether `path` holds the annotations that `about` describes; False where there is no file."""
    if not path.exists():
        return False
    found = read_json(path, _Annotated, RunFolderError).info.description
    if found != about:
        raise RunFolderError(
            f"{path}: holds other scenes. Expected: {about}. Found: {found}. "
            "Choose another folder, or delete this one."
        )
    return True


def _coco(about: str, scenes: list[tuple[str, Scene]]) -> dict[str, object]:
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for image_id, (name, scene) in enumerate(scenes, start=1):
        images.append({"id": image_id, "file_name": name, "width": WIDTH, "height": HEIGHT})
        boxes, labels = scene.boxes.tolist(), scene.labels.tolist()
        for (left, top, right, bottom), label in zip(boxes, labels, strict=True):
            width, height = right - left, bottom - top
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label,
                    "bbox": [left, top, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
    return {
        "info": {"description": about},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": label, "name": name} for label, name in enumerate(PARTS, start=1)],
    }


def _png(pixels: _Bytes) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def _ground(random: np.random.Generator) -> NDArray[np.int32]:
    """Return a ground of noise at three scales, with stripes and scratches: (240, 320, 3) int32 in 0..255."""
    height = np.zeros((HEIGHT, WIDTH), np.int32)
    for cell, weight in ((64, 5), (16, 3), (4, 2)):
        coarse = random.integers(0, 256, (HEIGHT // cell + 2, WIDTH // cell + 2), dtype=np.uint8)
        fine = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
        height += weight * (np.asarray(fine, np.int32) - 128)
    if random.random() < 0.4:  # boards or corrugated sheet
        period = int(random.integers(8, 40))
        across = np.arange(WIDTH)[None, :] if random.random() < 0.5 else np.arange(HEIGHT)[:, None]
        height += np.where(across % period < period // 3, -200, 60).astype(np.int32)
    base = random.integers(50, 170) + random.integers(-25, 26, 3)
    contrast = int(random.integers(3, 10))
    canvas = base[None, None, :] + (height * contrast // 100)[:, :, None]
    picture = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(random.integers(0, 14))):
        ends = random.integers(-20, WIDTH + 20, 4).tolist()
        draw.line(ends, fill=tuple(random.integers(20, 220, 3).tolist()), width=int(random.integers(1, 3)))
    return np.asarray(picture, np.int32).copy()


def _place(random: np.random.Generator, canvas: NDArray[np.int32], kind: str, placed: list[_Placed]) -> None:
    """Draw `kind` onto `canvas` where it leaves every part seen enough; after 12 tries, leave it out."""
    half = _half_length_px(random, kind)
    alpha, tones = _stamp(random, _layers(random, kind), half, half_is_radius=kind not in ("bolt", "rod"))
    side = alpha.shape[0]
    for _ in range(12):
        top = int(random.integers(-side // 4, HEIGHT - side + side // 4 + 1))
        left = int(random.integers(-side // 4, WIDTH - side + side // 4 + 1))
        covered = np.zeros((HEIGHT, WIDTH), bool)
        inside = _paste_slices(top, left, side)
        covered[inside[0]] = alpha[inside[1]] >= 128
        total = int((alpha >= 128).sum())
        if not _leaves_enough(covered, placed, is_part=kind in PARTS):
            continue
        if kind in PARTS and int(covered.sum()) < _LEAST_VISIBLE * total:  # too far out of the frame
            continue
        _shadow(random, canvas, alpha, top, left)
        _paint(random, canvas[inside[0]], alpha[inside[1]], tones[inside[1]])
        for part in placed:
            part.visible &= ~covered
        if kind in PARTS:
            placed.append(_Placed(PARTS.index(kind) + 1, covered, total))
        return


def _leaves_enough(covered: _Mask, placed: list[_Placed], *, is_part: bool) -> bool:
    """Return whether every placed part is still seen enough when `covered` is drawn over it."""
    for part in placed:
        hidden = int((part.visible & covered).sum())
        if int(part.visible.sum()) - hidden < _LEAST_VISIBLE * part.pixels_total:
            return False
        if is_part and hidden > _MOST_OVERLAP * part.pixels_total:
            return False
    return True


def _half_length_px(random: np.random.Generator, kind: str) -> float:
    shortest, longest = {"bolt": (15.0, 48.0), "rod": (15.0, 70.0)}.get(kind, (8.5, 34.0))
    return shortest + (longest - shortest) * float(random.random()) ** 2  # more small ones than large


def _layers(random: np.random.Generator, kind: str) -> tuple[_Layer, ...]:
    """Return the polygons of one part or piece of clutter, bottom first, in part units."""
    tone = int(random.integers(120, 236))
    hole = float(random.uniform(0.4, 0.6))
    if kind == "washer":
        return _rings((1.0, tone), (0.92, tone - 25), (hole + 0.08, tone - 60), (hole, None))
    if kind == "nut":
        chamfer = _rings((0.84, tone), (hole + 0.1, tone - 70), (hole, None))
        return (_Layer(_circle(1.0, 6), tone - 30), *chamfer)
    if kind == "bolt":
        return _bolt(random, tone)
    return _clutter(random, kind, tone, hole)


def _clutter(random: np.random.Generator, kind: str, tone: int, hole: float) -> tuple[_Layer, ...]:
    """Return the polygons of things that share something with a part: roundness, a hole, length."""
    match kind:
        case "disc":
            return _rings((1.0, tone), (0.9, tone - 25), (0.3, tone - 40))
        case "ring":
            return _rings((1.0, tone - 90), (0.84, None))
        case "rod":
            thick = float(random.uniform(0.08, 0.2))
            return (_Layer(_bar(-1, 1, thick), tone), _Layer(_bar(-1, 1, thick / 3), tone - 40))
        case "plate":
            return (_Layer(_circle(1.0, 4), tone - 20), _Layer(_circle(hole * 0.7), None))
        case "wedge":
            return (_Layer(_circle(1.0, 3), tone), _Layer(_circle(0.6, 3), tone - 30))
    radii = random.uniform(0.45, 1.0, 9).tolist()
    corners = zip(radii, _circle(1.0, 9), strict=True)
    return (_Layer(tuple((radius * x, radius * y) for radius, (x, y) in corners), tone - 40),)


def _rings(*rings: tuple[float, int | None]) -> tuple[_Layer, ...]:
    """Return concentric circles, largest first, from radius and tone."""
    return tuple(_Layer(_circle(radius), tone) for radius, tone in rings)


def _bolt(random: np.random.Generator, tone: int) -> tuple[_Layer, ...]:
    """Return a bolt from the side: faceted head at the left, threaded shaft to the right."""
    head, shaft = float(random.uniform(0.34, 0.46)), float(random.uniform(0.15, 0.21))
    neck = float(random.uniform(-0.72, -0.6))
    layers = [
        _Layer(_bar(neck, 1.0, shaft), tone - 15),
        _Layer(_bar(-1.0, neck, head), tone - 45),
        _Layer(_bar(-1.0, neck, head / 2), tone),
    ]
    pitch, start = 0.13, neck + float(random.uniform(0.1, 0.5))
    while start < 0.95:
        crest = ((start, -shaft), (start + 0.05, -shaft), (start + 0.09, shaft), (start + 0.04, shaft))
        layers.append(_Layer(crest, tone - 85))
        start += pitch
    return tuple(layers)


def _circle(radius: float, corners: int = 40) -> tuple[_Point, ...]:
    """Return the corners of a regular polygon around the origin."""
    turns = [2 * math.pi * corner / corners for corner in range(corners)]
    return tuple((radius * math.cos(turn), radius * math.sin(turn)) for turn in turns)


def _bar(left: float, right: float, half_height: float) -> tuple[_Point, ...]:
    return ((left, -half_height), (right, -half_height), (right, half_height), (left, half_height))


def _stamp(
    random: np.random.Generator, layers: tuple[_Layer, ...], half: float, *, half_is_radius: bool
) -> tuple[_Bytes, _Bytes]:
    """Draw `layers` turned, tilted and `half` pixels in half length; long things tilt about their own axis.

    Returns:
        Coverage and tone, both (S, S) uint8 with S just large enough for any turn.
    """
    side = 2 * math.ceil(half) + 4
    turn, tilt = 2 * math.pi * float(random.random()), float(random.uniform(0.72, 1.0))
    spin = 2 * math.pi * float(random.random()) if half_is_radius else 0.0
    cover = Image.new("L", (side * _FINE, side * _FINE), 0)
    tones = Image.new("L", cover.size, 0)
    brushes = ImageDraw.Draw(cover), ImageDraw.Draw(tones)
    for layer in layers:
        points = [_turned(x, y, spin) for x, y in layer.points]
        points = [_turned(x, y * tilt, turn) for x, y in points]
        grid = [tuple(round((half * value + side / 2) * _FINE) for value in point) for point in points]
        brushes[0].polygon(grid, fill=0 if layer.tone is None else 255)
        brushes[1].polygon(grid, fill=layer.tone or 0)
    covered = np.asarray(cover.reduce(_FINE), np.uint8)
    mixed = np.asarray(tones.reduce(_FINE), np.int32)
    # Averaging mixed the empty surround into the rim's tone in the share that is not covered: divide it out.
    return covered, np.minimum(255, mixed * 255 // np.maximum(covered, 1)).astype(np.uint8)


def _turned(x: float, y: float, angle: float) -> _Point:
    return x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)


def _paste_slices(top: int, left: int, side: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Return where a square stamp lies on the canvas, and which part of the stamp that is."""
    rows = slice(max(top, 0), min(top + side, HEIGHT))
    columns = slice(max(left, 0), min(left + side, WIDTH))
    own = slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)
    return (rows, columns), own


def _shadow(
    random: np.random.Generator, canvas: NDArray[np.int32], alpha: _Bytes, top: int, left: int
) -> None:
    soft = np.asarray(Image.fromarray(alpha).filter(ImageFilter.BoxBlur(2)), np.int32)
    down, right = random.integers(-3, 5, 2).tolist()
    inside, own = _paste_slices(top + down, left + right, alpha.shape[0])
    strength = int(random.integers(60, 150))
    canvas[inside] = canvas[inside] * (255 * 255 - strength * soft[own][:, :, None]) // (255 * 255)


def _paint(random: np.random.Generator, canvas: NDArray[np.int32], alpha: _Bytes, tones: _Bytes) -> None:
    """Mix a stamp into `canvas` in place: metal colour, and a sheen that falls off to one side."""
    metal = 256 + random.integers(-30, 31, 3)
    slopes = random.integers(-160, 161, 2).tolist()
    rows, columns = np.indices(alpha.shape, dtype=np.int32)
    middle = rows - alpha.shape[0] // 2, columns - alpha.shape[1] // 2
    sheen = 256 + (slopes[0] * middle[0] + slopes[1] * middle[1]) // max(alpha.shape)
    colour = np.clip(tones[:, :, None].astype(np.int32) * sheen[:, :, None] * metal // 65536, 0, 255)
    opacity = alpha[:, :, None].astype(np.int32)
    canvas[...] = (canvas * (255 - opacity) + colour * opacity + 127) // 255


def _photograph(random: np.random.Generator, canvas: NDArray[np.int32]) -> _Bytes:
    """Light the scene from one side, tint it, blur it a little and add the camera's noise."""
    exposure = 256 + random.integers(-110, 70) + random.integers(-18, 19, 3)
    slopes = random.integers(-110, 111, 2).tolist()
    rows, columns = np.indices((HEIGHT, WIDTH), dtype=np.int32)
    light = 256 + slopes[0] * (rows - HEIGHT // 2) // HEIGHT + slopes[1] * (columns - WIDTH // 2) // WIDTH
    lit = np.clip(canvas * light[:, :, None] * exposure // 65536, 0, 255).astype(np.uint8)
    if random.random() < 0.5:
        lit = np.asarray(Image.fromarray(lit).filter(ImageFilter.BoxBlur(1)), np.uint8)
    grain = int(random.integers(2, 14))
    noise = random.integers(-grain, grain + 1, lit.shape)
    grainy: _Bytes = np.clip(lit.astype(np.int64) + noise, 0, 255).astype(np.uint8)
    return grainy


def _extent(mask: _Mask) -> tuple[float, float, float, float]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
