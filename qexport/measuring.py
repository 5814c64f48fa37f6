"""Measure a bundle on this machine: latency whole and by layer, memory, and what state the board was in.

Needs no torch: this is what runs on a board.
"""

from __future__ import annotations

import importlib
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import msgspec

import qexport
from qexport.artifact import ArtifactFile
from qexport.benchmarks.board import GATE as THROTTLE_GATE
from qexport.benchmarks.complexity import peak_memory
from qexport.benchmarks.latency import FP32, count_steps, measure_latency
from qexport.board_state import (
    ROOT,
    BoardIdentity,
    BoardState,
    clock_mhz,
    held_back,
    hottest_c,
    read_identity,
    read_state,
    tells_throttling,
)
from qexport.bundle import Bundle
from qexport.errors import QexportError
from qexport.golden import load_frame
from qexport.measurement import Measurement
from qexport.results import Gate, LatencyProfile, Machine, MeasuredOn, MemoryUse
from qexport.target import find_target
from qexport.verifying import VerifyReport, describe, detections_kept, verify, versions_here

GOLDEN_GATE = "golden detections"
Place = Literal["device", "host", "emulated"]
_ROLES = {"artifact": "int8", FP32: "fp32"}


def where_measured(given: Place | None, root: Path = ROOT, machine: str = "") -> MeasuredOn:
    """Return what a measurement made here is marked as.

    Args:
        given: what the user says; taken as it is.
        root: of the file system.
        machine: the processor's architecture; empty for this machine's.

    Raises:
        QexportError: an Arm processor without the device tree of a board: a server, a virtual machine, or an emulation
            on another processor, which nothing here tells apart.
    """
    if given is not None:
        return given
    architecture = machine or platform.machine()
    if not architecture.startswith(("aarch64", "arm")):
        return "host"
    if (root / "proc/device-tree/model").is_file():
        return "device"
    raise QexportError(
        f"this is {architecture} without a device tree: a server, a virtual machine, or qemu on another processor. Say "
        "which with --measured-on device, host or emulated; a latency from an emulation says nothing of a board."
    )


def steps_of(bundle: Bundle, *, warmup: int, runs: int) -> int:
    """Return how often `measure` calls `on_step`."""
    steps = count_steps(bundle.artifact, bundle.artifact_folder, eager=False, warmup=warmup, runs=runs)
    return steps + len(bundle.manifest.golden) + len(_files(bundle))


def measure(
    bundle: Bundle,
    *,
    runs: int,
    warmup: int,
    threads: int,
    measured_on: MeasuredOn,
    min_accounted: float = 0.9,
    root: Path = ROOT,
    on_step: Callable[[], None] = lambda: None,
) -> Measurement:
    """Measure a bundle on its own first golden frame, beside its float baseline where that was taken along.

    The golden frames are run first: no latency without its verdict.

    Args:
        bundle: read and checked.
        runs: measured runs.
        warmup: runs before them that do not count.
        threads: of the runtime.
        measured_on: what the figures are marked as.
        min_accounted: smallest share of the whole that the layers must add up to, 0..1.
        root: of the file system in which the board tells of itself.
        on_step: called `steps_of` times.

    Raises:
        ArtifactError: the runtime does not accept the artifact.
        TargetUnavailable: the runtime is not installed.
    """
    target = find_target(bundle.manifest.target)
    target.require("run")
    runner: Any = importlib.import_module(f"qexport.runtimes.{target.runtime}").RUNNER
    verified = verify(bundle, threads=threads, on_frame=on_step)
    cold_start_s, memory = _memory(bundle, on_step)
    frame = load_frame(bundle.folder / bundle.manifest.golden[0].frame)
    before = read_state(root)
    profile = measure_latency(
        artifact=bundle.artifact_folder,
        runner=runner,
        detector=None,
        frame=frame,
        layers=bundle.layers(),
        warmup=warmup,
        runs=runs,
        threads=threads,
        min_accounted=min_accounted,
        on_run=on_step,
    )
    after, identity = read_state(root), read_identity(root)
    gates = (
        *profile.gates,
        _golden_gate(verified),
        *_throttle_gate(before, after, bundle.manifest.target),
    )
    return Measurement(
        qexport_version=qexport.__version__,
        target=bundle.manifest.target,
        artifact_sha256=bundle.manifest.artifact_sha256,
        file_sha256=bundle.artifact.file("int8").sha256,
        bundle_sha256=bundle.sha256,
        board=identity,
        before=before,
        after=after,
        golden=describe(verified)[0],
        verdicts=bundle.manifest.verdicts,
        cold_start_s=cold_start_s,
        memory=memory,
        profile=_on_board(profile, bundle, identity, before, after, measured_on, gates),
    )


def _on_board(
    profile: LatencyProfile,
    bundle: Bundle,
    identity: BoardIdentity,
    before: BoardState,
    after: BoardState,
    measured_on: MeasuredOn,
    gates: tuple[Gate, ...],
) -> LatencyProfile:
    """Return the profile with the machine as the board describes itself."""
    machine = Machine(
        measured_on=measured_on,
        system=", ".join(filter(None, (identity.system, identity.kernel, identity.machine))),
        processor=identity.model or identity.processor or identity.machine,
        cores=identity.cores,
        versions={
            name: version
            for name, version in versions_here(bundle.manifest.target).items()
            if name != "machine"
        },
        clock_mhz=clock_mhz(after) or profile.machine.clock_mhz,
        temperature_c=hottest_c(before, after),
    )
    return msgspec.structs.replace(
        profile, artifact_sha256=bundle.manifest.artifact_sha256, machine=machine, gates=gates
    )


def _golden_gate(verified: VerifyReport) -> Gate:
    differing = [frame for frame in verified.frames if frame.outputs or frame.layers]
    first = next((one.name for frame in differing for one in (*frame.layers, *frame.outputs)), "")
    return Gate(
        name=GOLDEN_GATE,
        passed=detections_kept(verified),
        measured=verified.verdict
        if not differing
        else f"{len(differing)} of {len(verified.frames)} frames are not bit-identical",
        limit="as many as on the workstation, with the same labels",
        culprit=first,
        subject=verified.target,
    )


def _throttle_gate(before: BoardState, after: BoardState, target: str) -> tuple[Gate, ...]:
    """Return the gate that the board was not held back; none where it does not tell."""
    if not (tells_throttling(before) or tells_throttling(after)):
        return ()
    found, hottest = held_back(before, after), hottest_c(before, after)
    heat = f", hottest {hottest:.0f} °C" if hottest is not None else ""
    gate = Gate(
        name=THROTTLE_GATE,
        passed=not found,
        measured=("; ".join(found) or "nothing held back") + heat,
        limit="no low voltage, no clock held back",
        subject=target,
    )
    return (gate,)


def _files(bundle: Bundle) -> dict[str, ArtifactFile]:
    """Return the files of the artifact that are here, by what they are called in a measurement."""
    files = {
        file.role: file for file in bundle.artifact.files if (bundle.artifact_folder / file.name).is_file()
    }
    return {subject: files[role] for subject, role in _ROLES.items() if role in files}


def _memory(bundle: Bundle, on_step: Callable[[], None]) -> tuple[float, tuple[MemoryUse, ...]]:
    """Return how long a fresh process takes to its first boxes, and the peak memory of each file."""
    cold_start_s, memory = 0.0, []
    for subject, file in _files(bundle).items():
        command = [sys.executable, "-m", "qexport.runtimes.once", str(bundle.artifact_folder), file.role]
        start = perf_counter()
        memory.append(MemoryUse(subject=subject, peak_bytes=peak_memory(command)))
        if subject == "artifact":
            cold_start_s = perf_counter() - start
        on_step()
    return cold_start_s, tuple(memory)
