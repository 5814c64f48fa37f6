"""What a Jetson says about itself: board, JetPack, and its DLA cores."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qexport.doctor.findings import Finding

_RELEASE = re.compile(r"#\s*R(?P<major>\d+)\s*\(release\),\s*REVISION:\s*(?P<revision>\d+(?:\.\d+)*)")
_DLA_NODES = ("nvdla*", "*/nvdla*", "*/*/nvdla*")
# NVIDIA's JetPack archive: the Jetson Linux (L4T) release that each JetPack is made of; the longest prefix counts.
_JETPACK_OF_L4T = {
    "32.6": "4.6", "32.7": "4.6", "34.1": "5.0", "35.1": "5.0", "35": "5.1", "36.2": "6.0", "36.3": "6.0",
    "36.4.0": "6.1", "36.4": "6.2", "36.5": "6.2", "38.2": "7.0", "38.4": "7.1", "39.2": "7.2", "39.2.1": "7.2.1",
}  # fmt: skip
# The Python of the Ubuntu that each JetPack is based on; JetPack's TensorRT module is for it alone.
_PYTHON_OF_JETPACK = {"4": "3.6", "5": "3.8", "6": "3.10", "7": "3.12"}


@dataclass(frozen=True, slots=True)
class Jetson:
    """What is known of a Jetson."""

    board: str
    """`NVIDIA Jetson Orin Nano Developer Kit`; empty where the device tree does not say."""
    l4t: str | None
    """Release of Jetson Linux, `36.4.3`."""
    jetpack: str | None
    """`6.2`, or None where neither its package nor the release of Jetson Linux tells."""
    dla_cores: int
    """Enabled in the device tree."""

    @property
    def python(self) -> str | None:
        """Version of Python that JetPack's own TensorRT module is for, `3.10`."""
        return _PYTHON_OF_JETPACK.get((self.jetpack or "").partition(".")[0])


def find_jetson(root: Path) -> Jetson | None:
    """Return what a Jetson says about itself; None on another machine.

    Args:
        root: folder that stands for `/`.
    """
    board = parse_device_tree_text(_bytes(root / "proc/device-tree/model"))
    l4t = parse_l4t(_bytes(root / "etc/nv_tegra_release").decode(errors="replace"))
    if l4t is None and not ("nvidia" in board.lower() or "jetson" in board.lower()):
        return None
    packages = parse_dpkg_status(
        _bytes(root / "var/lib/dpkg/status").decode(errors="replace"), ("nvidia-jetpack", "nvidia-l4t-core")
    )
    if l4t is None and "nvidia-l4t-core" in packages:
        l4t = packages["nvidia-l4t-core"].partition("-")[0]
    package = packages.get("nvidia-jetpack")
    jetpack = parse_jetpack_version(package) if package else jetpack_of_l4t(l4t) if l4t else None
    return Jetson(board, l4t, jetpack, count_dla_cores(root))


def jetson_findings(jetson: Jetson | None, *, python: str, tensorrt_dla: int | None) -> tuple[Finding, ...]:
    """Return the rows of board, JetPack and DLA.

    Args:
        jetson: what was found; None on another machine.
        python: version of the running Python, `3.10`.
        tensorrt_dla: DLA cores that TensorRT counts; None where it was not asked.
    """
    if jetson is None:
        return tuple(
            Finding(group="Jetson", name=name, found=None, state="not applicable")
            for name in ("board", "JetPack", "DLA cores")
        )
    cores = jetson.dla_cores if tensorrt_dla is None else tensorrt_dla
    return (
        Finding(group="Jetson", name="board", found=jetson.board or None, state="ok"),
        _jetpack_finding(jetson, python),
        Finding(
            group="Jetson",
            name="DLA cores",
            found=f"{cores}, {'from the device tree' if tensorrt_dla is None else 'as TensorRT counts them'}"
            if cores
            else None,
            state="ok" if cores else "not applicable",
        ),
    )


def parse_l4t(text: str) -> str | None:
    """Return the release in `/etc/nv_tegra_release`, `36.4.3`; None where the text has none."""
    match = _RELEASE.search(text)
    return f"{match['major']}.{match['revision']}" if match else None


def parse_dpkg_status(text: str, names: Iterable[str]) -> dict[str, str]:
    """Return the versions of installed packages out of `/var/lib/dpkg/status`."""
    found = {}
    for name in names:
        match = re.search(rf"^Package: {re.escape(name)}\n(?:.+\n?)*", text, re.MULTILINE)
        fields = dict(re.findall(r"^(Status|Version): (.*)$", match[0], re.MULTILINE)) if match else {}
        if fields.get("Status", "").endswith(" installed") and "Version" in fields:
            found[name] = fields["Version"].strip()
    return found


def parse_jetpack_version(package: str) -> str:
    """Return the JetPack of a version of the package nvidia-jetpack: `6.2.1` of `6.2.1+b38`, `4.6` of `4.6-b197`."""
    return re.split(r"[+-]", package, maxsplit=1)[0]


def jetpack_of_l4t(l4t: str) -> str | None:
    """Return the JetPack that a release of Jetson Linux belongs to; None for one that is not known."""
    parts = l4t.split(".")
    prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((_JETPACK_OF_L4T[prefix] for prefix in prefixes if prefix in _JETPACK_OF_L4T), None)


def parse_device_tree_text(data: bytes) -> str:
    """Return a string of the device tree, which ends with a zero byte."""
    return data.partition(b"\0")[0].decode(errors="replace").strip()


def count_dla_cores(root: Path) -> int:
    """Count the DLA nodes of the device tree that are not disabled: a board may lack what its chip family has."""
    tree = root / "proc/device-tree"
    nodes = [node for pattern in _DLA_NODES for node in tree.glob(pattern) if (node / "compatible").is_file()]
    return sum(parse_device_tree_text(_bytes(node / "status")) in ("", "okay", "ok") for node in nodes)


def _jetpack_finding(jetson: Jetson, python: str) -> Finding:
    release = f"L4T {jetson.l4t}" if jetson.l4t else "L4T unknown"
    matching = jetson.python in (None, python)
    return Finding(
        group="Jetson",
        name="JetPack",
        found=f"{jetson.jetpack or 'not known to this qexport'} ({release})",
        compatible=f"its TensorRT module is for Python {jetson.python}" if jetson.python else "",
        state="ok",
        advice="" if matching else python_advice(jetson, python),
    )


def python_advice(jetson: Jetson, python: str) -> str:
    """Say what to do where JetPack's TensorRT module is for another Python than the one that runs."""
    needed = tuple(map(int, (jetson.python or "0.0").split(".")))
    if needed < (3, 10):
        return (
            f"JetPack {jetson.jetpack} has TensorRT for Python {jetson.python} alone, which is too old for qexport: "
            "build and time engines with trtexec"
        )
    return (
        f"JetPack's TensorRT is for Python {jetson.python}, this is {python}: "
        f"python{jetson.python} -m venv --system-site-packages venv"
    )


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # not a Jetson, or a file that this user may not read: then it says nothing
        return b""
