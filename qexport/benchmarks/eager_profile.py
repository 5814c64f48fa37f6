"""The detector as its user runs it today, PyTorch eager: the whole, and the own time of every module.

A module's own time is the time inside it less the time inside its children, taken by forward hooks. To set
it beside an artifact, every call is given to one of the artifact's paths: a BatchNorm or a ReLU that the
artifact has fused counts for the layer whose output it takes.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import Self

Call = tuple[str, int]
"""Module path, and which call of that module in one run, from 0."""

ROOT_ROW = "detector"
"""Row of what the detector does outside all of its modules."""
PREPROCESS_ROW = "preprocess"
_EAGER_ONLY = {
    "": ROOT_ROW,
    "transform": PREPROCESS_ROW,
    "rpn": "rpn.proposals",
    "rpn.anchor_generator": "rpn.proposals",
    "roi_heads": "roi_heads.detections",
}
"""Modules that the static form replaces, and the path of what replaces them."""


def image_of(frame: NDArray[np.uint8]) -> Tensor:
    """Return (3, H, W) float32 in 0..1 for a (H, W, 3) uint8 frame, as torchvision's `to_tensor` makes it."""
    return torch.from_numpy(frame).permute(2, 0, 1).contiguous().float().div(255)


def infer_eager(detector: nn.Module, frame: NDArray[np.uint8]) -> dict[str, Tensor]:
    """Detect on one frame, the way torchvision documents it; returns `boxes`, `labels`, `scores`."""
    with torch.inference_mode():
        found: dict[str, Tensor] = detector([image_of(frame)])[0]
    return found


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch compute with that many threads inside the block; afterwards as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def profile_eager(
    detector: nn.Module,
    frame: NDArray[np.uint8],
    rows: Collection[str],
    *,
    warmup: int,
    runs: int,
    on_run: Callable[[], None],
) -> dict[str, float]:
    """Time every module of the detector.

    Args:
        detector: torchvision's own, in eval mode.
        frame: (H, W, 3) uint8 RGB.
        rows: the artifact's paths.
        warmup: runs that are not counted.
        runs: runs that are.
        on_run: called after each counted run.

    Returns:
        By row, the median over the runs of the summed own time, ms. Rows beyond `rows` are modules that the
        artifact has nothing for; `detector` is the detector's own code.
    """
    row_of = assign_rows(detector, lambda: detector([image_of(frame)]), rows)
    by_run: list[dict[str, float]] = []
    with ModuleClock(detector) as clock, torch.inference_mode():
        for number in range(warmup + runs):
            start = perf_counter()
            image = image_of(frame)
            own: defaultdict[str, float] = defaultdict(float)
            own[PREPROCESS_ROW] = (perf_counter() - start) * 1e3
            for call, duration_ms in clock.time(lambda image=image: detector([image])).items():  # type: ignore[misc]
                own[row_of[call]] += duration_ms
            if number >= warmup:
                by_run.append(own)
                on_run()
    return {row: median(own.get(row, 0.0) for own in by_run) for row in by_run[0]}


@dataclass(slots=True)
class _Open:
    """A call that has begun and not ended."""

    call: Call
    entered: float
    """When its first hook began, seconds."""
    started: float
    """When its first hook was done and the module's code began."""
    children: float = 0.0
    """Seconds inside its children, their hooks included."""


class ModuleClock:
    """Times every module call by hooks, less the calls inside it and less the hooks. A context manager."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._open: list[_Open] = []
        self._calls: defaultdict[str, int] = defaultdict(int)
        self._own_ms: dict[Call, float] = {}

    def __enter__(self) -> Self:
        for path, module in self._root.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._before(path)))
            self._handles.append(module.register_forward_hook(self._after))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def time(self, run: Callable[[], object]) -> dict[Call, float]:
        """Run once; return the own time of every module call, ms, in order of their ends."""
        self._open.clear()
        self._calls.clear()
        self._own_ms = {}
        run()
        return self._own_ms

    def _before(self, path: str) -> Callable[[nn.Module, object], None]:
        def begin(_module: nn.Module, _inputs: object) -> None:
            entered = perf_counter()
            call = (path, self._calls[path])
            self._calls[path] += 1
            self._open.append(_Open(call, entered, perf_counter()))

        return begin

    def _after(self, _module: nn.Module, _inputs: object, _output: object) -> None:
        ended = perf_counter()
        own = self._open.pop()
        self._own_ms[own.call] = (ended - own.started - own.children) * 1e3
        if self._open:
            self._open[-1].children += perf_counter() - own.entered


def assign_rows(root: nn.Module, run: Callable[[], object], rows: Collection[str]) -> dict[Call, str]:
    """Run once and give every module call to a row.

    A path that is a row keeps its own; what the static form replaces goes to its replacement. Any other
    module without children (a fused BatchNorm or ReLU) goes to the row that made its input: that of the
    module that returned this tensor, or, where code between modules made or changed it, that of the nearest
    module around. Any other container goes to the last row inside it.

    Args:
        root: the detector.
        run: runs it; not under inference mode, whose tensors do not say whether they were changed.
        rows: the paths to give calls to.
    """
    trace = _RowTrace(rows)
    with torch.no_grad(), trace.hooks_on(root):
        run()
    return trace.row_of


class _RowTrace:
    """One run, watched: which tensor comes from which row."""

    def __init__(self, rows: Collection[str]) -> None:
        self.row_of: dict[Call, str] = {}
        self._rows = frozenset(rows)
        self._calls: defaultdict[str, int] = defaultdict(int)
        self._open: list[Call] = []
        self._last = ROOT_ROW
        # By identity: a weak reference that tells an identity used anew, the tensor's version, its row.
        self._made: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}

    @contextmanager
    def hooks_on(self, root: nn.Module) -> Iterator[None]:
        handles = []
        for path, module in root.named_modules():
            leaf = next(module.children(), None) is None
            handles.append(module.register_forward_pre_hook(self._before(path, leaf)))
            handles.append(module.register_forward_hook(self._after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, path: str, leaf: bool) -> Callable[[nn.Module, tuple[object, ...]], None]:
        def begin(_module: nn.Module, inputs: tuple[object, ...]) -> None:
            call = (path, self._calls[path])
            self._calls[path] += 1
            self._open.append(call)
            own = self._own_row(path)
            if own is None and leaf:
                own = self._maker(inputs[0] if inputs else None) or self._around()
            if own is not None:
                self.row_of[call] = own

        return begin

    def _after(self, _module: nn.Module, _inputs: object, output: object) -> None:
        call = self._open.pop()
        row = self.row_of.setdefault(call, self._last)  # set already, but for a container without a row
        self._last = row
        if isinstance(output, Tensor):
            self._made[id(output)] = (weakref.ref(output), output._version, row)

    def _own_row(self, path: str) -> str | None:
        return path if path in self._rows else _EAGER_ONLY.get(path)

    def _maker(self, value: object) -> str | None:
        if not isinstance(value, Tensor) or id(value) not in self._made:
            return None
        made, version, row = self._made[id(value)]
        return row if made() is value and version == value._version else None

    def _around(self) -> str:
        for path, _ in reversed(self._open[:-1]):
            row = self._own_row(path)
            if row is not None and path:
                return row
        return self._last
