"""Python, the system, its C library, and the operator sets of ONNX."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Literal

import qexport
from qexport.doctor.findings import Finding
from qexport.doctor.packages import glibc_needs
from qexport.doctor.requirements import Ranges, numbers

EXPORTED_OPSET = 18
"""Operator set of the ONNX files that qexport writes."""
_TIMEOUT_S = 60
_OPSET = "import onnx; print(onnx.defs.onnx_opset_version())"


def system_findings(root: Path, ranges: Ranges) -> tuple[Finding, ...]:
    """Return the rows of Python, system and C library.

    Args:
        root: folder that stands for `/`.
        ranges: what the installed qexport asks for.
    """
    return (
        _python_finding(ranges),
        Finding(
            group="system",
            name="qexport",
            found=qexport.__version__,
            state="ok" if ranges.requirements else "missing",
            advice="" if ranges.requirements else "copied, not installed: without its metadata no range is known; "
            "pip install qexport",
        ),
        Finding(
            group="system",
            name="system",
            found=f"{system_name(root)}, {platform.machine()}",
            compatible="Linux",
            state="ok",
        ),
        _glibc_finding(),
    )  # fmt: skip


def opset_finding() -> Finding:
    """Return the row of the newest operator set that the installed onnx knows; it is asked in another process."""
    if importlib.util.find_spec("onnx") is None:
        return _opset(None, "not applicable", "")
    done = subprocess.run(
        [sys.executable, "-c", _OPSET],
        capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False,
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return _opset(None, "incompatible", f"onnx cannot be imported: {last}")
    newest = int(done.stdout.split()[-1])
    old = newest < EXPORTED_OPSET
    return _opset(
        f"up to {newest}",
        "incompatible" if old else "ok",
        "pip install 'qexport[onnx]'" if old else "",
    )


def system_name(root: Path) -> str:
    """Return the name of the distribution, `Ubuntu 22.04.4 LTS`, else that of the kernel."""
    path = root / "etc/os-release"
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        key, _, value = line.partition("=")
        if key == "PRETTY_NAME":
            return value.strip().strip("\"'")
    return f"{platform.system()} {platform.release()}"


def glibc_version() -> str | None:
    """Return the version of the C library, `2.35`; None where it is another than glibc."""
    names = getattr(os, "confstr_names", {})
    text = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in names else None
    return text.split()[-1] if text else platform.libc_ver()[1] or None


def _python_finding(ranges: Ranges) -> Finding:
    version = platform.python_version()
    wanted = ranges.python
    fits = wanted is None or wanted.fits(version)
    return Finding(
        group="system",
        name="Python",
        found=version,
        compatible=wanted.range if wanted else "",
        state="ok" if fits else "incompatible",
        advice="" if fits or wanted is None else f"make an environment with a Python {wanted.range}",
    )


def _glibc_finding() -> Finding:
    version, needs = glibc_version(), glibc_needs()
    name = max(needs, key=lambda one: numbers(needs[one])) if needs else ""
    old = bool(version and needs and numbers(version) < numbers(needs[name]))
    return Finding(
        group="system",
        name="glibc",
        found=version,
        compatible=f">={needs[name]}, for {name}" if needs else "",
        state="incompatible" if old else "ok" if version else "not applicable",
        advice=f"{name} needs glibc {needs[name]}: a newer system, or a container" if old else "",
    )


def _opset(found: str | None, state: Literal["ok", "incompatible", "not applicable"], advice: str) -> Finding:
    return Finding(
        group="ONNX",
        name="ONNX opset",
        found=found,
        compatible=f">={EXPORTED_OPSET}, of exports",
        state=state,
        advice=advice,
    )
