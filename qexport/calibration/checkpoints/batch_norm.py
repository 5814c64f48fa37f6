"""Which BatchNorm belongs to which convolution, and fused layouts mapped back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from qexport.calibration.checkpoints.ranges import name_some
from qexport.errors import CheckpointError

_IMAGE_PX = 128
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, FrozenBatchNorm2d)


def norms_of(detector: nn.Module) -> dict[str, str]:
    """Return the BatchNorm that reads what a convolution or a linear computed, by the path of that.

    The detector's parts are run on a small empty image, and who read whose output is looked at.

    Args:
        detector: a two-stage detector, eager or static, in eval mode.
    """
    outputs: dict[int, str] = {}
    kept: list[Tensor] = []  # an address is a name only as long as the tensor lives
    found: dict[str, str] = {}

    def watch(path: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def after(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            if isinstance(module, _NORMS):
                producer = outputs.get(id(given[0]))
                if producer is not None:
                    found[producer] = path
            else:
                outputs[id(out)] = path
                kept.append(out)

        return module.register_forward_hook(after)

    kinds = (nn.Conv2d, nn.Linear, *_NORMS)
    handles = [watch(path, part) for path, part in detector.named_modules() if isinstance(part, kinds)]
    try:
        with torch.no_grad():
            _run_parts(detector)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _run_parts(detector: nn.Module) -> None:
    features = detector.backbone(torch.zeros(1, 3, _IMAGE_PX, _IMAGE_PX))  # type: ignore[operator]
    levels = [features] if isinstance(features, Tensor) else list(features.values())
    detector.rpn.head(levels)  # type: ignore[operator, union-attr]
    size = detector.roi_heads.box_roi_pool.output_size  # type: ignore[union-attr]
    pooled = torch.zeros(1, levels[0].shape[1], *size)  # type: ignore[misc]
    detector.roi_heads.box_head(pooled)  # type: ignore[operator, union-attr]


def unfuse(
    state: Mapping[str, Tensor], fused: frozenset[str], norms: Mapping[str, str], path: Path
) -> dict[str, Tensor]:
    """Return a state dict in which BatchNorms inside fused layers have the detector's own keys again.

    torch.ao keeps the BatchNorm of a fused layer as `CONV.bn`; the detector has it elsewhere.

    Args:
        state: of the checkpoint.
        fused: paths of layers that hold a BatchNorm.
        norms: the detector's, by convolution.
        path: of the checkpoint.

    Raises:
        CheckpointError: a layer is fused with a BatchNorm that the detector does not have there, or has it twice.
    """
    strange = sorted(conv for conv in fused if conv not in norms)
    if strange:
        raise CheckpointError(
            f"{path}: {len(strange)} layers are fused with a BatchNorm ({strange[0]}.bn.weight), and the detector "
            f"has none behind them: {name_some(strange)}. Give the factory of the training run with --model, with "
            "the BatchNorms that the float detector had."
        )
    twice = sorted(conv for conv in fused if f"{norms[conv]}.running_mean" in state)
    if twice:
        raise CheckpointError(
            f"{path}: {twice[0]} holds its BatchNorm as {twice[0]}.bn, and {norms[twice[0]]} is there as well. "
            "Which of them was trained cannot be told: save the state dict of the prepared model itself."
        )
    moved = {}
    for key, value in state.items():
        conv, inside, name = key.rpartition(".bn.")
        moved[f"{norms[conv]}.{name}" if inside and conv in fused else key] = value
    return moved
