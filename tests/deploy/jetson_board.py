"""A made-up board: the files of an Orin Nano with JetPack 6 that deploy/jetson/board.sh reads, and a trtexec."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "deploy" / "jetson"
BOARD_FILES = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
    "proc/cpuinfo": "processor\t: 0\nprocessor\t: 1\nprocessor\t: 2\n",
    "proc/meminfo": "MemTotal:        7620236 kB\nMemFree:  1 kB\nMemAvailable:    5012340 kB\n",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\nCPU 1\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
    "var/lib/nvpmodel/status": "fmode: quiet\npmode:0002",
    "usr/local/cuda/version.json": '{\n "cuda" : {\n  "name" : "CUDA SDK",\n  "version" : "12.6.68"\n }\n}\n',
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "729600\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq": "1728000\n",
    "sys/class/devfreq/17000000.gpu/cur_freq": "306000000\n",
    "sys/class/devfreq/17000000.gpu/min_freq": "306000000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "1020000000\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "48218\n",
    "sys/class/thermal/thermal_zone1/type": "gpu-thermal\n",
    "sys/class/thermal/thermal_zone1/temp": "51500\n",
    "sys/class/thermal/cooling_device0/type": "gpu-throttle-alert\n",
    "sys/class/thermal/cooling_device0/cur_state": "1\n",
    "sys/class/thermal/cooling_device1/type": "pwm-fan\n",
    "sys/class/thermal/cooling_device1/cur_state": "2\n",
    "sys/class/hwmon/hwmon3/oc1_event_cnt": "0\n",
    "sys/class/hwmon/hwmon3/oc3_event_cnt": "27\n",
}

# Flags as `trtexec --help` of each release lists them (NVIDIA/TensorRT, samples/common/sampleOptions.cpp).
HELP_8_2 = """
  --onnx=<file>               ONNX model
  --workspace=N               Set workspace size in megabytes (default = 16)
  --profilingVerbosity=mode   Specify profiling verbosity. mode ::= layer_names_only|detailed|none
  --fp16                      Enable fp16 precision, in addition to fp32 (default = disabled)
  --int8                      Enable int8 precision, in addition to fp32 (default = disabled)
  --noDataTransfers           Disable DMA transfers to and from device (default = enabled).
  --useCudaGraph              Use CUDA graph to capture engine execution
  --separateProfileRun        Do not attach the profiler in the benchmark run
  --buildOnly                 Skip inference perf measurement (default = disabled)
"""
HELP_8_5 = (
    HELP_8_2
    + "  --memPoolSize=poolspec      Specify the size constraints of the designated memory pool(s) in MiB.\n"
)
HELP_10_3 = """
  --onnx=<file>                      ONNX model
  --memPoolSize=poolspec             Specify the size constraints of the designated memory pool(s)
  --profilingVerbosity=mode          Specify profiling verbosity. mode ::= layer_names_only|detailed|none
  --fp16                             Enable fp16 precision, in addition to fp32 (default = disabled)
  --int8                             Enable int8 precision, in addition to fp32 (default = disabled)
  --stronglyTyped                    Create a strongly typed network. (default = disabled)
  --noDataTransfers           Disable DMA transfers to and from device (default = enabled).
  --useCudaGraph              Use CUDA graph to capture engine execution
  --separateProfileRun        Do not attach the profiler in the benchmark run
  --skipInference             Exit after the engine has been built
"""
HELP_11_1 = """
  --onnx=<file>                      ONNX model
  --memPoolSize=poolspec             Specify the size constraints of the designated memory pool(s)
  --profilingVerbosity=mode          Specify profiling verbosity. mode ::= layer_names_only|detailed|none
  --stronglyTyped                    [Deprecated] Strongly typed network is now enabled by default.
  --noDataTransfers           [Deprecated] DMA transfers are now disabled by default. This flag is a no-op.
  --useCudaGraph              [Deprecated] CUDA graph is now enabled by default. This flag is a no-op.
  --separateProfileRun        [Deprecated] Separate profile run is now always enabled. This flag is a no-op.
  --skipInference             Exit after the engine has been built
"""


def make_root(folder: Path) -> Path:
    """Write the files of the board."""
    for name, text in BOARD_FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def make_artifact(folder: Path) -> Path:
    """Write what the scripts look for in an artifact; they do not read it."""
    folder.mkdir(parents=True)
    for name in ("artifact.json", "detector.int8.onnx", "detector.fp32.onnx"):
        (folder / name).write_text(name)
    return folder


def make_program(folder: Path, name: str, body: str) -> Path:
    """Write a program of a few lines of shell."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def make_trtexec(folder: Path, listing: str, *, fails: bool = False) -> Path:
    """Write a trtexec that lists flags and makes every file that it is asked for; it computes nothing.

    It runs an engine for as long as the board needs to be looked at once.
    """
    body = f"""case ${{1:-}} in --help) cat <<'HELP'\n{listing}\nHELP\nexit 0 ;; esac
for flag; do case $flag in --export*=*|--saveEngine=*) echo '[]' >"${{flag#*=}}" ;; esac; done
echo "$@" >>"{folder}/calls"
case $1 in --loadEngine=*) until [ -s results/watched.txt ]; do sleep 0.05; done ;; esac
{"echo 'no tactic found'; exit 1" if fails else "exit 0"}"""
    return make_program(folder, "trtexec", body)


def run_script(
    name: str, *words: str | Path, cwd: Path, code: int = 0, variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script of deploy/jetson by `sh`, and check its exit code."""
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
