"""torch's own profiler on a file: the operators of each part, in order, with their times.

Run as it was exported, a part is a call, and the profiler shows it as one: its events nest in the order of the calls,
so which operator belongs to which module is read, not guessed. What a part spends outside of its operators belongs to
none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

from qexport.errors import TargetUnavailable
from qexport.layers import Kind
from qexport.runtimes.qnnpack_library import import_torch
from qexport.runtimes.qnnpack_program import Program
from qexport.runtimes.runner import KernelTime, ProfiledRun

_CALL = "forward"
"""Name of the event of a part's call, and of the whole."""
_CHAIN, _CHAIN_RUNS = 200, 20
_LOG_LEVEL = "KINETO_LOG_LEVEL"
_KINDS: dict[str, Kind] = {
    "quantized::conv2d": "convolution",
    "quantized::conv2d_relu": "convolution",
    "aten::conv2d": "convolution",
    "aten::_convolution": "convolution",
    "quantized::linear": "linear",
    "quantized::linear_relu": "linear",
    "aten::linear": "linear",
    "aten::max_pool2d": "pooling",
    "aten::avg_pool2d": "pooling",
    "aten::adaptive_avg_pool2d": "pooling",
    "aten::mean": "pooling",
    "aten::upsample_nearest2d": "resize",
    "aten::upsample_bilinear2d": "resize",
    "aten::cat": "concatenation",
    "torchvision::roi_align": "roi_align",
    "torchvision::nms": "nms",
    **dict.fromkeys(
        (
            "aten::relu",
            "aten::relu6",
            "aten::hardtanh",
            "aten::clamp",
            "aten::hardswish",
            "aten::hardsigmoid",
        ),
        "activation",
    ),
    **dict.fromkeys(("aten::sigmoid", "aten::silu", "aten::gelu", "aten::leaky_relu"), "activation"),
    **dict.fromkeys(
        (
            "aten::quantize_per_tensor",
            "aten::dequantize",
            "aten::permute",
            "aten::reshape",
            "aten::contiguous",
        ),
        "reformat",
    ),
    **dict.fromkeys(
        (
            "quantized::add",
            "quantized::add_out",
            "quantized::add_relu_out",
            "quantized::mul",
            "quantized::mul_relu",
        ),
        "elementwise",
    ),
    **dict.fromkeys(("aten::add", "aten::sub", "aten::mul", "aten::div"), "elementwise"),
}


@dataclass(frozen=True, slots=True)
class TimedOperator:
    """An operator of one run."""

    name: str
    """`backbone.body.conv1/quantized::conv2d_relu#0`."""
    part: str
    kind: str
    duration_ms: float


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """A run under the profiler."""

    whole_ms: float
    kernels: tuple[TimedOperator, ...]

    def profiled(self) -> ProfiledRun:
        """Return it as every runtime gives it."""
        kernels = (KernelTime(one.name, one.kind, one.duration_ms) for one in self.kernels)
        return ProfiledRun(self.whole_ms, tuple(kernels))


def record(module: Any, program: Program, given: Any) -> RecordedRun:
    """Run once under the profiler.

    Args:
        module: the file, loaded; it has run before.
        program: what it is made of.
        given: its input.

    Raises:
        TargetUnavailable: the profiler shows other parts or operators than the file has.
    """
    whole = _profiled(module, given)
    calls = _in_order(whole.cpu_children)
    found = [(call.name, tuple(event.name for event in _in_order(call.cpu_children))) for call in calls]
    wanted = [(_CALL, kinds) for kinds in program.operators()]
    if found != wanted:
        place = next(
            (at for at, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]),
            min(len(found), len(wanted)),
        )
        where = program.steps[place].path if place < len(program.steps) else "the end"
        torch = import_torch()
        raise TargetUnavailable(
            f"torch {torch.__version__} shows {len(found)} parts under its profiler, the file has {len(wanted)}; they "
            f"part at {where}: operators cannot be given to modules. Use a tested version: constraints.txt."
        )
    kernels = [
        TimedOperator(
            f"{step.outputs[0]}/{event.name}#{number}", step.path, event.name, event.cpu_time_total / 1e3
        )
        for step, call in zip(program.steps, calls, strict=True)
        for number, event in enumerate(_in_order(call.cpu_children))
    ]
    return RecordedRun(whole.cpu_time_total / 1e3, tuple(kernels))


def kind_of_operator(name: str) -> Kind:
    """Return the kind of work that an operator does."""
    return _KINDS.get(name, "other")


def time_between_operators_ms() -> float:
    """Measure what passes between two operators while the profiler is at work, ms: its own time, and the interpreter's.

    Measured on a chain of operators on one number, which have no other time.
    """
    torch = import_torch()

    class Chain(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, value: Any) -> Any:
            for _ in range(_CHAIN):
                value = torch.sin(value)
            return value

    given = torch.zeros(1)
    chain = torch.jit.trace(Chain(), (given,), check_trace=False)
    chain(given)
    runs = [_profiled(chain, given) for _ in range(_CHAIN_RUNS)]
    return float(
        median(
            (run.cpu_time_total - sum(one.cpu_time_total for one in run.cpu_children)) / _CHAIN
            for run in runs
        )
        / 1e3
    )


def _profiled(module: Any, given: Any) -> Any:
    """Return the event of a whole run."""
    torch = import_torch()
    with _silent(), torch.autograd.profiler.profile(use_kineto=False) as profile:
        module(given)
    wholes = [event for event in profile.function_events if event.name == _CALL and event.cpu_parent is None]
    if len(wholes) != 1:
        raise TargetUnavailable(
            f"torch {torch.__version__} shows {len(wholes)} runs under its profiler where there was one. Use a tested "
            "version: constraints.txt."
        )
    return wholes[0]


def _in_order(events: Sequence[Any]) -> list[Any]:
    return sorted(events, key=lambda event: event.time_range.start)


@contextmanager
def _silent() -> Iterator[None]:
    """Let the profiler's library say nothing on standard error of GPUs that it looks for."""
    before = os.environ.get(_LOG_LEVEL)
    os.environ[_LOG_LEVEL] = "99"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_LOG_LEVEL]
        else:
            os.environ[_LOG_LEVEL] = before
