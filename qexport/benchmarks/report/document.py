"""What `report.json` and `timings.json` hold, and the published schema of the first.

Nothing measured in time, no memory peak, clock, temperature or date stands in ReportDocument: two runs
of one command give the same `report.json`, byte for byte. All of that stands in TimingsDocument.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Final, Literal

import msgspec

from qexport.artifact import Artifact, ArtifactFile, InputSpec, LayerDecision, Rung, UnquantizedRow
from qexport.cross_results import CrossReport
from qexport.diagnosis_results import Diagnosis
from qexport.encodings import Encodings, FloatRow, origin_of
from qexport.engines import Engine
from qexport.layers import DetectorReport
from qexport.mend_results import MendReport
from qexport.method_results import MethodsLatency, MethodsReport
from qexport.observer_results import ObserverReport
from qexport.results import (
    AccuracyReport,
    Complexity,
    LatencyProfile,
    MemoryUse,
    ParityReport,
    ProposalCurve,
    ProposalLatency,
)
from qexport.sensitivity_results import SensitivityReport
from qexport.settings import RunRecord
from qexport.training_history import History

FORMAT_VERSION: Final = 1
SCHEMA_ID = f"urn:qexport:report:{FORMAT_VERSION}"

VerdictState = Literal["ok", "failed", "incomplete"]


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base: frozen, named fields, unknown fields refused."""


class Verdict(_Part, frozen=True):
    """The answer in one line."""

    state: VerdictState
    """`incomplete`: no gate failed, but a stage has not run or nothing was promised."""
    text: str
    gates: int
    """How many gates were measured."""
    failed: int


class MissingStage(_Part, frozen=True):
    """A stage of the run without a usable result, and what to do about it."""

    stage: str
    target: str
    """Empty for a stage that belongs to no target."""
    file: str
    """Name of the file that the stage writes."""
    why: str
    command: str
    needs_device: bool = False
    """It cannot have run where the run was made: the target's device was not there."""


class CalibrationSummary(_Part, frozen=True):
    """The encodings table without its scales."""

    scheme: str
    calibration: dict[str, str | int | float]
    keep_float: tuple[str, ...]
    rows: int
    float_rows: tuple[FloatRow, ...]
    rows_sha256: str
    origins: dict[str, int] = {}
    """Of a QAT checkpoint: how many scales came from where."""


class ArtifactSummary(_Part, frozen=True):
    """An artifact without its list of tensors."""

    sha256: str
    qexport_version: str
    versions: dict[str, str]
    input: InputSpec
    proposals: int
    detections: int
    forms: dict[str, str]
    files: tuple[ArtifactFile, ...]
    rung: Rung
    """What `integer_layers` and `float_layers` stand on."""
    integer_layers: int
    float_layers: tuple[LayerDecision, ...]
    """The layers that the target does not run with an integer kernel."""
    reformats: int
    """Kernels beside the layers that only change layout or type."""
    unquantized: tuple[UnquantizedRow, ...]
    """Rows of the encodings that the target does not apply, by its own word."""


class TargetDocument(_Part, frozen=True):
    """One target; None where the stage has not run."""

    target: str
    artifact: ArtifactSummary | None
    parity: ParityReport | None
    complexity: Complexity | None
    proposals: ProposalCurve | None = None


class ReportDocument(_Part, frozen=True):
    """What `report.json` holds."""

    verdict: Verdict
    """Of the gates that do not depend on time."""
    run: RunRecord
    detector: DetectorReport
    calibration: CalibrationSummary | None
    accuracy: AccuracyReport | None
    targets: tuple[TargetDocument, ...]
    missing: tuple[MissingStage, ...]
    cross: CrossReport | None = None
    diagnosis: Diagnosis | None = None
    """Who did it, where accuracy fell by more than its gate."""
    sensitivity: SensitivityReport | None = None
    methods: MethodsReport | None = None
    observers: ObserverReport | None = None
    """What `--observer auto` chose."""
    training: History | None = None
    mended: MendReport | None = None
    """Where the weights of a checkpoint of `qexport qat` or `qexport mend` come from."""
    format_version: Literal[1] = FORMAT_VERSION


class TargetTimings(_Part, frozen=True):
    """What one target took, with the verdict without which no latency is shown."""

    target: str
    parity: Verdict
    latency: LatencyProfile | None
    memory: tuple[MemoryUse, ...] | None
    measurements: tuple[LatencyProfile, ...] = ()
    """Brought back from boards."""
    engines: tuple[Engine, ...] = ()
    """Built from the artifact, each bound to one machine."""
    proposals: ProposalLatency | None = None
    """Of the points of the target's ProposalCurve, whose parity stands with each."""


class TimingsDocument(_Part, frozen=True):
    """What `timings.json` holds: everything that changes from run to run."""

    targets: tuple[TargetTimings, ...]
    methods: MethodsLatency | None = None
    """Of methods whose mAP and size stand in `report.json`; what they are compared with is float."""
    format_version: Literal[1] = FORMAT_VERSION


def report_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of `report.json`."""
    schema = msgspec.json.schema(ReportDocument)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_ID,
        "title": f"qexport report, format {FORMAT_VERSION}",
        **schema,
    }


def summarise_encodings(encodings: Encodings) -> CalibrationSummary:
    """Return the table without its scales."""
    return CalibrationSummary(
        scheme=encodings.scheme,
        calibration=encodings.calibration,
        keep_float=encodings.keep_float,
        rows=len(encodings.rows),
        float_rows=encodings.float_rows,
        rows_sha256=encodings.rows_sha256,
        origins=dict(Counter(map(origin_of, encodings.rows))) if "qat" in encodings.calibration else {},
    )


def summarise_artifact(artifact: Artifact) -> ArtifactSummary:
    """Return the artifact without its list of tensors."""
    return ArtifactSummary(
        sha256=artifact.sha256,
        qexport_version=artifact.qexport_version,
        versions=artifact.versions,
        input=artifact.input,
        proposals=artifact.proposals,
        detections=artifact.detections,
        forms=artifact.forms,
        files=artifact.files,
        rung=artifact.rung,
        reformats=sum(layer.reformats for layer in artifact.layers),
        unquantized=artifact.unquantized,
        integer_layers=sum(layer.integer for layer in artifact.layers),
        float_layers=tuple(layer for layer in artifact.layers if not layer.integer),
    )
