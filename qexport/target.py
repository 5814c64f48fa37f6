"""The targets: what each needs to be exported, to be run, to be measured. One line a target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qexport.errors import QexportError, TargetUnavailable
from qexport.target_options import TargetOptions, TensorrtOptions, TfliteOptions, Torch2trtOptions
from qexport.versions import is_importable

Ability = Literal["export", "run", "measure"]


@dataclass(frozen=True, slots=True)
class Target:
    """One runtime that qexport lowers to.

    `qexport.exporters.NAME` has `export(...)`, `qexport.runtimes.RUNTIME` has `RUNNER`.
    """

    name: str
    summary: str
    needs: dict[Ability, tuple[str, ...]]
    """Modules that each ability imports; `one|another` where either will do."""
    extra: dict[Ability, str]
    """The extra of this package that installs them."""
    runtime: str
    """`qexport.runtimes.RUNTIME` runs it; where its device is missing, `qexport.emulation.RUNTIME` evaluates it."""
    options: type[TargetOptions] = TargetOptions
    """What `-O NAME.OPTION=VALUE` can choose."""
    hint: str = ""
    """Said after the install command: what no package index holds."""
    kernels_for: tuple[str, ...] = ()
    """Processors, by `platform.machine()`, that its fast kernels are written for; none where all are alike."""
    elsewhere: str = ""
    """Said beside its latency on any other processor."""

    def missing(self, ability: Ability) -> tuple[str, ...]:
        """Return the modules that this installation lacks."""
        return tuple(
            name.replace("|", " or ")
            for name in self.needs[ability]
            if not any(is_importable(one) for one in name.split("|"))
        )

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
        return f"pip install 'qexport[{self.extra[ability]}]'{self.hint}"


_TORCH = ("torch", "torchvision", "torchao")
_TENSORRT = "tensorrt|tensorrt_rtx_bindings"

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
        runtime="onnx",
    ),
    Target(
        name="tflite",
        summary="Raspberry Pi and other Arm boards: one static .tflite, suppression inside, XNNPACK kernels",
        needs={
            "export": (*_TORCH, "ai_edge_litert", "flatbuffers"),
            "run": ("ai_edge_litert|tflite_runtime",),
            "measure": (*_TORCH, "ai_edge_litert"),
        },
        extra={"export": "all", "run": "tflite-runtime", "measure": "all"},
        runtime="tflite",
        options=TfliteOptions,
    ),
    Target(
        name="qnnpack",
        summary="PyTorch on Arm boards: one TorchScript file of quantized modules, QNNPACK kernels",
        needs={"export": _TORCH, "run": ("torch", "torchvision"), "measure": _TORCH},
        extra={"export": "all", "run": "qnnpack-runtime", "measure": "all"},
        runtime="qnnpack",
        kernels_for=("aarch64", "arm64", "armv8l", "armv7l"),
        elsewhere="QNNPACK's fast kernels are for Arm: this latency means nothing for a Raspberry Pi",
    ),
    Target(
        name="executorch",
        summary="Arm boards and phones: one .pte, layers in XNNPACK; Python or C++ runtime",
        needs={
            "export": (*_TORCH, "executorch.version"),
            "run": ("executorch.version", "torch"),
            "measure": (*_TORCH, "executorch.version"),
        },
        extra={"export": "all,executorch", "run": "executorch", "measure": "all,executorch"},
        runtime="executorch",
    ),
    Target(
        name="tensorrt",
        summary="NVIDIA Jetson and GPUs: int8 engine by ONNX with explicit Q/DQ; built and checked without a GPU too",
        needs={
            "export": (*_TORCH, "onnx", "onnxscript", _TENSORRT),
            "run": (_TENSORRT,),
            "measure": (*_TORCH, _TENSORRT),
        },
        extra={"export": "all,tensorrt-cpu", "run": "device", "measure": "all,tensorrt-cpu"},
        runtime="tensorrt",
        options=TensorrtOptions,
    ),
    Target(
        name="torch2trt",
        summary="the same by torch2trt, layer for layer from PyTorch, with converters of our own",
        needs={
            "export": (*_TORCH, _TENSORRT, "torch2trt"),
            "run": (_TENSORRT,),
            "measure": (*_TORCH, _TENSORRT),
        },
        extra={"export": "all,tensorrt-cpu", "run": "device", "measure": "all,tensorrt-cpu"},
        runtime="tensorrt",
        options=Torch2trtOptions,
        # Its setup wants classic TensorRT; what is needed of it is Python, so a checkout on the path does.
        hint=" && git clone https://github.com/NVIDIA-AI-IOT/torch2trt && export PYTHONPATH=$PWD/torch2trt",
    ),
)


def latency_note(target: str, system: str) -> str:
    """Return what is to be said beside a target's latency; empty where there is nothing.

    Args:
        target: its name.
        system: of the machine that it was measured on, which ends in its processor's kind: `Linux 6.1 x86_64`.
    """
    for one in TARGETS:
        if one.name == target and one.kernels_for and system.rpartition(" ")[2] not in one.kernels_for:
            return one.elsewhere
    return ""


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
