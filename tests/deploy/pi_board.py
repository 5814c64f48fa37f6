"""A made-up Raspberry Pi: its files, a bundle whose install script installs a qexport of a few lines, ssh and sudo."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from jetson_board import make_program

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "deploy" / "raspberrypi"
GOVERNOR = "sys/devices/system/cpu/cpufreq/policy0/scaling_governor"
BOARD_FILES = {
    "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    "proc/meminfo": "MemTotal:        8256208 kB\nMemAvailable:    7012340 kB\n",
    GOVERNOR: "ondemand\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_available_governors": "ondemand performance schedutil\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "1500000\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq": "2400000\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "48218\n",
}

# What the bundle's own script would install: it writes down how it was called, and answers as it is told to.
QEXPORT = """
printf '%s|' "$@" >>"$CALLS"; echo >>"$CALLS"
command=$1; shift
out='' images=''
while [ $# -gt 0 ]; do
    case $1 in
        --json | --out) out=$2; shift ;;
        --help) echo "${DETECT_HELP:-IMAGE|FOLDER}"; exit 0 ;;
        --*) shift ;;
        *) images="$images $1" ;;
    esac
    shift
done
case $command in
    verify) echo '{"verdict": "x"}' >"$out.tmp"; [ -z "$out" ] || mv "$out.tmp" "$out"; exit "${VERIFY_ANSWERS:-0}" ;;
    bench)
        [ -z "${GOVERNOR_FILE:-}" ] || cat "$GOVERNOR_FILE" >>"$CALLS"
        [ "${BENCH_ANSWERS:-0}" -gt 1 ] || echo '{}' >"$out"
        exit "${BENCH_ANSWERS:-0}"
        ;;
    detect)
        if [ "$out" = - ]; then echo '{"image":"frame 1"}'; echo '{"image":"frame 2"}'; exit "${DETECT_ANSWERS:-0}"; fi
        for image in $images; do case $image in
            *bad*) echo "error: $image: not a readable image" >&2; exit 2 ;;
            *crash*) exit "${DETECT_ANSWERS:-1}" ;;
        esac; done
        for image in $images; do case $image in
            */bundle* | *.qbundle) ;;
            *) echo "{\\"image\\":\\"$image\\"}" ;;
        esac; done >"$out"
        ;;
esac
exit 0
"""
INSTALL = """
case " $* " in *" --dry-run "*) exit 0 ;; esac
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
venv="$here.venv"
echo "install $*" >>"$CALLS"
while [ $# -gt 0 ]; do case $1 in --venv) venv=$2; shift ;; esac; shift; done
mkdir -p "$venv/bin" && cp "$here/wheel/qexport" "$venv/bin/qexport" && cp "$here/wheel/python" "$venv/bin/python"
exit "${INSTALL_ANSWERS:-0}"
"""


def release(version: str, name: str = "debian") -> str:
    """Return /etc/os-release of Raspberry Pi OS, which calls itself Debian."""
    return f'PRETTY_NAME="Debian GNU/Linux {version}"\nVERSION_ID="{version}"\nID={name}\n'


def make_root(folder: Path, version: str = "13") -> Path:
    """Write the files of the board."""
    for name, text in {**BOARD_FILES, "etc/os-release": release(version)}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "etc/systemd/system").mkdir(parents=True)
    return folder


def make_bundle(folder: Path) -> Path:
    """Write what the scripts use of a bundle; the digests are qexport's to check."""
    (folder / "golden" / "0").mkdir(parents=True)
    (folder / "golden" / "0" / "frame.png").write_text("")
    (folder / "bundle.json").write_text("{}")
    make_program(folder, "install.sh", INSTALL)
    make_program(folder / "wheel", "qexport", QEXPORT)
    make_program(folder / "wheel", "python", "exit 1")
    return folder


def make_board(tmp_path: Path, *, version: str = "13", architecture: str = "arm64") -> dict[str, str]:
    """Make the board; return the variables in which scripts find it."""
    root = make_root(tmp_path / "board", version)
    programs = tmp_path / "programs"
    make_program(programs, "dpkg", f"echo {architecture}")
    make_program(programs, "sudo", 'echo "sudo $*" >>"$CALLS"; exec "$@"')
    make_program(programs, "vcgencmd", "echo throttled=0x0")
    for name in ("apt-get", "systemctl", "useradd"):
        make_program(programs, name, f'echo "{name} $*" >>"$CALLS.programs"')
    return {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "QEXPORT_BOARD_ROOT": str(root),
        "CALLS": str(tmp_path / "calls"),
    }


def make_network(tmp_path: Path) -> None:
    """Make an ssh that runs commands in the folder `home`, and an scp that copies from there and to there."""
    home = tmp_path / "home"
    home.mkdir()
    programs = tmp_path / "programs"
    make_program(
        programs,
        "ssh",
        f"""printf '%s|' ssh "$@" >>"{tmp_path / "network"}"; echo >>"{tmp_path / "network"}"
[ -z "${{SSH_ANSWERS:-}}" ] || exit "$SSH_ANSWERS"
for last; do :; done
cd "{home}" && exec sh -c "$last" """,
    )
    make_program(
        programs,
        "scp",
        f"""printf '%s|' scp "$@" >>"{tmp_path / "network"}"; echo >>"{tmp_path / "network"}"
while [ $# -gt 2 ]; do shift; done
case $1 in *:*) from="{home}/${{1#*:}}" ;; *) from=$1 ;; esac
case $2 in *:*) to="{home}/${{2#*:}}" ;; *) to=$2 ;; esac
exec cp -R "$from" "$to" """,
    )


def calls(tmp_path: Path, name: str = "calls") -> list[str]:
    """Return what was written down, one call a line."""
    path = tmp_path / name
    return path.read_text().splitlines() if path.exists() else []


def run_script(
    name: str, *words: str | Path, cwd: Path, code: int = 0, variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script of deploy/raspberrypi by `sh`, and check its exit code."""
    finished = subprocess.run(
        ["sh", str(SCRIPTS / name), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=cwd,
        env={**os.environ, "HOME": str(cwd), **(variables or {})},
    )
    assert finished.returncode == code, finished.stdout + finished.stderr
    return finished
