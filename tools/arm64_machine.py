"""An arm64 machine without a board: programs of Debian's arm64 user space, each run by qemu's user emulation.

The kernel is this machine's, and it starts a program of another architecture only where binfmt_misc is set up, which
takes rights that a user does not have. So every program is called through a shell script of two lines that starts
qemu with it; the scripts are all that is on the PATH. Python takes its name from the script, so that a virtual
environment links to the script and works as one of its own.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from arm64_root import PYTHON, Say

from qexport.errors import TargetUnavailable
from qexport.files import write_bytes

PROGRAMS = {
    "sh": "bin/dash",
    "cat": "bin/cat",
    "dirname": "usr/bin/dirname",
    "sha256sum": "usr/bin/sha256sum",
    "uname": "bin/uname",
    "python3": f"usr/bin/python{PYTHON}",
}
"""What the install script calls, in the root."""
_SCRIPTS = "usr/local/bin"
_READ_CAPABILITIES = "import ctypes; print(ctypes.CDLL(None).getauxval(16))"  # AT_HWCAP
# By bit, as the kernel names them in /proc/cpuinfo (arch/arm64/include/uapi/asm/hwcap.h).
_FEATURES = (
    *(
        "fp",
        "asimd",
        "evtstrm",
        "aes",
        "pmull",
        "sha1",
        "sha2",
        "crc32",
        "atomics",
        "fphp",
        "asimdhp",
        "cpuid",
    ),
    *(
        "asimdrdm",
        "jscvt",
        "fcma",
        "lrcpc",
        "dcpop",
        "sha3",
        "sm3",
        "sm4",
        "asimddp",
        "sha512",
        "sve",
        "asimdfhm",
    ),
    *("dit", "uscat", "ilrcpc", "flagm", "ssbs", "sb", "paca", "pacg"),
)
_CPUINFO = """processor\t: {number}
BogoMIPS\t: 108.00
Features\t: {features}
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: {part:#05x}
CPU revision\t: 3

"""
_SYSTEM_VARIABLES = re.compile(r"(SSL_CERT_\w+|\w+_proxy)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Cpu:
    """A processor that qemu emulates."""

    name: str
    """As qemu calls it."""
    part: int
    """As the processor itself says (MIDR_EL1)."""
    boards: str


CPUS = (
    Cpu("cortex-a72", 0xD08, "Raspberry Pi 4"),
    Cpu("cortex-a76", 0xD0B, "Raspberry Pi 5"),
)


def features_of(capabilities: int) -> str:
    """Return the line `Features` of /proc/cpuinfo for the kernel's AT_HWCAP."""
    return " ".join(name for bit, name in enumerate(_FEATURES) if capabilities >> bit & 1)


@dataclass(frozen=True, slots=True)
class Machine:
    """What runs arm64 programs."""

    qemu: Path
    root: Path
    folder: Path
    """Of its own: home, temporary files, a view of the root for each processor."""

    @property
    def scripts(self) -> Path:
        """The folder of the scripts that start qemu."""
        return self.root / _SCRIPTS

    def prepare(self, say: Say) -> None:
        """Write the scripts, and for each processor the /proc/cpuinfo by which the runtimes choose their kernels.

        Raises:
            TargetUnavailable: this qemu does not know a processor, or does not run here.
        """
        for name, program in PROGRAMS.items():
            path = self.scripts / name
            command = (
                f'exec {shlex.quote(str(self.qemu))} -0 "$0" {shlex.quote(str(self.root / program))} "$@"'
            )
            write_bytes(path, f"#!/bin/sh\n{command}\n".encode())
            path.chmod(0o755)
        for name in ("home", "tmp"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for cpu in CPUS:
            self._make_view(cpu)
            found = self.run(cpu, [self.scripts / "python3", "-c", _READ_CAPABILITIES])
            if found.returncode != 0:
                raise TargetUnavailable(f"{self.qemu} runs no {cpu.name} here: {found.stderr.strip()}")
            features = features_of(int(found.stdout))
            say(f"{cpu.name} ({cpu.boards}): {features}")
            processors = range(os.cpu_count() or 1)  # /sys stays this machine's, and says so many
            text = "".join(_CPUINFO.format(number=n, features=features, part=cpu.part) for n in processors)
            write_bytes(self._view(cpu) / "proc/cpuinfo", text.encode())

    def run(self, cpu: Cpu, command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
        """Run a program, and what it starts, on a processor; never to be timed."""
        variables = {name: value for name, value in os.environ.items() if _SYSTEM_VARIABLES.fullmatch(name)}
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
            env=variables
            | {
                "PATH": str(self.scripts),
                "HOME": str(self.folder / "home"),
                "TMPDIR": str(self.folder / "tmp"),
                "LANG": "C.UTF-8",
                "PIP_NO_COMPILE": "1",  # compiling takes longer under emulation than it would save
                "QEMU_CPU": cpu.name,
                "QEMU_LD_PREFIX": str(self._view(cpu)),
            },
        )

    def _view(self, cpu: Cpu) -> Path:
        return self.folder / cpu.name

    def _make_view(self, cpu: Cpu) -> None:
        """Link what the root has; /proc/cpuinfo alone is the processor's own."""
        view = self._view(cpu)
        (view / "proc").mkdir(parents=True, exist_ok=True)
        for entry in self.root.iterdir():
            link = view / entry.name
            if link.is_symlink():
                link.unlink()  # of an earlier root
            link.symlink_to(entry)
