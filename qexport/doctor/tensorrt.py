"""TensorRT: bindings against library, asked in a process of its own.

Bindings over a library of another version may end the process that imports them; the doctor then says so.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import msgspec

from qexport.doctor.findings import Finding
from qexport.doctor.jetson import Jetson, python_advice
from qexport.doctor.requirements import Ranges, numbers
from qexport.errors import TargetUnavailable
from qexport.files import json_bytes
from qexport.runtimes.tensorrt_library import CLASSIC, INSTALL, RTX, installed_flavour, load_library

MODULES = frozenset(["tensorrt", "tensorrt_rtx_bindings", "torch2trt"])
"""Modules that need TensorRT; what runs through them needs an NVIDIA GPU."""
_MODULE_OF = {CLASSIC: "tensorrt", RTX: "tensorrt_rtx_bindings"}
_LIBRARY_OF = {CLASSIC: "libnvinfer.so", RTX: "libtensorrt_rtx.so"}
_TIMEOUT_S = 120
_LIBRARY_FOLDERS = (
    "usr/lib/*-linux-gnu",
    "usr/lib",
    "usr/lib64",
    "usr/local/tensorrt/lib",
    "usr/local/lib",
    "opt/tensorrt/lib",
)
_TRTEXEC = ("usr/src/tensorrt/bin/trtexec", "usr/bin/trtexec", "usr/local/bin/trtexec")
_CHILD = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from qexport.doctor.tensorrt import answer
answer()
"""


class Tensorrt(msgspec.Struct, frozen=True, kw_only=True):
    """What TensorRT's bindings say, or why they cannot be used."""

    flavour: str
    """`tensorrt`, or `tensorrt_rtx`."""
    bindings: str = ""
    """Their version, `10.3.0`; empty where they could not be imported."""
    library: str = ""
    """Version of the library that they loaded; empty where it is not known."""
    dla_cores: int | None = None
    error: str = ""
    """Why they cannot be used; empty where they can."""

    @property
    def name(self) -> str:
        """As an engine's identity has it, `tensorrt 10.3.0`."""
        return f"{self.flavour} {self.bindings}"


def find_tensorrt() -> Tensorrt | None:
    """Ask TensorRT in a process of its own; None where no bindings are installed."""
    flavour = installed_flavour()
    if flavour is None:
        return None
    paths = json_bytes(sys.path).decode()
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, paths],
            capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Tensorrt(flavour=flavour, error=f"importing it did not end within {_TIMEOUT_S} s")
    if done.returncode:
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return Tensorrt(
            flavour=flavour, error=f"importing it ended the process with {how}{': ' + last if last else ''}"
        )
    # TensorRT may write to standard output; the answer is the last line.
    return msgspec.json.decode(done.stdout.strip().splitlines()[-1], type=Tensorrt)


def answer() -> None:
    """Print what TensorRT says in this process, as one line."""
    sys.stdout.write("\n" + msgspec.json.encode(_ask()).decode() + "\n")


def tensorrt_findings(
    root: Path, found: Tensorrt | None, ranges: Ranges, jetson: Jetson | None
) -> tuple[Finding, ...]:
    """Return the rows of bindings, library and trtexec.

    Args:
        root: folder that stands for `/`.
        found: what the bindings said; None where there are none.
        ranges: what the installed qexport asks for.
        jetson: what is known of this Jetson; None on another machine.
    """
    files = library_files(root)
    trtexec = next((root / path for path in _TRTEXEC if (root / path).is_file()), None)
    return (
        _bindings_finding(found, ranges, jetson),
        Finding(
            group="TensorRT",
            name="library",
            found=(found.library if found else "") or (files[-1] if files else None),
            compatible=f"{_short(found.bindings)}, as the bindings" if found and found.bindings else "",
            state="incompatible"
            if found and _differ(found)
            else "ok"
            if files or (found and found.library)
            else "not applicable",
        ),
        Finding(
            group="TensorRT",
            name="trtexec",
            found=f"/{trtexec.relative_to(root)}" if trtexec else None,
            state="ok" if trtexec else "not applicable",
        ),
    )


def library_files(root: Path) -> tuple[str, ...]:
    """Return the versions of the TensorRT libraries that the system has, oldest first, by their file names."""
    paths = [path for folder in _LIBRARY_FOLDERS for path in root.glob(f"{folder}/libnvinfer.so.*")]
    versions = {path.name.removeprefix("libnvinfer.so.") for path in paths}
    # libnvinfer.so.10 is a link to libnvinfer.so.10.3.0.
    return tuple(sorted((one for one in versions if len(numbers(one)) >= 3), key=numbers))


def _bindings_finding(found: Tensorrt | None, ranges: Ranges, jetson: Jetson | None) -> Finding:
    if found is None:
        return Finding(
            group="TensorRT", name="bindings", found=None, state="missing", advice=install_advice(jetson)
        )
    pinned = ranges.of("tensorrt-rtx-cu13-bindings") if found.flavour == RTX else ()
    unfit = bool(found.bindings and pinned and not any(one.fits(found.bindings) for one in pinned))
    reason = found.error or (
        f"qexport's pair is {pinned[0].range}: pip install 'qexport[tensorrt-cpu]'" if unfit else ""
    )
    return Finding(
        group="TensorRT",
        name="bindings",
        found=f"{found.flavour} {found.bindings or 'of unknown version'}",
        compatible=pinned[0].range if pinned else "",
        state="incompatible" if reason else "ok",
        advice=reason,
    )


def install_advice(jetson: Jetson | None) -> str:
    """Say how TensorRT comes onto this machine."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    if jetson is None:
        return INSTALL
    if jetson.python not in (None, python):
        return python_advice(jetson, python)
    return (
        "sudo apt install python3-libnvinfer; in a virtual environment, one that sees it: "
        f"python{python} -m venv --system-site-packages venv"
    )


def _ask() -> Tensorrt:
    flavour = installed_flavour() or CLASSIC
    try:
        trt = load_library().trt
    except TargetUnavailable as error:
        return _with_versions(flavour, str(error))
    except Exception as error:
        return _with_versions(flavour, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    found = _with_versions(flavour, "")
    builder = trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR))
    found = msgspec.structs.replace(found, dla_cores=getattr(builder, "num_DLA_cores", None))
    if _differ(found):
        found = msgspec.structs.replace(
            found,
            error=f"bindings {found.bindings} over library {found.library}: install both from one release",
        )
    return found


def _with_versions(flavour: str, error: str) -> Tensorrt:
    module = sys.modules.get(_MODULE_OF[flavour])
    return Tensorrt(
        flavour=flavour,
        bindings=str(getattr(module, "__version__", "")),
        library=_loaded_library(_LIBRARY_OF[flavour]),
        error=error,
    )


def _loaded_library(name: str) -> str:
    """Return the version of the library that this process has loaded; empty where it has not."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.is_file() else []
    for line in lines:
        path = line.rpartition(" ")[2]
        if Path(path).name.startswith(name):
            return library_version(ctypes.CDLL(path).getInferLibVersion())
    return ""


def library_version(number: int) -> str:
    """Return what `getInferLibVersion` means: 8502 is 8.5.2, 100300 is 10.3.0, as NvInferVersion.h has it."""
    # From TensorRT 10 on a hundred of each; before, a thousand of the first. RTX began at 1 with the new form.
    scale = 10000 if number >= 10000 else 1000
    return f"{number // scale}.{number % scale // 100}.{number % 100}"


def _differ(found: Tensorrt) -> bool:
    """Say whether bindings and library are of different releases; the third number may differ."""
    return bool(
        found.bindings and found.library and numbers(found.bindings)[:2] != numbers(found.library)[:2]
    )


def _short(version: str) -> str:
    return ".".join(map(str, numbers(version)[:3]))
