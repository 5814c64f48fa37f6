"""The harder case of docs/accuracy.md: its trunk is linked block by block, and is trained faster than its heads."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from qexport.calibration.means.equalization import find_links
from qexport.detectors.demo.scenes import HEIGHT, WIDTH
from qexport.detectors.static import make_static
from qexport.quantization.fold import fold_batch_norm
from qexport.quantization.graph import export_graph

TOOLS = Path(__file__).parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

from hard_case import build  # noqa: E402 - the tools are no package
from train_demo import Options, parameter_groups  # noqa: E402


def test_channels_can_be_scaled_from_expansion_to_depthwise_to_projection() -> None:
    detector: nn.Module = build()
    assert not any(isinstance(module, nn.ReLU6) for module in detector.modules())
    static = make_static(detector.eval(), frame_px=(HEIGHT, WIDTH))
    links = {link.producer: link.readers for link in find_links(export_graph(fold_batch_norm(static)))}
    for block in range(2, 8):
        layers = [f"backbone.body.{block}.conv.{name}" for name in ("0.0", "1.0", "2")]
        for producer, reader in pairwise(layers):
            assert links[producer] == (reader,)
    assert "backbone.body.4.conv.2" not in links  # a sum and the FPN read it


def test_groups_hold_every_parameter_once_and_the_trunk_learns_faster(tmp_path: Path) -> None:
    detector: nn.Module = build()
    options = Options(
        out=tmp_path, images=1, steps=1, batch=1, learning_rate=0.002, seed=0, trunk_factor=10.0
    )
    groups = parameter_groups(detector, options)
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.002]
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in detector.parameters())
