"""From gates to one line: ok, the first gate that failed and its culprit, or what is still missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qexport.benchmarks.report.document import Verdict
from qexport.benchmarks.report.stages import RunResults
from qexport.cross_results import CrossReport
from qexport.results import Gate, ParityReport


@dataclass(frozen=True, slots=True)
class GateLine:
    """A gate, and what it was measured on."""

    group: Literal["parity", "comparison", "accuracy", "latency"]
    target: str
    """A target, or two that were compared; empty for a gate on the whole run."""
    gate: Gate

    @property
    def timed(self) -> bool:
        """Whether the measurement depends on time, so that it may differ from run to run."""
        return self.group == "latency"


def gate_lines(run: RunResults) -> tuple[GateLine, ...]:
    """Return every gate in the order in which the stages run: parity, targets compared, accuracy, latency."""
    lines: list[GateLine] = []
    for target in run.targets:
        if target.parity is not None:
            lines += [GateLine("parity", target.target, gate) for gate in target.parity.gates]
    if run.cross is not None:
        lines += [GateLine("comparison", gate.subject, gate) for gate in run.cross.gates]
    if run.accuracy is not None:
        lines += [GateLine("accuracy", "", gate) for gate in run.accuracy.gates]
    for target in run.targets:
        for profile in target.profiles:
            lines += [GateLine("latency", target.target, gate) for gate in profile.gates]
    return tuple(lines)


def run_verdict(run: RunResults) -> Verdict:
    """Return the verdict over the gates that do not depend on time."""
    lines = [line for line in gate_lines(run) if not line.timed]
    failed = [line for line in lines if not line.gate.passed]
    if failed:
        culprit = f". {run.diagnosis.sentence}" if run.diagnosis is not None else ""
        return Verdict(state="failed", text=_failure(failed) + culprit, gates=len(lines), failed=len(failed))
    due = [missing for missing in run.missing if not missing.needs_device]
    if due or not lines:
        names = dict.fromkeys(
            f"{missing.stage} of {missing.target}" if missing.target else missing.stage for missing in due
        )
        what = f"no result for {', '.join(names)}" if names else "no gate was measured"
        return Verdict(state="incomplete", text=f"Incomplete: {what}", gates=len(lines), failed=0)
    text = f"Ok: {_counted(len(lines))} on parity and accuracy"
    return Verdict(state="ok", text=text, gates=len(lines), failed=0)


def timed_verdict(run: RunResults) -> Verdict:
    """Return the verdict over the latency gates alone."""
    lines = [line for line in gate_lines(run) if line.timed]
    failed = [line for line in lines if not line.gate.passed]
    if failed:
        return Verdict(state="failed", text=_failure(failed), gates=len(lines), failed=len(failed))
    if not lines:
        return Verdict(state="incomplete", text="no latency gate was measured", gates=0, failed=0)
    return Verdict(state="ok", text=f"{_counted(len(lines))} on latency", gates=len(lines), failed=0)


def parity_verdict(parity: ParityReport | None) -> Verdict:
    """Return the line that stands beside every latency of a target."""
    if parity is None:
        return Verdict(state="incomplete", text="parity not measured", gates=0, failed=0)
    return parity_gates_verdict(parity.gates)


def cross_verdict(cross: CrossReport) -> Verdict:
    """Return the line that stands beside the targets that were compared with one another."""
    failed = [gate for gate in cross.gates if not gate.passed]
    if failed:
        text = f"{failed[0].subject}: {describe_gate(failed[0])}"
        return Verdict(state="failed", text=text, gates=len(cross.gates), failed=len(failed))
    return Verdict(state="ok", text="every pair ok", gates=len(cross.gates), failed=0)


def parity_gates_verdict(gates: Sequence[Gate]) -> Verdict:
    """Return the same line, of parity's gates."""
    failed = [gate for gate in gates if not gate.passed]
    if failed:
        text = f"parity failed: {describe_gate(failed[0])}"
        return Verdict(state="failed", text=text, gates=len(gates), failed=len(failed))
    if not gates:
        return Verdict(state="incomplete", text="parity without a gate", gates=0, failed=0)
    return Verdict(state="ok", text="parity ok", gates=len(gates), failed=0)


def describe_gate(gate: Gate) -> str:
    """Return `layer parity: 4 steps, asked at most 1 step (backbone.body.conv1)`."""
    culprit = f" ({gate.culprit})" if gate.culprit else ""
    return f"{gate.name}: {gate.measured}, asked {gate.limit}{culprit}"


def _counted(gates: int) -> str:
    return f"{gates} gate{'' if gates == 1 else 's'}"


def _failure(failed: Sequence[GateLine]) -> str:
    first = failed[0]
    where = f" on {first.target}" if first.target else ""
    more = f"; {len(failed) - 1} more failed" if len(failed) > 1 else ""
    return f"Gate failed{where}: {describe_gate(first.gate)}{more}"
