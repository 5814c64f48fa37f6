"""Run the golden frames of a bundle on this machine: every value the same, or where and by how much it differs.

Needs no torch: this is what runs on a board.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

import qexport
from qexport.artifact import TensorSite
from qexport.bundle import Bundle, GoldenFrame
from qexport.detecting import open_runner
from qexport.errors import BundleError
from qexport.golden import Arrays, by_key, digest, load_arrays, load_frame, tensors_of
from qexport.layers import Layer
from qexport.runtimes.runner import OUTPUTS, Runner
from qexport.target import find_target
from qexport.versions import package_versions

FORMAT_VERSION = 1
_DIGEST_ALONE = "differs; of this frame the bundle has digests alone"
Verdict = Literal["identical", "within tolerance", "differs"]


class Difference(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One tensor that is not what the workstation computed."""

    name: str
    """`boxes`, `scores`, `labels` or `count`; of an inner tensor the row's key, `PATH@CALL/PORT`."""
    stage: str
    """Of the detector; empty for an output."""
    values: int | None = None
    """How many were compared; None where the bundle has the digest alone."""
    differing: int | None = None
    largest: float | None = None
    """The largest difference: quantization steps of an integer tensor, the value's own unit of a float one. None where
    no difference is finite, or nothing could be compared."""
    problem: str = ""
    """Why single values were not compared: another shape or type, or a digest alone."""


class FrameVerdict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one golden frame came to."""

    source: str
    """The image that it was made of."""
    outputs: tuple[Difference, ...]
    """Outputs that differ."""
    layers_compared: int
    layers: tuple[Difference, ...]
    """Inner tensors that differ, in the order of execution: the first is where it begins."""
    detections: int
    """How many this machine finds."""
    golden_detections: int


class VerifyReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `qexport verify` finds."""

    kind: Literal["qexport-verify"] = "qexport-verify"
    format_version: int = FORMAT_VERSION
    qexport_version: str
    target: str
    artifact_sha256: str
    bundle_sha256: str
    versions: dict[str, str]
    """Packages of this machine, and what it is."""
    golden_versions: dict[str, str]
    """Those that computed what it is held against."""
    threads: int
    tolerance_steps: int | None
    """None: every bit has to be the same."""
    verdict: Verdict
    frames: tuple[FrameVerdict, ...]


def verify(
    bundle: Bundle,
    *,
    threads: int = 1,
    tolerance_steps: int | None = None,
    on_frame: Callable[[], None] = lambda: None,
) -> VerifyReport:
    """Run every golden frame and hold its outputs and inner tensors against the workstation's.

    Args:
        bundle: read and checked.
        threads: of the runtime.
        tolerance_steps: None asks for every bit. A number passes what differs by no more than so many quantization
            steps in every inner tensor that the bundle has whole, and in the outputs gives as many detections with the
            same labels.
        on_frame: called after each frame.

    Raises:
        BundleError: a golden file cannot be read, or is of another artifact.
        ArtifactError: the runtime does not accept the artifact.
        TargetUnavailable: the runtime is not installed.
    """
    layers = bundle.layers()
    with open_runner(bundle.artifact_folder, threads) as runner:
        frames, passed = [], True
        for golden in bundle.manifest.golden:
            outputs = load_arrays(bundle.folder / golden.outputs)
            verdict, here = _verify_frame(runner, bundle, golden, outputs, layers)
            frames.append(verdict)
            passed = passed and _tolerated(verdict, outputs, here, tolerance_steps)
            on_frame()
    same = not any(frame.outputs or frame.layers for frame in frames)
    return VerifyReport(
        qexport_version=qexport.__version__,
        target=bundle.manifest.target,
        artifact_sha256=bundle.manifest.artifact_sha256,
        bundle_sha256=bundle.sha256,
        versions=versions_here(bundle.manifest.target),
        golden_versions=bundle.manifest.versions,
        threads=threads,
        tolerance_steps=tolerance_steps,
        verdict="identical" if same else "within tolerance" if passed else "differs",
        frames=tuple(frames),
    )


def describe(report: VerifyReport) -> list[str]:
    """Return what was found as sentences, the verdict first."""
    values = sum(frame.layers_compared for frame in report.frames)
    runtime = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    lines = [
        f"{report.verdict}: {len(report.frames)} golden frames, {values} inner tensors and "
        f"{len(OUTPUTS) * len(report.frames)} outputs; {report.target} with {report.threads} thread"
        f"{'' if report.threads == 1 else 's'} on {runtime}"
    ]
    for frame in report.frames:
        lines += [f"  {frame.source}: {_text(output)}" for output in frame.outputs]
        if frame.layers:
            first = frame.layers[0]
            lines.append(
                f"  {frame.source}: {len(frame.layers)} of {frame.layers_compared} inner tensors differ, first in the "
                f"order of execution {_text(first)}"
            )
            lines += [f"    {_text(layer)}" for layer in frame.layers[1:]]
        if frame.detections != frame.golden_detections:
            lines.append(
                f"  {frame.source}: {frame.detections} detections, golden are {frame.golden_detections}"
            )
    if report.verdict != "identical":
        had = ", ".join(f"{name} {version}" for name, version in report.golden_versions.items())
        lines.append(f"  the golden tensors are from {had}")
    return lines


def summary(report: VerifyReport) -> str:
    """Return where it begins to differ and what may be done, in one sentence."""
    for frame in report.frames:
        found = (*frame.layers, *frame.outputs)
        if found:
            return (
                f"{frame.source}: not as on the workstation, first at {_text(found[0])}. Another version of the "
                "runtime or another processor may round otherwise; --tolerance-steps says how much would do."
            )
    return report.verdict


def detections_kept(report: VerifyReport) -> bool:
    """Say whether every golden frame gives as many detections with the same labels, bit for bit or not."""
    changed = {output.name for frame in report.frames for output in frame.outputs}
    return not changed & {"count", "labels"}


def versions_here(target: str) -> dict[str, str]:
    """Return what this machine runs a target with."""
    modules = [
        name.partition(".")[0] for need in find_target(target).needs["run"] for name in need.split("|")
    ]
    return {
        "machine": platform.machine(),
        "python": platform.python_version(),
        **package_versions(*modules, "numpy"),
    }


def compare_arrays(
    name: str, *, golden: NDArray[np.generic], actual: NDArray[np.generic], stage: str = ""
) -> Difference | None:
    """Return in what two tensors differ; None where every bit is the same."""
    if golden.dtype != actual.dtype or golden.shape != actual.shape:
        problem = f"{actual.dtype} of shape {actual.shape}, expected {golden.dtype} of shape {golden.shape}"
        return Difference(name=name, stage=stage, problem=problem)
    if golden.tobytes() == actual.tobytes():
        return None
    if golden.dtype.kind in "iub":
        gap = np.abs(actual.astype(np.int64) - golden.astype(np.int64)).astype(np.float64)
        differing = int(np.count_nonzero(gap))
    else:
        gap = np.abs(actual.astype(np.float64) - golden.astype(np.float64))
        # By their bits: two NaN may be the same, and 0 and -0 are not.
        bits = np.dtype(f"u{golden.dtype.itemsize}")
        differing = int(np.count_nonzero(np.asarray(actual).view(bits) != np.asarray(golden).view(bits)))
    finite = gap[np.isfinite(gap)]
    return Difference(
        name=name,
        stage=stage,
        values=int(golden.size),
        differing=differing,
        largest=float(finite.max()) if finite.size else None,
    )


def _verify_frame(
    runner: Runner, bundle: Bundle, golden: GoldenFrame, outputs: Arrays, layers: Sequence[Layer]
) -> tuple[FrameVerdict, Mapping[str, NDArray[np.generic]]]:
    """Return the verdict on one frame, and the outputs of this machine."""
    if set(outputs) != set(OUTPUTS):
        raise BundleError(
            f"{bundle.folder / golden.outputs}: holds {', '.join(outputs)}, expected {', '.join(OUTPUTS)}. "
            "Make the bundle again."
        )
    array = runner.input_of(load_frame(bundle.folder / golden.frame))
    here = runner.run(array)
    sites = runner.artifact.sites
    inner = by_key(sites, runner.run(array, tensors_of(sites)))
    if set(inner) != set(golden.digests):
        odd = sorted(set(inner) ^ set(golden.digests))
        raise BundleError(
            f"{bundle.folder}: golden tensors and artifact do not agree on {odd[0]}. Make it again."
        )
    found = (compare_arrays(name, golden=outputs[name], actual=here[name]) for name in OUTPUTS)
    verdict = FrameVerdict(
        source=golden.source,
        outputs=tuple(difference for difference in found if difference is not None),
        layers_compared=len(inner),
        layers=tuple(_inner_differences(bundle, golden, inner, sites, layers)),
        detections=len(runner.detections(here)),
        golden_detections=golden.detections,
    )
    return verdict, here


def _inner_differences(
    bundle: Bundle, golden: GoldenFrame, inner: Arrays, sites: Sequence[TensorSite], layers: Sequence[Layer]
) -> list[Difference]:
    changed = [key for key, tensor in inner.items() if digest(tensor) != golden.digests[key]]
    if not changed:
        return []
    whole = load_arrays(bundle.folder / golden.sites) if golden.sites is not None else {}
    of_call = {f"{layer.path}@{layer.call}": layer for layer in reversed(layers)}
    place = {site.key: number for number, site in enumerate(sites)}
    differences = []
    for key in changed:
        layer = of_call.get(_call_of(key))
        stage = layer.stage if layer is not None else ""
        found = Difference(name=key, stage=stage, problem=_DIGEST_ALONE)
        if key in whole:
            found = compare_arrays(key, golden=whole[key], actual=inner[key], stage=stage) or found
        order = (layer.order if layer is not None else len(layers), place[key])
        differences.append((order, found))
    return [found for _, found in sorted(differences, key=lambda each: each[0])]


def _call_of(key: str) -> str:
    """Return the call of a module, `PATH@CALL`, in a row's key."""
    return key.rpartition("/")[0]


def _tolerated(
    frame: FrameVerdict,
    outputs: Mapping[str, NDArray[np.generic]],
    here: Mapping[str, NDArray[np.generic]],
    steps: int | None,
) -> bool:
    if steps is None:
        return not (frame.outputs or frame.layers)
    judged = [layer for layer in frame.layers if layer.problem != _DIGEST_ALONE]
    return (
        all(layer.largest is not None and layer.largest <= steps for layer in judged)
        and np.array_equal(outputs["count"], here["count"])
        and np.array_equal(outputs["labels"], here["labels"])
    )


def _text(difference: Difference) -> str:
    where = f" ({difference.stage})" if difference.stage else ""
    if difference.values is None:
        return f"{difference.name}{where}: {difference.problem}"
    unit = "steps at most" if difference.stage else "at most"
    largest = "not finite" if difference.largest is None else f"{difference.largest:g} {unit}"
    return f"{difference.name}{where}: {difference.differing} of {difference.values} values, {largest}"
