"""The targets: what each needs to be exported, to be run, to be measured. One line a target."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

from qexport.errors import QexportError, TargetUnavailable

Ability = Literal["export", "run", "measure"]


@dataclass(frozen=True, slots=True)
class Target:
    """One runtime that qexport lowers to.

    `qexport.exporters.NAME` has `export(...)`, `qexport.runtimes.NAME` has `RUNNER`.
    """

    name: str
    summary: str
    needs: dict[Ability, tuple[str, ...]]
    """Modules that each ability imports."""
    extra: dict[Ability, str]
    """The extra of this package that installs them."""

    def missing(self, ability: Ability) -> tuple[str, ...]:
        """Return the modules that this installation lacks."""
        return tuple(name for name in self.needs[ability] if importlib.util.find_spec(name) is None)

    def require(self, ability: Ability) -> None:
        """Refuse to go on where modules are missing.

        Raises:
            TargetUnavailable: names them, and the command that installs them.
        """
        missing = self.missing(ability)
        if missing:
            raise TargetUnavailable(
                f"target {self.name}: cannot {ability} here, missing {', '.join(missing)}. "
                f"Install: {self.install_command(ability)}"
            )

    def install_command(self, ability: Ability) -> str:
        """Return the command that installs what an ability needs."""
        return f"pip install 'qexport[{self.extra[ability]}]'"


_TORCH = ("torch", "torchvision", "torchao")

TARGETS: tuple[Target, ...] = (
    Target(
        name="onnx",
        summary="ONNX Runtime on a CPU: Q/DQ ONNX, every quantized layer an integer kernel",
        needs={
            "export": (*_TORCH, "onnx", "onnxscript", "onnxruntime"),
            "run": ("onnxruntime",),
            "measure": (*_TORCH, "onnx", "onnxruntime"),
        },
        extra={"export": "all", "run": "onnx-runtime", "measure": "all"},
    ),
)


def find_target(name: str) -> Target:
    """Return the target of that name.

    Raises:
        QexportError: there is none; the message lists those there are.
    """
    for target in TARGETS:
        if target.name == name:
            return target
    known = ", ".join(target.name for target in TARGETS)
    raise QexportError(f"no target {name!r}; there is {known}. `qexport targets` says what each needs.")
