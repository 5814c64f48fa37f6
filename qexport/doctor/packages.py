"""Python packages: which are installed, and whether they are the versions that qexport was tested with.

Nothing is imported: what imports badly is often what is being looked for.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path

import msgspec

from qexport.doctor.findings import Finding, Group
from qexport.doctor.requirements import Ranges, normalise, parse_requirement
from qexport.target import find_target
from qexport.versions import is_importable, package_versions

UNKNOWN = "of unknown version"


@dataclass(frozen=True, slots=True)
class Package:
    """A package that a target may need."""

    module: str
    group: Group
    distributions: tuple[str, ...] = ()
    """Names that pip knows it by; the module's own where there are none."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names that pip knows it by."""
        return self.distributions or (self.module,)


PACKAGES = (
    Package("torch", "PyTorch"),
    Package("torchvision", "PyTorch"),
    Package("torchao", "PyTorch"),
    Package("safetensors", "PyTorch"),
    Package("onnx", "ONNX"),
    Package("onnxscript", "ONNX"),
    Package("onnxsim", "ONNX"),
    # The wheels for a GPU, those of a Jetson among them, go by the second name.
    Package("onnxruntime", "ONNX", ("onnxruntime", "onnxruntime-gpu")),
)
TORCH2TRT = Package("torch2trt", "torch2trt")
RTX_BINDINGS = Package("tensorrt_rtx_bindings", "TensorRT", ("tensorrt-rtx-cu13-bindings",))


def installed_version(package: Package) -> str | None:
    """Return the version of a package, without importing it; None where it cannot be imported."""
    if not is_importable(package.module):
        return None
    return next(iter(package_versions(*package.names).values()), UNKNOWN)


def package_findings(ranges: Ranges) -> tuple[Finding, ...]:
    """Return a row for each package of PyTorch and ONNX."""
    return tuple(_finding(package, ranges) for package in PACKAGES)


def torch2trt_finding(ranges: Ranges) -> Finding:
    """Return the row of torch2trt, which no package index holds."""
    found = _finding(TORCH2TRT, ranges)
    if found.state == "missing":
        advice = find_target("torch2trt").install_command("export")
        return msgspec.structs.replace(found, advice=advice)
    return found


def mismatch(package: Package, ranges: Ranges) -> str:
    """Say why an installed package does not fit: its version, or what it was built for; empty where it fits."""
    version = installed_version(package)
    if version is None or version == UNKNOWN:
        return ""
    wanted = ranges.of(*package.names)
    if wanted and not any(one.fits(version) for one in wanted):
        return f"{package.module} {version}, tested with {' or '.join(one.range for one in wanted)}"
    return _torch_mismatch(version) if package.module == "torchvision" else ""


def torch_cuda() -> str | None:
    """Return the CUDA version that the installed torch was built with, `13.0`; None for none."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name("version.py")
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    match = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return match[1] if match else None


def glibc_needs() -> dict[str, str]:
    """Return the lowest glibc that each installed package with compiled code runs on, `{"torch": "2.28"}`."""
    packages = (*PACKAGES, RTX_BINDINGS)
    names = ("numpy", *(name for package in packages for name in package.names))
    found = {}
    for name in names:
        try:
            tags = distribution(name).read_text("WHEEL") or ""
        except PackageNotFoundError:
            continue
        versions = [(int(major), int(minor)) for major, minor in re.findall(r"manylinux_(\d+)_(\d+)_", tags)]
        if versions:
            found[name] = ".".join(map(str, min(versions)))
    return found


def _finding(package: Package, ranges: Ranges) -> Finding:
    version = installed_version(package)
    wanted = ranges.of(*package.names)
    extra = wanted[0].extra if wanted else ""
    # The smaller extra where a range of its own is there for it: what a board installs.
    install = " or ".join(f"pip install 'qexport[{one.extra}]'" for one in wanted if one.extra)
    compatible = (
        wanted[0].range if len(wanted) == 1 else "; ".join(f"{one.range} ({one.extra})" for one in wanted)
    )
    wrong = mismatch(package, ranges)
    return Finding(
        group=package.group,
        name=package.module,
        found=version,
        compatible=compatible,
        state="missing" if version is None else "incompatible" if wrong else "ok",
        advice=install if version is None else f"{wrong}: pip install 'qexport[{extra}]'" if wrong else "",
    )


def _torch_mismatch(torchvision: str) -> str:
    """Say which torch a torchvision was built for, where another is installed: it then fails when imported."""
    torch = package_versions("torch").get("torch")
    for line in requires("torchvision") or ():
        if normalise(re.split(r"[\s(<>=!~;]", line, maxsplit=1)[0]) == "torch":
            wanted = parse_requirement(line)
            if torch and not wanted.fits(torch):
                return f"torchvision {torchvision} was built for torch {wanted.range}, torch {torch} is installed"
    return ""
