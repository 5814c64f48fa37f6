"""A run of the QNNPACK target by the command line: report, bundle, verify, detect, bench, and what installs it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_fixtures import DETECTOR, MEASURED, call
from test_bundle_install import install, refused

from qexport.bundle import INSTALL
from qexport.detectors.demo.scenes import write_scenes
from qexport.target import TARGETS, find_target, latency_note

NOTE = "QNNPACK's fast kernels are for Arm"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, `mine`, and its bundle, `mine.qbundle`."""
    folder = tmp_path_factory.mktemp("qnnpack-run")
    write_scenes(folder / "data", train=2, val=2, test=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "200")
        patch.setattr("os.cpu_count", lambda: 1)  # tests share the machine
        answer = call("run", *DETECTOR, "--target", "qnnpack", "--out", "mine", *MEASURED)
        assert answer.code == 0, answer.err
        (folder / "answer.txt").write_text(answer.out)
        answer = call("bundle", "mine", "--target", "qnnpack", "--out", "mine.qbundle")
        assert answer.code == 0, answer.err
    return folder


def test_run_ends_with_every_gate_passed_and_a_report_with_its_note(finished: Path) -> None:
    from qexport.benchmarks.machine import describe_machine  # noqa: PLC0415

    if not latency_note("qnnpack", describe_machine().system):
        pytest.skip("this is an Arm processor, whose latency is what the target is about")
    assert NOTE in " ".join((finished / "answer.txt").read_text().split())
    html = (finished / "mine" / "report.html").read_text()
    assert html.count("fast kernels are for Arm") >= 2
    profile = json.loads((finished / "mine" / "qnnpack" / "latency.json").read_text())
    assert profile["accounted_share"] > 0.9


def test_bundle_verifies_detects_and_measures(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = str(finished / "mine.qbundle")
    answer = call("verify", bundle)
    assert answer.code == 0, answer.err
    assert answer.out.startswith("identical: 2 golden frames")
    image = next((finished / "data" / "images").glob("*.png"))
    answer = call("detect", bundle, str(image), "--json", "-")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["boxes"]
    answer = call(
        "bench", bundle, "--runs", "2", "--warmup", "1", "--min-accounted", "0.01", "--out", "m.json"
    )
    assert answer.code == 0, answer.err
    assert json.loads((tmp_path / "m.json").read_text())["profile"]["target"] == "qnnpack"


def test_bundle_installs_torch_from_the_index_that_the_user_names(finished: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(finished / "mine.qbundle", tmp_path / "mine.qbundle"))
    text = (bundle / INSTALL).read_text()
    assert "extra='qnnpack-runtime'" in text
    done = install(bundle, "--dry-run", "--torch-index", "https://wheels.invalid/cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pip = [line.partition("pip install ")[2] for line in done.stdout.splitlines() if "pip install" in line]
    assert "--index-url https://wheels.invalid/cpu" in pip[0]
    words = pip[0].split()
    assert [word.partition(">")[0] for word in words if ">=" in word] == ["torch", "torchvision"]
    assert not [line for line in pip[1:] if "index" in line]
    plain = install(bundle, "--dry-run", cwd=tmp_path)
    assert "wheels.invalid" not in plain.stdout
    folder = install(bundle, "--dry-run", "--torch-index", "wheels", cwd=tmp_path)
    refused(folder, 2, "--torch-index wheels: no address of a package index", "--wheels")


def test_index_of_torch_may_be_named_by_a_variable_and_is_not_asked_where_wheels_are_given(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(finished / "mine.qbundle", tmp_path / "mine.qbundle"))
    monkeypatch.setenv("QEXPORT_TORCH_INDEX", "https://wheels.invalid/cpu")
    assert "--index-url https://wheels.invalid/cpu" in install(bundle, "--dry-run", cwd=tmp_path).stdout
    (tmp_path / "wheels").mkdir()
    done = install(bundle, "--dry-run", "--wheels", tmp_path / "wheels", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "wheels.invalid" not in done.stdout


def test_bundle_without_torch_in_its_environment_names_what_installs_it(
    finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('made unavailable')\n")
    code = (
        "import sys; from qexport.errors import TargetUnavailable\n"
        "from qexport.runtimes.qnnpack import RUNNER; from pathlib import Path\n"
        "try: RUNNER(Path(sys.argv[1])).open()\n"
        "except TargetUnavailable as error: print(error.exit_code, error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, finished / "mine" / "qnnpack"],
        capture_output=True, text=True, timeout=60, check=False,
        env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"},
    )  # fmt: skip
    assert done.stdout.startswith("3 PyTorch does not load here: made unavailable"), done.stderr
    assert "qexport[qnnpack-runtime]" in done.stdout


@pytest.mark.parametrize("system", ["Linux 6.1.0-rpi7 aarch64", "Darwin 24.0 arm64"])
def test_latency_note_is_not_said_on_arm(system: str) -> None:
    assert not latency_note("qnnpack", system)


def test_latency_note_is_said_elsewhere_and_of_no_other_target() -> None:
    assert latency_note("qnnpack", "Linux 6.1 x86_64").startswith(NOTE)
    others = [target.name for target in TARGETS if not target.kernels_for]
    assert "onnx" in others
    assert not any(latency_note(name, "Linux 6.1 x86_64") for name in [*others, "unknown"])
    assert find_target("qnnpack").missing("run") == ()
