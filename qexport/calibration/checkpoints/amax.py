"""Scales from largest magnitudes, which NVIDIA's two libraries keep: `scale = amax / 127`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qexport.calibration.checkpoints.ranges import Port, QatRange, check_scales, name_some, refuse_unseen
from qexport.errors import CheckpointError

_AMAX = "._amax"
_STEPS = 127


def holds(state: Mapping[str, Tensor], name: str) -> bool:
    """Tell whether quantizers of this name (`weight_quantizer`) have a largest magnitude in a state dict."""
    return any(key.endswith(f".{name}{_AMAX}") for key in state)


def read_amax(
    state: Mapping[str, Tensor], path: Path, ports: Mapping[str, Port], unsigned: frozenset[str] = frozenset()
) -> tuple[dict[str, Tensor], tuple[QatRange, ...]]:
    """Return the float weights, and the range of each quantizer.

    Args:
        state: of the checkpoint.
        path: of the checkpoint.
        ports: what the quantizers of a name stand for.
        unsigned: names of quantizers with codes 0..255.

    Raises:
        CheckpointError: a layer whose input or weight was never calibrated, SmoothQuant, an input with several
            scales, or a scale that is zero or not finite.
    """
    quantizers = {
        key.removesuffix(_AMAX): value for key, value in state.items() if key.endswith(_AMAX) and "." in key
    }
    floats = {
        key: value
        for key, value in state.items()
        if not any(part.endswith("_quantizer") for part in key.split(".")[:-1])
    }
    _refuse_smooth(state, path)
    _refuse_halves(quantizers, ports, path)
    ranges = []
    for name, amax in quantizers.items():
        layer, _, quantizer = name.rpartition(".")
        port = ports.get(quantizer)
        if port is None:  # of something that has no tensor of its own here
            continue
        if port != "weight" and amax.numel() != 1:
            raise CheckpointError(
                f"{path}: {name}{_AMAX} has {amax.numel()} values; an activation has one scale for the whole tensor. "
                "Train with a per-tensor input quantizer."
            )
        ranges.append(_range(name, layer, port, amax, name in unsigned))
    return floats, check_scales(ranges, path, floats)


def _range(name: str, layer: str, port: Port, amax: Tensor, unsigned: bool) -> QatRange:
    steps = 255 if unsigned else _STEPS
    scale = amax.flatten().to(torch.float32) / steps
    return QatRange(
        path=layer,
        port=port,
        scale=tuple(float(value) for value in scale),
        buffer=f"{name}{_AMAX}",
        # ModelOpt's codes begin at -128, which no value within the largest magnitude takes.
        qmin=0 if unsigned else -_STEPS if port == "weight" else -128,
        qmax=steps,
        axis=0 if amax.numel() > 1 else None,
    )


def _refuse_smooth(state: Mapping[str, Tensor], path: Path) -> None:
    smooth = [key for key in state if key.endswith("._pre_quant_scale")]
    if smooth:
        raise CheckpointError(
            f"{path}: {len(smooth)} inputs are scaled per channel before they are quantized ({smooth[0]}): SmoothQuant "
            "or AWQ, which no integer kernel here has. Train with INT8_DEFAULT_CFG."
        )


def _refuse_halves(quantizers: Mapping[str, Tensor], ports: Mapping[str, Port], path: Path) -> None:
    weight = next(name for name, port in ports.items() if port == "weight")
    source = next(name for name, port in ports.items() if port == "input")
    layers = {name.removesuffix(f".{weight}") for name in quantizers if name.endswith(f".{weight}")}
    refuse_unseen(
        {
            f"{layer}.{source}": "no _amax, the weight has one"
            for layer in sorted(layers)
            if f"{layer}.{source}" not in quantizers
        },
        path,
    )
    if not layers:
        inputs = [name for name in quantizers if name.endswith(f".{source}")]
        raise CheckpointError(
            f"{path}: no weight has a largest magnitude, {len(inputs)} inputs have ({name_some(inputs)}). "
            "Calibrate the weights' quantizers too, and save it again."
        )
