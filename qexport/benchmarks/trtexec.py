"""Read what trtexec measured: `--exportTimes`, `--exportProfile`, `--exportLayerInfo`.

The layouts are those of NVIDIA/TensorRT, samples/common/sampleReporting.cpp: `exportJSONTrace` and
`Profiler::exportJSONProfile`, releases 8.2 to 11.1. The layer information is the engine inspector's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qexport.errors import ArtifactError
from qexport.runtimes.tensorrt_layers import EngineLayer, parse_inspector

FileKind = Literal["times", "profile", "layers", "board"]
FILE_KINDS: Mapping[FileKind, str] = {
    "times": "trtexec --exportTimes",
    "profile": "trtexec --exportProfile",
    "layers": "trtexec --exportLayerInfo",
    "board": "deploy/jetson/board.sh",
}
"""What is merged, and what writes it."""

_TIME_KEYS = ("startComputeMs", "computeMs", "latencyMs")
# Release 8.2 alone writes this key, and it alone writes the warm-up runs too.
_END_TO_END = "endToEndMs"


@dataclass(frozen=True, slots=True)
class TimedRun:
    """One run of the engine."""

    start_compute_ms: float
    """Since the first run of the warm-up."""
    compute_ms: float
    """On the GPU."""
    latency_ms: float
    """The same with the copies to the device and back, where they were asked for."""


@dataclass(frozen=True, slots=True)
class Times:
    """Every run that trtexec timed."""

    path: Path
    runs: tuple[TimedRun, ...]
    has_warmup: bool
    """Whether the runs of the warm-up are among them."""

    def counted(self, warmup_ms: float) -> tuple[TimedRun, ...]:
        """Return the runs after the warm-up.

        Args:
            warmup_ms: `--warmUp` of the measurement.

        Raises:
            ArtifactError: the measurement ended before the warm-up did.
        """
        if not self.has_warmup:
            return self.runs
        # trtexec's own rule, `printPerformanceReport`.
        counted = tuple(run for run in self.runs if run.start_compute_ms >= warmup_ms)
        if not counted:
            raise ArtifactError(
                f"{self.path}: all {len(self.runs)} runs belong to the warm-up of {warmup_ms:g} ms. Measure again "
                "with more --iterations."
            )
        return counted


@dataclass(frozen=True, slots=True)
class LayerTime:
    """One layer of the engine over all profiled runs."""

    name: str
    median_ms: float
    """TensorRT 8.2 gives no median; there it is the mean."""
    mean_ms: float


@dataclass(frozen=True, slots=True)
class Profile:
    """The engine layer by layer."""

    path: Path
    runs: int
    layers: tuple[LayerTime, ...]


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """What the engine's layers are made of."""

    path: Path
    layers: tuple[EngineLayer, ...]


def recognise(path: Path) -> FileKind:
    """Say by its content which of the four kinds a file is.

    Raises:
        ArtifactError: it is missing, cut off, or none of them.
    """
    document = _load(path)
    if isinstance(document, dict):
        if document.get("kind") == "qexport-board":
            return "board"
        if "Layers" in document:
            return "layers"
    elif isinstance(document, list):
        first = document[0] if document else None
        if isinstance(first, dict) and "count" in first:
            return "profile"
        # No run at all is still a list of runs; `read_times` says what is wrong with it.
        if first is None or (isinstance(first, dict) and "latencyMs" in first):
            return "times"
    known = ", ".join(f"{kind} ({source})" for kind, source in FILE_KINDS.items())
    raise ArtifactError(
        f"{path}: not a file that can be merged. Expected {known}; deploy/jetson/measure.sh writes all four."
    )


def sort_files(paths: list[Path]) -> dict[FileKind, Path]:
    """Return the files by their kind, whatever order they were given in.

    Raises:
        ArtifactError: a file is of no known kind, a kind is there twice, or one is missing.
    """
    found: dict[FileKind, Path] = {}
    for path in paths:
        kind = recognise(path)
        if kind in found:
            raise ArtifactError(
                f"{found[kind]} and {path} are both {kind} files. Give those of one measurement."
            )
        found[kind] = path
    missing = [f"{kind} ({source})" for kind, source in FILE_KINDS.items() if kind not in found]
    if missing:
        given = ", ".join(str(path) for path in paths) or "none"
        raise ArtifactError(
            f"a measurement is four files; missing: {', '.join(missing)}; given: {given}. "
            "deploy/jetson/measure.sh writes all four."
        )
    return found


def read_times(path: Path) -> Times:
    """Read `--exportTimes`.

    Raises:
        ArtifactError: missing, cut off, of another kind, without a run, or with a time that is no positive number.
    """
    rows = _rows(path, "times")
    if not rows:
        raise ArtifactError(
            f"{path}: no run was timed. trtexec was ended early, or built without running (--buildOnly, "
            "--skipInference)."
        )
    runs = []
    for number, row in enumerate(rows):
        start, compute, latency = (_number(path, row, key, f"run {number}") for key in _TIME_KEYS)
        if latency <= 0 or compute < 0:
            raise ArtifactError(
                f"{path}: run {number} took {latency:g} ms; expected more than 0. Measure again."
            )
        runs.append(TimedRun(start, compute, latency))
    return Times(path, tuple(runs), has_warmup=_END_TO_END in rows[0])


def read_profile(path: Path) -> Profile:
    """Read `--exportProfile`.

    Raises:
        ArtifactError: missing, cut off, of another kind, or without a layer.
    """
    rows = _rows(path, "profile")
    count = rows[0].get("count") if rows else None
    if not isinstance(count, int):
        raise ArtifactError(
            f"{path}: does not begin with the count of runs; not a file of {FILE_KINDS['profile']}."
        )
    if count < 1 or len(rows) < 2:
        raise ArtifactError(f"{path}: {count} runs of {len(rows) - 1} layers were profiled; nothing to read.")
    layers = []
    for row in rows[1:]:
        name = row.get("name")
        if not isinstance(name, str):
            raise ArtifactError(f"{path}: a layer without a name: {row}")
        mean = _number(path, row, "averageMs", name)
        median = _number(path, row, "medianMs", name) if "medianMs" in row else mean
        layers.append(LayerTime(name, median, mean))
    return Profile(path, count, tuple(layers))


def read_layer_info(path: Path) -> LayerInfo:
    """Read `--exportLayerInfo`.

    Raises:
        ArtifactError: missing, cut off, of another kind, or with the names of layers alone.
    """
    # Between the nodes of a layer there may be control characters, which JSON allows in no string.
    text = _text(path).translate(dict.fromkeys(range(32), " "))
    try:
        layers = parse_inspector(text)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    if not layers:
        raise ArtifactError(f"{path}: the engine has no layers. Was it built with --profilingVerbosity=none?")
    return LayerInfo(path, layers)


def check_same_engine(profile: Profile, info: LayerInfo) -> None:
    """Refuse a profile and layer information that are not of one engine.

    The layer information may have more: what takes no time of its own (signals, waits) is not profiled.

    Raises:
        ArtifactError: names both files and the first layer that only the profile has.
    """
    known = {layer.name for layer in info.layers}
    missing = [layer.name for layer in profile.layers if layer.name not in known]
    if missing:
        raise ArtifactError(
            f"{profile.path} and {info.path} are not of one engine: {len(missing)} of {len(profile.layers)} "
            f"profiled layers are not in the layer information, the first is {missing[0]!r}; there the first is "
            f"{info.layers[0].name!r}. Give the files of one measurement."
        )


def _rows(path: Path, kind: FileKind) -> list[dict[str, object]]:
    document = _load(path)
    if not isinstance(document, list) or not all(isinstance(row, dict) for row in document):
        raise ArtifactError(f"{path}: not a list of objects, so not a file of {FILE_KINDS[kind]}.")
    return document


def _number(path: Path, row: Mapping[str, object], key: str, where: str) -> float:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ArtifactError(f"{path}: {where}: {key} is {value!r}; expected a number. Measure again.")
    return float(value)


def _load(path: Path) -> object:
    text = _text(path)
    try:
        # Not strict: trtexec writes names as they are, control characters included.
        document: object = json.loads(text, strict=False)
    except ValueError as error:
        raise ArtifactError(
            f"{path}: no complete JSON ({error}). Was the measurement ended, or the copy cut off?"
        ) from error
    return document


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: no such file") from error
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error
