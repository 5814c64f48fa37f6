"""Install bundles in an emulated arm64 Debian by their own script, and verify them on the Pi's processors.

    python tools/check_arm64.py                        the CPU targets of the demo detector
    python tools/check_arm64.py --target tflite onnx   without PyTorch, whose wheels come to 3 GB
    python tools/check_arm64.py --bundle mine.qbundle.tar

Says for each processor whether every value is the workstation's, or where not. Emulation says nothing about speed:
nothing is timed here. The first call downloads some 90 MB of Debian packages and the bundle's wheels into
.cache/arm64; a call that was cut off goes on where it was. executorch and qnnpack run in PyTorch, whose build for Arm
on the package index brings CUDA's libraries: 3 GB to fetch, 6 GB installed, though nothing of CUDA is used.

XNNPACK's int8 kernels compute the same bits on x86 and Arm, so of a TFLite or ExecuTorch bundle every bit is asked.
ONNX Runtime rounds some additions otherwise on Arm: of an ONNX bundle inner tensors may be some steps off, and the
detections have to be the same in number and class. Of a QNNPACK bundle every bit of the inner tensors is asked; its
boxes, which torch computes in float32, may differ. What differs is printed all the same.

Exit codes: 0 as promised on every processor; 1 not, or the bundle does not install; 2 wrong option or bundle;
3 packages cannot be had, with the reason.
"""

from __future__ import annotations

import argparse
import fcntl
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from arm64_machine import CPUS, Cpu, Machine
from arm64_root import PYTHON, find_qemu, prepare_root, run_tool

from qexport.bundle import BundleManifest, open_bundle
from qexport.errors import BundleError, GateFailed, ParityError, QexportError, RunFolderError
from qexport.files import read_json
from qexport.verifying import VerifyReport, describe

REPOSITORY = Path(__file__).parents[1]
TOLERANCE_STEPS: dict[str, int | None] = {"tflite": None, "onnx": 4, "executorch": None, "qnnpack": 0}
"""By target; None: every bit, of the outputs too. ONNX Runtime's QLinearAdd is 1 step off in single values, and what is
computed of them 2."""
_GLIBC = range(36, 16, -1)
"""Minor versions of glibc 2 that wheels for the release may ask for."""
_PIP_OF_ARM = """
import platform, runpy
platform.machine = lambda: "aarch64"
runpy.run_module("pip", run_name="__main__")
"""
"""pip takes files of the platform that it is told, but reads conditions of requirements as of its own machine."""
_SOURCE_ONLY = {"executorch": ("antlr4-python3-runtime",)}
"""By target, what its requirements name and the package index has as source alone, of pure Python."""
_DIFFERS = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Check; return the exit code."""
    options = _options(arguments)
    cache = options.cache.resolve()
    try:
        for bundle in options.bundle or ():
            with open_bundle(bundle):
                pass  # refused before anything is downloaded
        with _locked(cache):
            machine = _machine(cache, options.mirror)
            bundles = options.bundle or [_demo_bundle(cache, target) for target in options.target]
            failed = [line for bundle in bundles for line in _check(machine, cache, bundle)]
        if failed:
            raise ParityError(f"not as on the workstation: {'; '.join(failed)}. What differs is above.")
    except QexportError as error:
        sys.stderr.write(f"check_arm64: {error}\n")
        return error.exit_code
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--bundle", type=Path, action="append", help="folder or archive; may be given several times"
    )
    what.add_argument(
        "--target",
        nargs="+",
        choices=TOLERANCE_STEPS,
        default=list(TOLERANCE_STEPS),
        help="of the demo detector",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=REPOSITORY / ".cache/arm64",
        help="default: .cache/arm64 of the repository",
    )
    parser.add_argument("--mirror", metavar="URL", help="Debian mirror; default: that of this machine's apt")
    return parser.parse_args(arguments)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """Keep a second check out of the cache."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunFolderError(
                f"{cache}: another check runs there. Wait for it, or give another --cache."
            ) from error
        yield


def _machine(cache: Path, mirror: str | None) -> Machine:
    qemu = find_qemu(cache, _say)
    machine = Machine(qemu, prepare_root(cache, mirror, _say), cache / "machine")
    _say(run_tool([qemu, "--version"]).splitlines()[0])
    machine.prepare(_say)
    return machine


def _demo_bundle(cache: Path, target: str) -> Path:
    """Return a new bundle of the demo detector with one golden frame."""
    from qexport import pipeline  # noqa: PLC0415 - loads torch, which a bundle that is given does not need
    from qexport.bundling import write_bundle  # noqa: PLC0415
    from qexport.detectors.demo.scenes import write_scenes  # noqa: PLC0415
    from qexport.settings import Settings  # noqa: PLC0415

    _say(f"exporting the demo detector for {target}")
    scenes = cache / "scenes"
    write_scenes(scenes)
    run = cache / f"demo-{target}.run"
    shutil.rmtree(run, ignore_errors=True)  # an earlier state of this checkout may have made it
    work = pipeline.start(run, Settings(model="demo", data=str(scenes), calibration_images=16))
    pipeline.calibrate(work)
    pipeline.export(work, target)
    return write_bundle(run, target, cache / f"demo-{target}.qbundle", frames=1).archive


def _check(machine: Machine, cache: Path, bundle: Path) -> list[str]:
    """Install a bundle and verify it on every processor; return where it is not as it should be."""
    place = cache / "board"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    with open_bundle(bundle) as opened:
        manifest = opened.manifest
        copy = Path(shutil.copytree(opened.folder, place / "bundle"))
    (copy / "install.sh").chmod(0o755)
    _say(f"{bundle.name}: target {manifest.target}, {len(manifest.golden)} golden frames")
    _install(machine, copy, _wheels(cache, copy, manifest))
    failed = []
    for cpu in CPUS:
        report = _verify(machine, cpu, copy, TOLERANCE_STEPS.get(manifest.target))
        verdict, *details = describe(report)
        for line in (f"emulated {cpu.name} ({cpu.boards}): {verdict}", *details):
            _say(line)
        if report.verdict == "differs":
            failed.append(f"{manifest.target} on {cpu.name}")
    return failed


def _wheels(cache: Path, bundle: Path, manifest: BundleManifest) -> Path:
    """Download the wheels that the bundle needs, in the versions that the workstation is tested with."""
    folder = cache / "wheels"
    platforms = [f"manylinux_2_{minor}_aarch64" for minor in _GLIBC] + ["manylinux2014_aarch64"]
    _say(f"downloading wheels for arm64 and Python {PYTHON}")
    for stale in folder.glob("qexport-*.whl"):
        stale.unlink()  # of an earlier state of this checkout: pip keeps what is there
    constraint = ("--constraint", str(REPOSITORY / "constraints.txt"))
    pip = [sys.executable, "-c", _PIP_OF_ARM]
    if names := _SOURCE_ONLY.get(manifest.target):
        run_tool([*pip, "wheel", "--quiet", "--no-deps", *constraint, "--wheel-dir", str(folder), *names])
    run_tool(
        [
            *(*pip, "download", "--quiet", "--only-binary", ":all:", "--python-version", PYTHON),
            *(word for platform in platforms for word in ("--platform", platform)),
            *(*constraint, "--find-links", str(folder)),
            *("--dest", str(folder), f"{bundle / manifest.wheel}[{manifest.extra}]"),
        ]
    )
    return folder


def _install(machine: Machine, bundle: Path, wheels: Path) -> None:
    """Run the bundle's script as it is; what verifies is asked apart, on every processor."""
    _say("installing by install.sh")
    script, shell = bundle / "install.sh", machine.scripts / "sh"
    command: list[str | Path] = [shell, script, "--wheels", wheels, "--no-verify"]
    finished = machine.run(CPUS[0], command)
    if finished.returncode != 0:
        raise GateFailed(f"install.sh exits with {finished.returncode}: {_last_words(finished)}")


def _verify(machine: Machine, cpu: Cpu, bundle: Path, tolerance_steps: int | None) -> VerifyReport:
    _say(f"verifying on {cpu.name}")
    out = machine.folder / f"verify-{cpu.name}.json"
    out.unlink(missing_ok=True)
    program = bundle.with_name(f"{bundle.name}.venv") / "bin/qexport"
    command: list[str | Path] = [program, "verify", bundle, "--json", out]
    if tolerance_steps is not None:
        command += ["--tolerance-steps", str(tolerance_steps)]
    finished = machine.run(cpu, command)
    if finished.returncode not in (0, _DIFFERS) or not out.is_file():
        raise GateFailed(
            f"qexport verify on {cpu.name} exits with {finished.returncode}: {_last_words(finished)}"
        )
    return read_json(out, VerifyReport, BundleError)


def _last_words(finished: subprocess.CompletedProcess[str]) -> str:
    return "\n".join((finished.stdout + finished.stderr).strip().splitlines()[-10:])


if __name__ == "__main__":
    sys.exit(main())
