"""From what trtexec measured on a board to a LatencyProfile: layers of the engine to module paths.

Time belongs to modules as `runtimes.tensorrt_owners` says, as for an engine that is run here; that of layers which
name no module has a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from qexport.artifact import Artifact
from qexport.benchmarks.board import Board, machine_of, read_board, throttle_gate
from qexport.benchmarks.latency import ARTIFACT, GATE, summarise
from qexport.benchmarks.latency_rows import build_rows, order_of, sum_by_path
from qexport.benchmarks.trtexec import (
    LayerInfo,
    Profile,
    Times,
    check_same_engine,
    read_layer_info,
    read_profile,
    read_times,
    sort_files,
)
from qexport.errors import ArtifactError
from qexport.layers import Layer, Stage, stage_of
from qexport.results import Gate, LatencyProfile
from qexport.runtimes.runner import NOWHERE, KernelTime, ProfiledRun
from qexport.runtimes.tensorrt_layers import kind_of
from qexport.runtimes.tensorrt_owners import owners_of_layers, weighted_modules

MATCH_GATE = "layers found in the engine"
ROLE = "int8"
_WEIGHTED_STAGES: frozenset[Stage] = frozenset({"trunk", "fpn", "rpn_head", "box_head"})


@dataclass(frozen=True, slots=True)
class Measurement:
    """The four files of one measurement, read."""

    times: Times
    profile: Profile
    layers: LayerInfo
    board: Board


def read_measurement(paths: Sequence[Path]) -> Measurement:
    """Read the files that `deploy/jetson/measure.sh` wrote, given in any order.

    Raises:
        ArtifactError: one is missing, twice there, cut off, of no known kind, or of another engine than the rest.
    """
    files = sort_files(list(paths))
    measurement = Measurement(
        times=read_times(files["times"]),
        profile=read_profile(files["profile"]),
        layers=read_layer_info(files["layers"]),
        board=read_board(files["board"]),
    )
    check_same_engine(measurement.profile, measurement.layers)
    return measurement


def latency_profile(
    measurement: Measurement,
    *,
    artifact: Artifact,
    detector_layers: Sequence[Layer],
    min_accounted: float,
) -> LatencyProfile:
    """Return a board's measurement in the form of every other target's.

    Args:
        measurement: of one engine.
        artifact: that the engine was built from.
        detector_layers: the static detector's, for order, kinds and multiply-accumulates.
        min_accounted: smallest share of the whole that the layers must add up to, 0..1.

    Raises:
        ArtifactError: the engine was not built from this artifact, or every run belongs to the warm-up.
    """
    board = measurement.board
    check_artifact(measurement, artifact, detector_layers)
    warmup_ms = board.engine.warmup_ms if board.engine else 0.0
    counted = measurement.times.counted(warmup_ms)
    whole = summarise([run.latency_ms for run in counted])
    # The layers are profiled on the device alone, so copies are left out of what they must add up to.
    compute_ms = median(run.compute_ms for run in counted)
    paths = sum_by_path(
        [_run_of(measurement, compute_ms)], owners_of_layers(measurement.layers.layers), detector_layers
    )
    order = order_of(list(paths), detector_layers)
    accounted_ms = sum(cost.median_ms for cost in paths.values())
    unnamed_ms = paths[NOWHERE].median_ms if NOWHERE in paths else 0.0
    gates = [
        _accounted_gate(accounted_ms, unnamed_ms, compute_ms, min_accounted, artifact.target),
        _match_gate(measurement.layers, artifact, detector_layers),
        throttle_gate(board, artifact.target),
    ]
    return LatencyProfile(
        target=artifact.target,
        artifact_sha256=artifact.sha256,
        machine=machine_of(board),
        threads=1,
        warmup=len(measurement.times.runs) - len(counted),
        measured_at=board.after.at,
        whole={ARTIFACT: whole},
        fps=1000 / whole.p50_ms,
        layers=build_rows(
            {path: paths[path] for path in sorted(paths, key=order)},
            detector_layers,
            kind_of,
            eager=None,
            fp32=None,
        ),
        profiled_whole_ms=compute_ms,
        accounted_share=accounted_ms / compute_ms if compute_ms else 0.0,
        gates=tuple(gate for gate in gates if gate is not None),
    )


def _run_of(measurement: Measurement, compute_ms: float) -> ProfiledRun:
    """Return the medians of the layers as one run."""
    kernels = {layer.name: layer.kernel for layer in measurement.layers.layers}
    timed = (
        KernelTime(layer.name, kernels[layer.name], layer.median_ms) for layer in measurement.profile.layers
    )
    return ProfiledRun(compute_ms, tuple(timed))


def check_artifact(measurement: Measurement, artifact: Artifact, detector_layers: Sequence[Layer]) -> None:
    """Refuse an engine that was not built from the artifact.

    Raises:
        ArtifactError: names the file and what differs first.
    """
    path, engine = measurement.layers.path, measurement.board.engine
    if engine is not None:
        if engine.precision != ROLE:
            raise ArtifactError(
                f"{path.parent}: the {engine.precision} engine was measured; the report's latency is that of {ROLE}. "
                f"Measure again with --precision {ROLE}."
            )
        expected = artifact.file(ROLE)
        if engine.onnx_sha256 != expected.sha256:
            raise ArtifactError(
                f"{path.parent}: the engine was built from a file of SHA-256 {engine.onnx_sha256[:12]}..., the "
                f"artifact's {expected.name} has {expected.sha256[:12]}.... Copy this run's artifact to the board, "
                "build and measure again."
            )
    known = _known(artifact, detector_layers)
    found = [layer for layer in measurement.layers.layers if layer.modules]
    if not any(known.intersection(layer.modules) for layer in found):
        first = found[0].name if found else measurement.layers.layers[0].name
        raise ArtifactError(
            f"{path}: no layer names a module of this {artifact.target} artifact: the engine begins with {first!r}, "
            f"the artifact with {artifact.layers[0].path if artifact.layers else 'nothing'!r}. The engine is of "
            "another network, or was built without --profilingVerbosity=detailed."
        )
    for layer in found:
        strangers = [
            module
            for module in weighted_modules(layer)
            if module not in known and stage_of(module) in _WEIGHTED_STAGES
        ]
        if strangers:
            raise ArtifactError(
                f"{path}: layer {layer.name!r} computes {strangers[0]!r}, which this {artifact.target} artifact does "
                "not have. The engine is of another detector: copy this run's artifact to the board, build and "
                "measure again."
            )


def _known(artifact: Artifact, detector_layers: Sequence[Layer]) -> frozenset[str]:
    return frozenset([*(layer.path for layer in artifact.layers), *(layer.path for layer in detector_layers)])


def _accounted_gate(layers_ms: float, unnamed_ms: float, whole_ms: float, limit: float, target: str) -> Gate:
    share = layers_ms / whole_ms if whole_ms else 0.0
    unnamed = f", {unnamed_ms:.3f} ms of them in layers that name no module" if unnamed_ms else ""
    return Gate(
        name=GATE,
        passed=share >= limit,
        measured=f"{100 * share:.1f} %: layers {layers_ms:.3f} ms, profiled in a run of their own{unnamed}, "
        f"of {whole_ms:.3f} ms, gap {whole_ms - layers_ms:+.3f} ms",
        limit=f"at least {100 * limit:.1f} %",
        subject=target,
    )


def _match_gate(info: LayerInfo, artifact: Artifact, detector_layers: Sequence[Layer]) -> Gate:
    """Return the gate that no convolution or linear of the artifact is missing from the engine's layers."""
    found = {module for layer in info.layers for module in layer.modules}
    weighted = {layer.path for layer in detector_layers if layer.macs}
    wanted = list(dict.fromkeys(layer.path for layer in artifact.layers if layer.path in weighted))
    missing = [path for path in wanted if path not in found]
    return Gate(
        name=MATCH_GATE,
        passed=bool(wanted) and not missing,
        measured=f"{len(wanted) - len(missing)} of {len(wanted)}",
        limit="every layer with weights",
        culprit=missing[0] if missing else "",
        subject=artifact.target,
    )
