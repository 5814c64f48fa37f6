"""Measure split adaptive average pools beside torch's own, in torch and in ONNX Runtime.

    python tools/bench_pool.py                  the cases of this file, one thread
    python tools/bench_pool.py --seconds 2      longer turns

Both forms take turns in one process. In ONNX Runtime torch's own is what torch.onnx makes of it. Exits with 1
where the split form is slower by more than the machine's noise.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec
import onnx_ir as ir
import torch
from torch import Tensor, nn

from qexport.plugins.adaptive_avg_pool import ONNX_RUNTIME, TENSORRT, Pair, plan, regular_window
from qexport.plugins.adaptive_avg_pool_module import SplitAdaptiveAvgPool2d
from qexport.plugins.onnx.split_average_pool import TRANSLATION, split_average_pools
from qexport.runtimes.onnx_session import make_session

OPSET = 18
NOISE, NOISE_MS = 1.1, 0.002
"""A form counts as slower above this ratio, by more than this: calling a module from Python takes 0.002 ms."""
_UNROLLED = 150
"""Elements of a window up to which torch.onnx unrolls an irregular pool within seconds; 191 x 115 takes hours."""


@dataclass(frozen=True, slots=True)
class PoolCase:
    """A pool as a detector has it."""

    shape: tuple[int, int, int, int]
    output_size: Pair


CASES = (
    PoolCase((1, 3, 1333, 800), (1, 1)),
    PoolCase((1, 3, 1333, 800), (7, 7)),
    PoolCase((1, 3, 1333, 800), (10, 10)),
    PoolCase((1, 32, 400, 400), (1, 1)),
    PoolCase((1, 64, 10, 10), (7, 7)),
    PoolCase((1, 256, 50, 50), (7, 7)),
    PoolCase((1, 256, 50, 50), (10, 10)),
    PoolCase((1, 256, 50, 50), (1, 1)),
    PoolCase((1, 256, 13, 13), (6, 6)),
    PoolCase((1, 2048, 25, 42), (7, 7)),
    PoolCase((1, 2048, 25, 42), (1, 1)),
    PoolCase((1, 960, 20, 20), (1, 1)),
    PoolCase((100, 256, 14, 14), (7, 7)),
)


class PoolTime(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One pool in one runtime."""

    shape: tuple[int, int, int, int]
    output_size: Pair
    runtime: str
    form: str
    layers: int
    """Of the split form, in this runtime."""
    tensorrt_layers: int
    """Of the form that TensorRT is given."""
    own_ms: float | None
    """Median of torch's own; None where torch.onnx would unroll it into tens of thousands of nodes."""
    split_ms: float
    """Median of the split form."""

    @property
    def ratio(self) -> float | None:
        """How many times as long the split form takes."""
        return None if self.own_ms is None else self.split_ms / self.own_ms

    @property
    def slower(self) -> bool:
        """Whether the split form is slower by more than noise."""
        return (
            self.own_ms is not None
            and self.split_ms > NOISE * self.own_ms
            and self.split_ms > self.own_ms + NOISE_MS
        )


def main() -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="of each pool in each runtime (default: 0.5)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    times = measure_pools(options.seconds)
    sys.stdout.write("\n".join(pool_lines(times)) + "\n")
    return 1 if any(measured.slower for measured in times) else 0


def measure_pools(seconds: float, cases: tuple[PoolCase, ...] = CASES) -> list[PoolTime]:
    """Measure every case in torch and in ONNX Runtime, on one thread each.

    Args:
        seconds: for which the two forms of a case take turns in one runtime.
        cases: pools.
    """
    return [
        measured for case in cases for measured in (_in_torch(case, seconds), _in_onnx_runtime(case, seconds))
    ]


def pool_lines(times: list[PoolTime]) -> list[str]:
    """Return the section of the page."""
    lines = [
        "## Adaptive average pools, split",
        "",
        "Medians, one thread, in turns. Own: torch's pool; in ONNX Runtime, what torch.onnx makes of it.",
        "",
        "| map | output | runtime | form | layers | in TensorRT | own ms | split ms | split / own |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in times:
        shape, output = "x".join(map(str, row.shape)), "x".join(map(str, row.output_size))
        own, ratio = ("not exported", "") if row.own_ms is None else (f"{row.own_ms:.4f}", f"{row.ratio:.2f}")
        lines.append(
            f"| {shape} | {output} | {row.runtime} | {row.form} | {row.layers} | {row.tensorrt_layers} "
            f"| {own} | {row.split_ms:.4f} | {ratio} |"
        )
    slower = [row for row in times if row.slower]
    return [*lines, "", f"{len(slower)} of {len(times)} slower than torch's own."]


def _in_torch(case: PoolCase, seconds: float) -> PoolTime:
    own, split, x = (
        nn.AdaptiveAvgPool2d(case.output_size),
        SplitAdaptiveAvgPool2d(case.output_size),
        _map(case),
    )
    with torch.inference_mode():
        medians = _medians({"own": lambda: own(x), "split": lambda: split(x)}, seconds)
    return _time(case, "torch", split.plan(x).form, split.plan(x).layers, medians)


def _in_onnx_runtime(case: PoolCase, seconds: float) -> PoolTime:
    x = _map(case)
    split = _exported(case, x, split=True)
    done = split_average_pools(split, costs=ONNX_RUNTIME)
    models = {"split": split} | ({"own": _exported(case, x, split=False)} if _exportable(case) else {})
    runs = {name: _runner(model, x) for name, model in models.items()}
    return _time(case, "ONNX Runtime", done[0].form, done[0].layers, _medians(runs, seconds))


def _time(case: PoolCase, runtime: str, form: str, layers: int, medians: Mapping[str, float]) -> PoolTime:
    batch, channels, *_ = case.shape
    tensorrt = plan(case.shape[2:], case.output_size, costs=TENSORRT, maps=batch * channels)
    return PoolTime(
        shape=case.shape,
        output_size=case.output_size,
        runtime=runtime,
        form=form,
        layers=layers,
        tensorrt_layers=tensorrt.layers,
        own_ms=medians.get("own"),
        split_ms=medians["split"],
    )


def _exportable(case: PoolCase) -> bool:
    sizes = list(zip(case.shape[2:], case.output_size, strict=True))
    if all(regular_window(inputs, outputs) is not None for inputs, outputs in sizes):
        return True
    (height, rows), (width, columns) = sizes
    return (height // rows + 2) * (width // columns + 2) <= _UNROLLED


def _exported(case: PoolCase, x: Tensor, *, split: bool) -> ir.Model:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    module = nn.AdaptiveAvgPool2d(case.output_size).eval()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # deprecations inside torch.onnx
        program = torch.onnx.export(
            torch.export.export(module, (x,)),
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table=TRANSLATION if split else {},
            verbose=False,
        )
    assert program is not None
    return program.model


def _runner(model: ir.Model, x: Tensor) -> Callable[[], object]:
    session = make_session(ir.serde.serialize_model(model).SerializeToString())
    feeds = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feeds)


def _map(case: PoolCase) -> Tensor:
    return torch.rand(case.shape, generator=torch.Generator().manual_seed(0))


def _medians(runs: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Return the median of each, in ms; they take turns for `seconds`, ten times at least."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(taken.values()))) < 10:
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            taken[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in taken.items()}


if __name__ == "__main__":
    sys.exit(main())
