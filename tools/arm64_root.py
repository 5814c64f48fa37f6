"""Debian's arm64 user space in a folder, and qemu to run its programs. Needs no root and changes no system.

Everything comes from Debian by apt: the packages of the other architecture through an apt of their own, whose lists,
cache and status lie in the cache folder.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from qexport.errors import TargetUnavailable

RELEASE = "bookworm"
"""What Raspberry Pi OS 12 is made of."""
PYTHON = "3.11"
"""The release's own."""
# What the install script runs, and libstdc++6, which no Debian lacks: its apt needs it, and so does numpy.
PACKAGES = ("python3", "python3-venv", "dash", "coreutils", "libstdc++6")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_QEMU = ("qemu-aarch64-static", "qemu-aarch64")
_LAST_LINES = 5
_CHOSEN = re.compile(r"^Inst (\S+) \((\S+) .*\[(\w+)\]\)", re.MULTILINE)
"""Name, version and architecture, in what apt would install."""

Say = Callable[[str], None]


def prepare_root(cache: Path, mirror: str | None, say: Say) -> Path:
    """Return the folder of the user space, made on the first call, whole or not at all.

    Args:
        cache: what was downloaded stays there, so that a call that was cut off goes on.
        mirror: address of a Debian mirror; None takes that of this machine's apt.
        say: is told each step.

    Raises:
        TargetUnavailable: the packages cannot be had; says why.
    """
    recipe = hashlib.sha256(" ".join((RELEASE, *PACKAGES)).encode()).hexdigest()[:8]
    root = cache / f"{RELEASE}-arm64-{recipe}"
    if root.is_dir():
        return root
    archives = _download(cache / "apt", mirror or find_mirror(), say)
    say(f"unpacking {len(archives)} packages")
    partial = cache / f"{root.name}.part"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for archive in archives:
        run_tool(["dpkg-deb", "--extract", archive, partial])
    partial.rename(root)
    return root


def find_qemu(cache: Path, say: Say) -> Path:
    """Return qemu's user emulation of aarch64: this machine's, else Debian's or Ubuntu's package in the cache.

    Raises:
        TargetUnavailable: there is none, and its package cannot be had.
    """
    for name in _QEMU:
        if found := shutil.which(name):
            return Path(found)
    folder = cache / "qemu"
    program = folder / "usr/bin" / _QEMU[0]
    if program.is_file():
        return program
    say("downloading qemu-user-static")
    partial = cache / "qemu.part"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    run_tool(["apt-get", "download", "qemu-user-static"], cwd=partial)
    archive = next(partial.glob("qemu-user-static_*.deb"))
    run_tool(["dpkg-deb", "--extract", archive, partial])
    archive.unlink()
    partial.rename(folder)
    return program


def find_mirror() -> str:
    """Return the address of the Debian mirror that this machine's apt uses.

    Raises:
        TargetUnavailable: there is no apt, or it uses none.
    """
    listed = run_tool(
        [
            "apt-get",
            "indextargets",
            "--format",
            "$(CODENAME) $(REPO_URI)",
            "Created-By: Packages",
            "Origin: Debian",
        ]
    )
    rows = (line.split() for line in listed.splitlines())
    mirrors = [row[1] for row in rows if len(row) == 2 and "-" not in row[0]]
    if not mirrors:
        raise TargetUnavailable(
            "this machine's apt knows no Debian mirror. Give one: --mirror URL; or, on Debian, sudo apt-get update"
        )
    return mirrors[0]


def run_tool(command: Sequence[str | Path], cwd: Path | None = None) -> str:
    """Run a program of this machine; return what it prints.

    Raises:
        TargetUnavailable: it is not here, or fails; says with which words.
    """
    try:
        finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    except FileNotFoundError as error:
        raise TargetUnavailable(f"{command[0]} is not on this machine: Debian or Ubuntu is needed") from error
    if finished.returncode != 0:
        said = (finished.stderr or finished.stdout).strip().splitlines()
        told = [line for line in said if line.startswith(("E:", "ERROR"))] or said
        raise TargetUnavailable(f"{command[0]} {command[1]} fails: {'; '.join(told[-_LAST_LINES:])}")
    return finished.stdout


def _download(folder: Path, mirror: str, say: Say) -> list[Path]:
    """Have apt choose and fetch what the packages need; return the archives."""
    if not KEYRING.is_file():
        raise TargetUnavailable(f"{KEYRING} is missing. sudo apt-get install debian-archive-keyring")
    for name in ("state/lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "status").touch()  # nothing is installed there
    (folder / "sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror} {RELEASE} main\n")
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "",  # whose folders these are need not be readable by another
        "Acquire::Languages": "none",
        "Dir::State": folder / "state",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder / "cache",
        "Dir::Etc::sourcelist": folder / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::Etc::preferencesparts": "-",
    }
    options = [f"-o{name}={value}" for name, value in settings.items()]
    say(f"reading the package lists of Debian {RELEASE} for arm64")
    run_tool(["apt-get", "update", "--error-on=any", *options])
    install = ["apt-get", "install", "--yes", "--quiet=2", *options]
    chosen = _CHOSEN.findall(run_tool([*install, "--simulate", *PACKAGES]))
    say(f"downloading {len(chosen)} packages")
    run_tool([*install, "--download-only", *PACKAGES])
    # As apt names them; what an earlier call left of other versions stays out.
    return [
        folder / "cache/archives" / f"{name}_{version.replace(':', '%3a')}_{architecture}.deb"
        for name, version, architecture in chosen
    ]
