"""What the doctor finds: a row for each thing looked for, a verdict for each target and each engine."""

from __future__ import annotations

from typing import Literal

import msgspec

from qexport.engines import DeviceIdentity
from qexport.target import Ability

State = Literal["ok", "missing", "incompatible", "not applicable"]
Group = Literal["system", "PyTorch", "ONNX", "TensorRT", "torch2trt", "NVIDIA device", "Jetson"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked for."""

    group: Group
    name: str
    found: str | None
    """Version or description; None where there is none."""
    compatible: str = ""
    """What would be accepted, `>=2.14,<2.15`; empty where anything is."""
    state: State
    advice: str = ""
    """What to do; empty where there is nothing to do."""


class AbilityFinding(msgspec.Struct, frozen=True, kw_only=True):
    """Whether one thing can be done with a target here."""

    ability: Ability
    possible: bool
    problems: tuple[str, ...] = ()
    """What is in the way."""
    advice: str = ""
    """The command that helps; empty where none would."""


class TargetFinding(msgspec.Struct, frozen=True, kw_only=True):
    """What can be done with a target here."""

    name: str
    summary: str
    abilities: tuple[AbilityFinding, ...]

    def ability(self, name: Ability) -> AbilityFinding:
        """Return the finding about one ability."""
        return next(one for one in self.abilities if one.ability == name)


class EngineFinding(msgspec.Struct, frozen=True, kw_only=True):
    """Whether an engine beside an artifact would load here."""

    role: str
    """Role of the artifact's file that it was built from, `int8`."""
    built_for: DeviceIdentity
    loads: bool
    reason: str = ""
    """Why it would not load, and the command that builds it here; empty where it loads."""


class ArtifactFinding(msgspec.Struct, frozen=True, kw_only=True):
    """Whether an artifact would run here."""

    path: str
    target: str
    runs: bool
    problems: tuple[str, ...]
    advice: str
    """What to do; empty where it runs, or where nothing would help."""
    here: DeviceIdentity
    """What an engine that is built here would be bound to."""
    engines: tuple[EngineFinding, ...]


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was found, and what of it stands in the way of what was asked."""

    qexport: str
    ok: bool
    problems: tuple[str, ...]
    """Empty exactly where `ok`."""
    findings: tuple[Finding, ...]
    targets: tuple[TargetFinding, ...]
    artifact: ArtifactFinding | None
