"""A small detector that comes with the package, and the scenes it was trained on.

`model.py` holds the factory and `weights_fp16.pt` the state dict, as a user would hand over a detector of
their own; `scenes.py` draws images and annotations, so that every step can be tried without a dataset or a
download. `tools/train_demo.py` of the repository made the weights.
"""

from __future__ import annotations

from pathlib import Path


def demo_weights() -> Path:
    """Return the path of the demo detector's weights: a float16 state dict."""
    return Path(__file__).with_name("weights_fp16.pt")
