"""Train the demo detector from scratch, on one CPU core, and write its weights in half precision.

    python tools/train_demo.py

The training scenes are drawn from a seed of their own. The scenes that `qexport.detectors.demo.scenes` writes
by default (seed 0) are looked at once, at the end, with the weights as trained and as saved.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from qexport.detections import Detections
from qexport.detectors.demo import demo_weights
from qexport.detectors.demo.model import CLASSES, build
from qexport.detectors.demo.scenes import HEIGHT, WIDTH, Scene, draw_scene
from qexport.files import whole_file

TRAINING_SEED = 7001
HELD_OUT_SEED, HELD_OUT_SPLIT, HELD_OUT_COUNT = 0, 2, 64  # the test split of write_scenes' defaults

_WARM_UP_STEPS = 100


@dataclass(frozen=True, slots=True)
class Options:
    """What a training run is made of; the same options give the same weights on the same kind of machine."""

    out: Path
    images: int
    steps: int
    batch: int
    learning_rate: float
    seed: int
    weight_decay: float = 0.02
    trunk_factor: float = 1.0
    """Learning rate of the trunk over that of the rest."""


def main() -> None:
    """Train, save, and report what the saved weights score."""
    options = parse_options()
    console = Console()
    torch.set_num_threads(1)  # sums are added in one order only on one thread
    torch.use_deterministic_algorithms(True)
    started = time.monotonic()
    detector = train(build, options, console)
    console.print(f"trained in {(time.monotonic() - started) / 60:.1f} minutes")
    save_half(detector, options.out)
    console.print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB")

    scenes = [draw_scene(HELD_OUT_SEED, HELD_OUT_SPLIT, index) for index in range(HELD_OUT_COUNT)]
    for name, scored in (("float32, before saving", detector), ("as saved", load_half(options.out))):
        per_class = voc_average_precisions(scenes, detect(scored, scenes))
        named = ", ".join(f"{CLASSES[label]} {value:.4f}" for label, value in per_class.items())
        console.print(f"{name}: VOC mAP@0.5 {np.mean(list(per_class.values())):.4f} ({named})")


def parse_options() -> Options:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description="Train the demo detector.")
    parser.add_argument("--out", type=Path, default=demo_weights(), help="weights file (the package's)")
    parser.add_argument("--images", type=int, default=3000, help="training scenes (%(default)s)")
    parser.add_argument("--steps", type=int, default=3600, help="optimizer steps (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images a step (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="AdamW's peak (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of weights and sampling (%(default)s)")
    given = parser.parse_args()
    return Options(
        out=given.out,
        images=given.images,
        steps=given.steps,
        batch=given.batch,
        learning_rate=given.learning_rate,
        seed=given.seed,
    )


def train(make: Callable[[], nn.Module], options: Options, console: Console) -> nn.Module:
    """Return the detector that `make` returns, trained on scenes of its own, in eval mode."""
    drawn = track(range(options.images), "drawing", console=console)
    scenes = [draw_scene(TRAINING_SEED, index) for index in drawn]
    torch.manual_seed(options.seed)
    random = np.random.Generator(np.random.PCG64(options.seed))
    detector = make()
    detector.train()
    optimizer = torch.optim.AdamW(
        parameter_groups(detector, options), lr=options.learning_rate, weight_decay=options.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, options.steps))
    order: list[int] = []
    recent: list[float] = []
    for step in track(range(1, options.steps + 1), "training", console=console):
        if len(order) < options.batch:
            order = random.permutation(len(scenes)).tolist()
        batch = [augmented(random, scenes[order.pop()]) for _ in range(options.batch)]
        images, targets = [image for image, _ in batch], [target for _, target in batch]
        losses: dict[str, Tensor] = detector(images, targets)
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        recent.append(loss.item())
        if step % 100 == 0:
            console.print(f"step {step}: loss {np.mean(recent):.4f}")
            recent.clear()
    return detector.eval()


def parameter_groups(detector: nn.Module, options: Options) -> list[dict[str, object]]:
    """Return the trunk's parameters and those of the rest, as the optimizer takes them."""
    parts: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
    for name, parameter in detector.named_parameters():
        parts[not name.startswith("backbone.body.")].append(parameter)
    rate = options.learning_rate
    return [{"params": parts[0], "lr": rate * options.trunk_factor}, {"params": parts[1], "lr": rate}]


def augmented(random: np.random.Generator, scene: Scene) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a scene as the detector trains on it, flipped, rescaled on a canvas of its own size at random.

    Returns:
        (3, 240, 320) float32 in 0..1, and its target: boxes (N, 4) float32 xyxy in pixels, labels (N,) int64.
    """
    image = torch.from_numpy(scene.pixels).permute(2, 0, 1).float() / 255
    boxes = torch.from_numpy(scene.boxes).clone()
    if random.random() < 0.5:
        image = image.flip(2)
        boxes[:, [0, 2]] = WIDTH - boxes[:, [2, 0]]
    if random.random() < 0.5:
        image = image.flip(1)
        boxes[:, [1, 3]] = HEIGHT - boxes[:, [3, 1]]
    if random.random() < 0.5:
        height = int(random.integers(int(0.75 * HEIGHT), HEIGHT))
        width = int(random.integers(int(0.75 * WIDTH), WIDTH))
        size = (height, width)
        small = nn.functional.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]
        image = torch.full_like(image, 0.5)
        image[:, :height, :width] = small
        boxes = boxes * torch.tensor([width / WIDTH, height / HEIGHT] * 2)
    return image.contiguous(), {"boxes": boxes, "labels": torch.from_numpy(scene.labels)}


def save_half(detector: nn.Module, path: Path) -> None:
    """Write the state dict with its floating-point tensors as float16, whole or not at all."""
    state = {
        name: value.half() if value.is_floating_point() else value
        for name, value in detector.state_dict().items()
    }
    with whole_file(path) as partial:
        torch.save(state, partial)


def load_half(path: Path) -> nn.Module:
    """Return the demo detector in eval mode, as float32, with the weights in `path`."""
    detector: nn.Module = build()
    detector.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    return detector.eval()


def detect(detector: nn.Module, scenes: list[Scene]) -> list[Detections]:
    """Run the detector on every scene, one at a time."""
    found: list[Detections] = []
    with torch.inference_mode():
        for scene in scenes:
            image = torch.from_numpy(scene.pixels).permute(2, 0, 1).float() / 255
            result: dict[str, Tensor] = detector([image])[0]
            found.append(
                Detections(
                    boxes=result["boxes"].numpy(),
                    scores=result["scores"].numpy(),
                    labels=result["labels"].numpy(),
                )
            )
    return found


def voc_average_precisions(scenes: list[Scene], found: list[Detections]) -> dict[int, float]:
    """Return each class's average precision at IoU 0.5, area under the whole curve (PASCAL VOC 2010 on)."""
    return {label: _average_precision(scenes, found, label) for label in range(1, len(CLASSES))}


def _average_precision(scenes: list[Scene], found: list[Detections], label: int) -> float:
    truths = [scene.boxes[scene.labels == label] for scene in scenes]
    taken = [np.zeros(len(boxes), bool) for boxes in truths]
    ranked = [
        (float(one.scores[row]), image, one.boxes[row])
        for image, one in enumerate(found)
        for row in np.flatnonzero(one.labels == label)
    ]
    ranked.sort(key=lambda entry: -entry[0])
    hits = np.zeros(len(ranked))
    for rank, (_, image, box) in enumerate(ranked):
        if len(truths[image]) == 0:
            continue
        overlaps = _ious(box, truths[image])
        best = int(overlaps.argmax())
        if overlaps[best] >= 0.5 and not taken[image][best]:
            taken[image][best] = True
            hits[rank] = 1.0
    recall = np.cumsum(hits) / sum(len(boxes) for boxes in truths)
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))


def _ious(box: NDArray[np.float32], boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the IoU of one box (4,) with each of `boxes` (N, 4), all xyxy."""
    corners = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    shared = np.clip(corners, 0, None).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return np.asarray(shared / (areas + (box[2:] - box[:2]).prod() - shared), np.float32)


def _rate(step: int, steps: int) -> float:
    """Return the learning rate's factor: a linear warm-up, then half a cosine down to nothing."""
    if step < _WARM_UP_STEPS:
        return (step + 1) / _WARM_UP_STEPS
    return 0.5 * (1 + math.cos(math.pi * (step - _WARM_UP_STEPS) / max(1, steps - _WARM_UP_STEPS)))


if __name__ == "__main__":
    main()
