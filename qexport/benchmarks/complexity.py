"""How large a detector is: parameters, MACs per layer, sparsity, and the memory that one run takes.

torch is imported where it counts MACs; the rest also serves a board without torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qexport.errors import QexportError, TargetUnavailable
from qexport.results import Complexity

if TYPE_CHECKING:
    from torch import Tensor, nn

# The kernel charges a new process with the peak of the process that started it, until the new one has
# grown past it (on Linux, exec keeps the highest mark of the memory that it replaces). A parent with torch
# loaded would hide everything below some 500 MB, so a bare interpreter starts the command.
_WATCHER = """
import os, sys
pipe, command = int(sys.argv[1]), sys.argv[2:]
pid = os.fork()
if pid == 0:
    os.close(pipe)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127)
_, status, usage = os.wait4(pid, 0)
os.write(pipe, str(usage.ru_maxrss).encode())
code = os.waitstatus_to_exitcode(status)
sys.exit(code if code >= 0 else 128 - code)
"""


def count_complexity(
    module: nn.Module,
    args: tuple[Tensor, ...],
    *,
    weight_codes: Iterable[NDArray[np.int8]],
    float_bytes: int,
    artifact_bytes: int,
) -> Complexity:
    """Count everything about a detector that does not vary from run to run.

    Args:
        module: the static detector, float.
        args: its inputs, one uint8 frame.
        weight_codes: the int8 weights of every quantized layer, any shapes.
        float_bytes: size of the float artifact.
        artifact_bytes: size of the quantized artifact.
    """
    macs, _ = count_macs(module, args)
    return Complexity(
        parameters=count_parameters(module),
        macs=macs,
        average_sparsity=average_sparsity(module),
        average_sparsity_quantized=quantized_sparsity(weight_codes),
        float_bytes=float_bytes,
        artifact_bytes=artifact_bytes,
    )


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters; one that several layers share counts once."""
    return sum(parameter.numel() for parameter in module.parameters())


def average_sparsity(module: nn.Module) -> float:
    """Return the share of weights that are exactly zero, 0..1, over all weights alike.

    Weights are the parameters of at least two dimensions: those that become int8. Biases and BatchNorm's
    scales and shifts do not count.
    """
    weights = [parameter for parameter in module.parameters() if parameter.dim() > 1]
    total = sum(weight.numel() for weight in weights)
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return zeros / total if total else 0.0


def quantized_sparsity(weight_codes: Iterable[NDArray[np.int8]]) -> float:
    """Return the share of int8 weight codes that are zero, 0..1, over all codes alike."""
    total = zeros = 0
    for codes in weight_codes:
        total += codes.size
        zeros += codes.size - int(np.count_nonzero(codes))
    return zeros / total if total else 0.0


def count_macs(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[int, dict[str, int]]:
    """Run `module` once and count its multiply-accumulates, with torch's own FlopCounterMode.

    Convolutions, linears and matrix products count; elementwise work, pooling and RoIAlign do not, as is
    usual. Biases do not either.

    Returns:
        The sum, and the MACs of every module path that has its own, without its children's and over all of
        its calls; the path of `module` itself is "". The values add up to the sum.
    """
    # Importing torch costs seconds and a board has none: only this function needs it.
    import torch  # noqa: PLC0415
    from torch.utils.flop_counter import FlopCounterMode  # noqa: PLC0415

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*args)
    root = type(module).__name__
    flops = {
        name.removeprefix(root).removeprefix("."): sum(by_operator.values())
        for name, by_operator in counter.get_flop_counts().items()
        if name != "Global"
    }
    # The counter adds a module's operations to every module around it.
    own = dict(flops)
    for path, count in flops.items():
        if path:
            own[_parent(path, flops)] -= count
    macs = {path: count // 2 for path, count in own.items() if count}
    return counter.get_total_flops() // 2, macs


def peak_memory(command: Sequence[str]) -> int:
    """Run `command` as a fresh process and return its peak resident memory, bytes.

    Resident pages of shared libraries count, memory of processes that the command starts does not. Values
    vary a little from run to run.

    Args:
        command: the program (absolute, or found on PATH) and its arguments; its standard output is dropped.

    Raises:
        QexportError: the command cannot be started or fails; the message ends with what it wrote.
        TargetUnavailable: the system does not tell the memory of its processes (Windows).
    """
    if not hasattr(os, "wait4"):
        raise TargetUnavailable(
            f"peak memory: {sys.platform} does not report it for a process (os.wait4). Use Linux or macOS."
        )
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as report:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", _WATCHER, str(writer), *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(writer,),
                check=False,
            )
        finally:
            os.close(writer)
        peak = report.read()
    if done.returncode != 0 or not peak:
        wrote = done.stderr.decode(errors="replace").strip()[-2000:]
        raise QexportError(
            f"peak memory: {' '.join(command)} ended with exit code {done.returncode}, expected 0. Run it by "
            f"itself to see why. It wrote: {wrote or 'nothing'}"
        )
    # ru_maxrss is in kilobytes on Linux and in bytes on macOS (getrusage(2) of each).
    return int(peak) * (1 if sys.platform == "darwin" else 1024)


def _parent(path: str, known: dict[str, int]) -> str:
    """Return the nearest module around `path` that the counter has seen."""
    parent = path.rpartition(".")[0]
    while parent and parent not in known:
        parent = parent.rpartition(".")[0]
    return parent
