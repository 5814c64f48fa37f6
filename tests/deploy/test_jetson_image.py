"""Dockerfile.jetson: linted, and what of it needs neither docker nor NVIDIA's images is run in a plain folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jetson_board import ROOT

DOCKERFILE = ROOT / "Dockerfile.jetson"
NO_NETWORK = re.compile(
    "NewConnectionError|ConnectTimeout|ReadTimeout|ProxyError|name resolution|Network is unreachable"
)


def instructions() -> list[tuple[str, str]]:
    """Return the instructions, continued lines joined."""
    text = "\n".join(line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#"))
    joined = text.replace("\\\n", " ")
    return [
        (line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in joined.splitlines() if line.strip()
    ]


def test_dockerfile_is_clean_for_hadolint() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.is_file():
        pytest.skip("hadolint is not installed: pip install 'qexport[dev]'")
    finished = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_dockerfile_has_a_base_for_each_jetpack_and_6_by_default() -> None:
    bases = dict(re.findall(r"#   JetPack (\d).*--build-arg BASE=(\S+)", DOCKERFILE.read_text()))
    assert set(bases) == {"5", "6", "7"}
    assert ("ARG", f"BASE={bases['6']}") in instructions()
    assert all(re.search(r":[\w.-]+$", base) for base in bases.values())


def test_dockerfile_leaves_root_before_it_ends() -> None:
    users = [value for name, value in instructions() if name == "USER"]
    assert users == ["${USER_ID}:${USER_ID}"]
    assert ("ARG", "USER_ID=1000") in instructions()
    assert not [
        name for name, _ in instructions()[instructions().index(("USER", users[-1])) :] if name == "RUN"
    ]


def test_dockerfile_health_is_the_doctor() -> None:
    health = next(value for name, value in instructions() if name == "HEALTHCHECK")
    assert json.loads(health.partition("CMD ")[2]) == ["qexport", "doctor"]


def test_dockerfile_copies_what_is_there_and_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for name, value in instructions():
        if name == "COPY":
            for pattern in shlex.split(value)[:-1]:
                assert list(ROOT.glob(pattern)), pattern
                assert any(f"!{kept}" in ignored for kept in (pattern, str(Path(pattern).parent)))


@pytest.mark.slow
def test_install_steps_of_the_image_give_a_healthy_qexport_without_torch(tmp_path: Path) -> None:
    # apt-get, the base image and the user are left out: they need docker and NVIDIA's registry.
    place = tmp_path / "qexport"
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    system = str(Path(sys.executable).resolve().parent)
    variables |= {
        "QEXPORT_VENV": str(place / "venv"),
        "PATH": f"{place}/venv/bin:{system}:{os.environ['PATH']}",
    }
    steps = 0
    for name, value in instructions():
        here = value.replace("/opt/qexport", str(place))
        if name == "COPY":
            copy(*shlex.split(here))
        elif name == "RUN" and "/opt/qexport" in value:
            run(here, variables, tmp_path)
            steps += 1
    assert steps == 2
    run("qexport --help", variables, tmp_path)
    run(shlex.join(["qexport", "doctor"]), variables, tmp_path)
    found = run("python -c \"import importlib.util as u; print(u.find_spec('torch'))\"", variables, tmp_path)
    assert found.strip() == "None"
    assert (place / "jetson" / "build.sh").is_file()


def copy(*words: str) -> None:
    target = Path(words[-1])
    for pattern in words[:-1]:
        for source in ROOT.glob(pattern):
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)


def run(command: str, variables: dict[str, str], cwd: Path) -> str:
    """Run a step by `sh -c`, as docker does; skip where the package index cannot be reached."""
    finished = subprocess.run(
        ["sh", "-c", command],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        cwd=cwd,
        env=variables,
    )
    said = finished.stdout + finished.stderr
    if finished.returncode != 0 and NO_NETWORK.search(said):
        pytest.skip("pip cannot reach the package index, so the image's environment cannot be made")
    assert finished.returncode == 0, f"{command}\n{said[-3000:]}"
    return finished.stdout
