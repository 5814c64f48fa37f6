"""Train the detector of `hard_case.py`, about eight minutes of one CPU core, and write its weights in half precision.

    python tools/train_hard_case.py --out hard.pt
    qexport run --model tools/hard_case.py:build --weights hard.pt --data scenes --target onnx --out runs/hard

RPN and box head begin with the demo's weights; trunk and FPN begin from scratch. There is no weight decay, and the
trunk's learning rate is large: some channels fall silent behind their ReLU, BatchNorm of the depthwise layer that reads
them divides by next to nothing, and folding gives those channels weights a hundred times those of their neighbours.
The scenes are those that the demo was trained on, and not those that `qexport.detectors.demo.scenes` writes by default.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from hard_case import build
from rich.console import Console
from torch import nn
from train_demo import Options, save_half, train

from qexport.detectors.demo import demo_weights

_HEADS = ("rpn.", "roi_heads.")


def main() -> None:
    """Train and save."""
    options = parse_options()
    console = Console()
    torch.set_num_threads(1)  # sums are added in one order only on one thread
    started = time.monotonic()
    detector = train(build_with_heads, options, console)
    console.print(f"trained in {(time.monotonic() - started) / 60:.1f} minutes")
    save_half(detector, options.out)
    console.print(f"wrote {options.out}: {options.out.stat().st_size / 1e6:.2f} MB")


def parse_options() -> Options:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description="Train the detector with the MobileNetV2 trunk.")
    parser.add_argument("--out", type=Path, required=True, help="weights file")
    parser.add_argument("--images", type=int, default=1600, help="training scenes (%(default)s)")
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images a step (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="AdamW's peak (%(default)s)")
    parser.add_argument("--trunk-factor", type=float, default=10.0, help="of it for the trunk (%(default)s)")
    parser.add_argument("--weight-decay", type=float, default=0.0, help="AdamW's (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of weights and sampling (%(default)s)")
    given = parser.parse_args()
    return Options(
        out=given.out,
        images=given.images,
        steps=given.steps,
        batch=given.batch,
        learning_rate=given.learning_rate,
        seed=given.seed,
        weight_decay=given.weight_decay,
        trunk_factor=given.trunk_factor,
    )


def build_with_heads() -> nn.Module:
    """Return the detector before training, RPN and box head with the demo's weights."""
    detector: nn.Module = build()
    demo = torch.load(demo_weights(), weights_only=True, map_location="cpu")
    heads = {name: value.float() for name, value in demo.items() if name.startswith(_HEADS)}
    detector.load_state_dict(detector.state_dict() | heads)
    return detector


if __name__ == "__main__":
    main()
