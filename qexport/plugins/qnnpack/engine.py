"""Whether this PyTorch's engine can do what the scheme asks: weights with a scale for every output channel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.ao.nn import quantized as nnq

from qexport.errors import TargetUnavailable
from qexport.plugins.qnnpack.modules import packed_weight
from qexport.runtimes.qnnpack_library import ZERO_POINT, engine_set, quiet, require_engine

_KERNEL, _CHANNELS = 3, 4


def _convolution() -> nn.Module:
    module: nn.Module = nnq.Conv2d(_CHANNELS, _CHANNELS, _KERNEL)  # type: ignore[no-untyped-call]
    return module


def _linear() -> nn.Module:
    module: nn.Module = nnq.Linear(_CHANNELS, _CHANNELS)  # type: ignore[no-untyped-call]
    return module


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "convolutions": (_convolution, (_CHANNELS, _CHANNELS, _KERNEL, _KERNEL), (1, _CHANNELS, 5, 5)),
    "linear layers": (_linear, (_CHANNELS, _CHANNELS), (2, _CHANNELS)),
}
"""What is tried: a module, the shape of its weight, that of its input."""


def check_engine(engine: str) -> None:
    """Refuse an engine that is not there, not QNNPACK, or without weights per channel.

    Raises:
        TargetUnavailable: says what it lacks.
        ArtifactError: it is another one.
    """
    require_engine(engine, asked_by="target qnnpack")
    for what, (make, weight, given) in LAYERS.items():
        require_per_channel(engine, what, make, weight, torch.ones(given))


def require_per_channel(
    engine: str,
    what: str,
    make: Callable[[], nn.Module],
    weight: tuple[int, ...],
    given: Tensor,
    axis: int = 0,
) -> None:
    """Run a layer of weights per channel under an engine.

    Args:
        engine: its name.
        what: the kind of layer, for the message.
        make: a quantized module.
        weight: shape of its weight.
        given: what it takes, in float.
        axis: of the output channels in the weight.

    Raises:
        TargetUnavailable: the engine refuses it.
    """
    scales = torch.linspace(0.01, 0.02, weight[axis])
    codes = torch.ones(weight, dtype=torch.int8)
    try:
        with quiet(), engine_set(engine):
            module = make()
            module.set_weight_bias(packed_weight(codes, scales, axis=axis), None)  # type: ignore[operator]
            module(torch.quantize_per_tensor(given, 0.1, ZERO_POINT, torch.quint8))
    except RuntimeError as error:
        first = str(error).strip().partition("\n")[0]
        raise TargetUnavailable(
            f"PyTorch's engine {engine!r} in torch {torch.__version__} runs no {what} with a weight scale for every "
            f"output channel: {first}. The encodings have those. Use torch as pinned in constraints.txt."
        ) from error
