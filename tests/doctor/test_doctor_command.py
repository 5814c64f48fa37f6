from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from doctor_fixtures import ORIN, TENSORRT, WORKSTATION, doctor, write_artifact, write_engine

from qexport.doctor import examine
from qexport.doctor.packages import PACKAGES, glibc_needs, installed_version, torch_cuda
from qexport.doctor.system import EXPORTED_OPSET, opset_finding, system_name
from qexport.plugins.onnx.base_graph import OPSET


def test_doctor_here_shows_every_group_and_exits_0() -> None:
    found = doctor()
    assert found.code == 0, found.err
    for word in (
        "Python",
        "glibc",
        "torch",
        "ONNX opset",
        "bindings",
        "torch2trt",
        "driver",
        "JetPack",
        "DLA cores",
    ):
        assert word in found.out
    assert "target onnx: can export, run and measure here" in found.out


def test_doctor_json_is_one_object_and_nothing_else() -> None:
    found = doctor("--json")
    assert list(found.json) == ["qexport", "ok", "problems", "findings", "targets", "artifact"]
    assert found.json["ok"] is True
    assert found.err == ""
    assert found.out == doctor("--json").out


def test_doctor_commands_are_never_broken_over_lines() -> None:
    found = doctor(hidden=WORKSTATION)
    assert any(line.endswith("pip install 'qexport[torch]'") for line in found.out.splitlines())
    assert "torch, torchvision, torchao, safetensors: pip install 'qexport[torch]'" in found.out


def test_doctor_in_the_bare_base_shows_what_is_missing_and_exits_0() -> None:
    found = doctor("--json", hidden=(*WORKSTATION, *TENSORRT))
    assert found.code == 0, found.err
    assert found.row("PyTorch", "torch")["state"] == "missing"
    assert found.row("ONNX", "ONNX opset")["state"] == "not applicable"
    assert found.ability("onnx", "run")["advice"] == "pip install 'qexport[onnx-runtime]'"


def test_doctor_of_a_target_that_lacks_packages_exits_3() -> None:
    found = doctor("--target", "onnx", "--json", hidden=WORKSTATION)
    assert found.code == 3
    assert found.json["ok"] is False
    assert "missing torch, torchvision, torchao, onnx, onnxscript, onnxruntime" in found.err
    assert "pip install 'qexport[all]'" in found.err


def test_doctor_of_a_target_that_has_everything_exits_0() -> None:
    assert doctor("--target", "onnx").code == 0


def test_doctor_of_an_unknown_target_exits_2() -> None:
    found = doctor("--target", "tflight")
    assert found.code == 2
    assert "no target 'tflight'" in found.err
    assert found.out == ""


def test_doctor_of_a_missing_artifact_exits_2(tmp_path: Path) -> None:
    write_artifact(tmp_path, "onnx")
    found = doctor(tmp_path / "int9.onnx")
    assert found.code == 2
    assert f"{tmp_path / 'int9.onnx'}: no such file or folder" in found.err


def test_doctor_of_a_folder_without_artifact_exits_2(tmp_path: Path) -> None:
    found = doctor(tmp_path)
    assert found.code == 2
    assert "no artifact.json there" in found.err


def test_doctor_of_an_onnx_artifact_says_that_it_runs(tmp_path: Path) -> None:
    found = doctor(write_artifact(tmp_path, "onnx"))
    assert found.code == 0
    assert f"artifact {tmp_path} (onnx): runs here" in found.out


@pytest.mark.parametrize("hidden", [(), TENSORRT])
def test_doctor_of_an_engine_for_another_gpu_exits_3_and_names_the_build(
    tmp_path: Path, hidden: tuple[str, ...]
) -> None:
    write_engine(write_artifact(tmp_path, "tensorrt"), ORIN)
    found = doctor(tmp_path, hidden=hidden)
    assert found.code == 3
    assert "engine int8 (tensorrt 10.3.0, Orin 8.7): does not load" in found.out
    assert f"qexport build {tmp_path} --precision int8" in found.out
    assert "cannot run here" in found.err


def test_examine_of_a_fake_root_reads_that_root(tmp_path: Path) -> None:
    release = tmp_path / "etc/nv_tegra_release"
    release.parent.mkdir()
    release.write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n")
    (tmp_path / "etc/os-release").write_text('NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 22.04.5 LTS"\n')
    rows = {(one.group, one.name): one for one in examine(root=tmp_path).findings}
    assert rows["Jetson", "JetPack"].found == "6.2 (L4T 36.4.3)"
    assert (rows["system", "system"].found or "").startswith("Ubuntu 22.04.5 LTS")
    assert rows["NVIDIA device", "driver"].state in ("missing", "ok")
    assert system_name(tmp_path) == "Ubuntu 22.04.5 LTS"


def test_doctor_imports_nothing_heavy() -> None:
    code = "import sys; from qexport.doctor import examine; examine(); print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    heavy = {
        "torch",
        "torchvision",
        "onnx",
        "onnxruntime",
        "tensorrt",
        "tensorrt_rtx_bindings",
        "numpy",
        "matplotlib",
    }
    assert not heavy & set(done.stdout.split())


def test_opset_of_the_doctor_is_that_of_the_exports() -> None:
    assert EXPORTED_OPSET == OPSET
    assert opset_finding().state == "ok"


def test_packages_that_are_installed_have_versions() -> None:
    assert all(installed_version(package) for package in PACKAGES)
    assert "torch" in glibc_needs() or sys.platform != "linux"


def test_torch_cuda_is_what_torch_itself_says() -> None:
    code = "import json, torch; print(json.dumps(torch.version.cuda))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert torch_cuda() == json.loads(done.stdout)


def test_torchvision_built_for_another_torch_is_incompatible(tmp_path: Path) -> None:
    info = tmp_path / "torchvision-0.29.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.29.0\nRequires-Dist: torch==2.13.0\n"
    )
    found = doctor("--json", path=tmp_path)
    assert found.row("PyTorch", "torchvision")["state"] == "incompatible"
    assert "was built for torch ==2.13.0" in found.row("PyTorch", "torchvision")["advice"]
    assert found.code == 3
    assert not found.ability("onnx", "export")["possible"]
    assert found.ability("onnx", "run")["possible"]
