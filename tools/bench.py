"""Measure an artifact beside what a user would run today for the same detector.

    python tools/bench.py                                             the demo detector
    python tools/bench.py --run runs/my-detector                      a finished run of `qexport run`
    python tools/bench.py --model model.py:build --weights w.pt --data dataset

All take turns on the same frames, frame in to boxes out: PyTorch eager, torchvision's own ONNX export in ONNX
Runtime, ONNX Runtime's `quantize_static` of that export, and our artifacts: ONNX in int8, TFLite in int8 and in
float32, ExecuTorch in int8. QNNPACK's file takes part in sizes, mAP and the comparison of every target with every
other, not in the turns: its kernels are for Arm. Prints what it finds and writes it to OUT/bench.md and
OUT/bench.json.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path

import msgspec
import numpy as np
from bench_also import measure_also
from bench_cost import measure_cost
from bench_report import (
    DENSE,
    EAGER,
    FP32_TFLITE,
    OURS,
    OURS_EXECUTORCH,
    OURS_TFLITE,
    RECIPE,
    REFERENCE,
    TORCHVISION,
    Bench,
    Profiled,
    Size,
    Turns,
    as_markdown,
)
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from torch import nn

from qexport import pipeline
from qexport.artifact import Artifact
from qexport.benchmarks import detect
from qexport.benchmarks.accuracy import evaluate
from qexport.benchmarks.eager_profile import infer_eager, profile_eager, torch_threads
from qexport.benchmarks.latency import SETTLE_S, interleave, profile_artifact, summarise
from qexport.benchmarks.latency_rows import build_rows
from qexport.benchmarks.machine import describe_machine
from qexport.benchmarks.peers import Peer, export_torchvision, quantize_recipe, ratio_of_medians
from qexport.detections import Detections
from qexport.detectors.demo.scenes import write_scenes
from qexport.errors import QexportError
from qexport.files import sha256_json, write_bytes, write_json
from qexport.layers import Layer
from qexport.pipeline import Work
from qexport.results import AccuracyReport
from qexport.runtimes.executorch import ExecutorchRunner
from qexport.runtimes.onnx import OnnxRunner
from qexport.runtimes.qnnpack import QnnpackRunner
from qexport.runtimes.runner import ProfilingRunner
from qexport.runtimes.tflite import TfliteRunner
from qexport.settings import Settings
from qexport.versions import package_versions

TARGET, TFLITE, EXECUTORCH, QNNPACK = "onnx", "tflite", "executorch", "qnnpack"
RUNNERS: dict[str, type[ProfilingRunner]] = {
    TARGET: OnnxRunner,
    TFLITE: TfliteRunner,
    EXECUTORCH: ExecutorchRunner,
    QNNPACK: QnnpackRunner,
}
ARTIFACTS = {
    OURS: (TARGET, "int8"),
    OURS_TFLITE: (TFLITE, "int8"),
    FP32_TFLITE: (TFLITE, "fp32"),
    OURS_EXECUTORCH: (EXECUTORCH, "int8"),
}
"""Target and role of each contender of ours in the turns."""

Frame = NDArray[np.uint8]


def main() -> int:
    """Measure; return the exit code."""
    options = _options()
    console = Console(stderr=True)
    try:
        work = _work(options)
        peers = _peers(work, options.out, console)
        bench = _measure(work, peers, options, console)
        accuracy = _accuracy(work, peers, console) if options.accuracy else None
        bench = msgspec.structs.replace(bench, accuracy=accuracy)
        write_json(options.out / "bench.json", bench)
        text = as_markdown(bench)
        write_bytes(options.out / "bench.md", text.encode())
    except QexportError as error:
        console.print(f"bench: {error}", style="red", markup=False)
        return error.exit_code
    sys.stdout.write(text)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="a finished run; its detector, data and artifact are used")
    parser.add_argument("--model", help="as for `qexport run`; default: the demo detector")
    parser.add_argument("--weights", help="as for `qexport run`")
    parser.add_argument("--data", help="as for `qexport run`")
    parser.add_argument("--runs", type=int, default=30, help="counted rounds (default: 30)")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before those (default: 3)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--accuracy", action="store_true", help="also measure the mAP of every contender")
    parser.add_argument(
        "--also",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="further detectors, torchvision:NAME, seeded weights",
    )
    parser.add_argument("--also-runs", type=int, default=5, help="counted rounds of those (default: 5)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="default: runs/bench")
    options = parser.parse_args()
    if options.run and (options.model or options.weights or options.data):
        parser.error("--run names detector and data already; leave --model, --weights and --data out")
    if bool(options.model) != bool(options.data):
        parser.error("--model and --data belong together")
    if options.runs < 1 or options.warmup < 0 or min(options.threads) < 1:
        parser.error("--runs and --threads are at least 1, --warmup at least 0")
    return options


def _work(options: argparse.Namespace) -> Work:
    """Return a run that holds an artifact, made now where it is not there."""
    if options.run:
        work = pipeline.resume(options.run)
        return _exported(work)
    model, data = options.model, options.data
    if model is None:
        model, data = "demo", str(options.out / "scenes")
        write_scenes(Path(data))
    work = pipeline.start(options.out / "run", Settings(model=model, weights=options.weights, data=data))
    pipeline.calibrate(work)
    return _exported(work)


def _exported(work: Work) -> Work:
    for target in RUNNERS:
        pipeline.export(work, target)
    return work


def _peers(work: Work, out: Path, console: Console) -> dict[str, Path]:
    """Return the peers' files, made on the first call; the folder's name says what they were made from."""
    subject = work.subject
    samples = subject.calibration_samples()
    origin = sha256_json(
        {
            "model": work.settings.model,
            "weights": work.folder.record.weights_sha256,
            "frame_px": subject.frame_px,
            "images": [subject.calibration.sha256, [sample.image_id for sample in samples]],
            "versions": package_versions("torch", "torchvision", "onnxruntime"),
        }
    )
    folder = out / f"peers-{origin[:12]}"
    files = {TORCHVISION: folder / "torchvision.onnx", RECIPE: folder / "quantize_static.onnx"}
    if not files[TORCHVISION].is_file():
        with console.status("exporting with torchvision's own exporter"):
            export_torchvision(subject.loaded.module, subject.frame_px, files[TORCHVISION])
    if not files[RECIPE].is_file():
        with console.status(f"quantize_static with {len(samples)} images"):
            quantize_recipe(files[TORCHVISION], subject.frames(samples), files[RECIPE])
    return files


def _measure(work: Work, peers: Mapping[str, Path], options: argparse.Namespace, console: Console) -> Bench:
    crossed = pipeline.cross(work, tuple(RUNNERS))
    parity = [gate for target in RUNNERS for gate in pipeline.compare(work, target).gates]
    artifact = work.artifact(TARGET)[0]
    frames = [np.array(frame) for frame in work.subject.frames(work.subject.parity_samples())]
    turns = tuple(
        _take_turns(work, peers, frames, threads=threads, options=options, console=console)
        for threads in options.threads
    )
    return Bench(
        detector=f"{work.subject.loaded.backbone}, {work.settings.model}",
        frame_px=work.subject.frame_px,
        dataset=work.subject.evaluation.name,
        frames=len(frames),
        artifact_sha256=artifact.sha256,
        parity=(*parity, *crossed.gates),
        machine=describe_machine(),
        turns=turns,
        sizes=(
            *(Size(name=name, bytes=path.stat().st_size) for name, path in peers.items()),
            *(_size(work.artifact(target)[0]) for target in RUNNERS),
        ),
        crossed=crossed,
        accuracy=None,
        cost=measure_cost(work, TARGET),
        also=tuple(
            measure_also(
                model,
                frames,
                threads=options.threads,
                rounds=options.also_runs,
                folder=options.out / "also" / model.rpartition(":")[2],
            )
            for model in options.also
        ),
    )


def _size(artifact: Artifact) -> Size:
    return Size(
        name=f"qexport {artifact.target}",
        bytes=artifact.file("int8").size_bytes,
        fp32_bytes=artifact.file("fp32").size_bytes,
    )


def _take_turns(
    work: Work,
    peers: Mapping[str, Path],
    frames: Sequence[Frame],
    *,
    threads: int,
    options: argparse.Namespace,
    console: Console,
) -> Turns:
    """Run every contender in turns; in each round all see the same frame, in the next round the next."""
    module = work.subject.loaded.module
    with ExitStack() as stack:
        stack.enter_context(torch_threads(threads))
        ours = {
            name: stack.enter_context(RUNNERS[target](work.path / target, role=role, threads=threads))
            for name, (target, role) in ARTIFACTS.items()
        }
        infer: dict[str, Callable[[Frame], object]] = {
            EAGER: lambda frame: infer_eager(module, frame),
            **{name: Peer(path, threads=threads).infer for name, path in peers.items()},
            **{name: runner.infer for name, runner in ours.items()},
        }
        progress = stack.enter_context(Progress(console=console, transient=True))
        task = progress.add_task(f"{threads} threads", total=options.warmup + options.runs)
        times = interleave(
            {name: _on_next(run, frames) for name, run in infer.items()},
            warmup=options.warmup,
            runs=options.runs,
            settle_s=SETTLE_S,
            on_run=lambda: progress.advance(task),
        )
        layers = pipeline.inspect(work).layers
        profiles = {
            name: _profile(ours[name], module, frames[0], layers, options)
            for name, (_, role) in ARTIFACTS.items()
            if role == "int8"
        }
    return Turns(
        threads=threads,
        stats={name: summarise(values) for name, values in times.items()},
        faster_than_eager={name: ratio_of_medians(times[EAGER], times[name]) for name in times},
        ours_faster_than={name: ratio_of_medians(times[name], times[OURS]) for name in times},
        times_ms=times,
        profiles=profiles,
    )


def _profile(
    runner: ProfilingRunner,
    module: nn.Module,
    frame: Frame,
    layers: Sequence[Layer],
    options: argparse.Namespace,
) -> Profiled:
    counted = {"warmup": options.warmup, "runs": options.runs}
    profile = profile_artifact(runner, frame, layers, **counted)
    eager = profile_eager(module, frame, list(profile.paths), **counted, on_run=lambda: None)
    others: Counter[str] = Counter()
    for cost in profile.paths.values():
        others.update({name: ms for name, ms in cost.kernels.items() if runner.kind_of(name) not in DENSE})
    return Profiled(
        other_kernels_ms=dict(others),
        layers=build_rows(profile.paths, layers, runner.kind_of, eager=eager, fp32=None),
        accounted_share=profile.accounted_share,
    )


def _on_next(infer: Callable[[Frame], object], frames: Sequence[Frame]) -> Callable[[], object]:
    """Return what runs on the next frame each time that it is called."""
    following = cycle(frames)
    return lambda: infer(next(following))


def _accuracy(work: Work, peers: Mapping[str, Path], console: Console) -> AccuracyReport:
    """Measure the mAP of every contender on the evaluation split."""
    dataset = work.subject.evaluation
    found: dict[str, list[Detections]] = {}
    with ExitStack() as stack:
        sources: dict[str, detect.Detect] = {
            EAGER: stack.enter_context(detect.eager(work.subject.loaded)),
            REFERENCE: stack.enter_context(detect.reference(work.quantized)),
            **{name: Peer(path, threads=1).infer for name, path in peers.items()},
            **{
                f"qexport {target}": stack.enter_context(runner(work.path / target)).infer
                for target, runner in RUNNERS.items()
            },
        }
        progress = stack.enter_context(Progress(console=console, transient=True))
        for name, source in sources.items():
            task = progress.add_task(f"mAP of {name}", total=len(dataset.samples))
            images = detect.over(
                dataset,
                work.subject.frame_px,
                source,
                on_image=lambda task=task: progress.advance(task),  # type: ignore[misc]
            )
            found[name] = [detect.to_arrays(image) for image in images]
    return evaluate(dataset, found, seed=work.settings.seed, max_drop=work.settings.max_drop)


if __name__ == "__main__":
    raise SystemExit(main())
