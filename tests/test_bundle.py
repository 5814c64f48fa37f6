"""Bundles: what is in one, that the same run gives the same bytes, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_fixtures import bundled, reseal, spoilt
from cli_fixtures import Answer, call, copied, edit_json, partial_files, place
from PIL import Image

from qexport.artifact import load_artifact
from qexport.bundle import INSTALL, MANIFEST, SUMS, is_bundle, open_bundle
from qexport.bundling import WrittenBundle
from qexport.errors import ArtifactError, BundleError
from qexport.golden import load_arrays, load_frame
from qexport.runtimes.onnx import OnnxRunner

__all__ = ["bundled", "copied", "place", "spoilt"]

FRAME_PX = (240, 320)


def refused(answer: Answer, *said: str, code: int = 2) -> None:
    assert answer.code == code, answer.err
    assert "Traceback" not in answer.err
    assert [text for text in said if text not in answer.err] == []


def digests(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


# What is in it


def test_bundle_command_writes_folder_and_archive_and_prints_sizes_and_verdicts(copied: Path) -> None:
    answer = call("bundle", "mine", "--target", "onnx", "--out", "new.qbundle")
    assert answer.code == 0, answer.err
    assert is_bundle(Path("new.qbundle"))
    assert is_bundle(Path("new.qbundle.tar"))
    for said in ("artifact: ", "2 golden frames: ", " MB", "parity ok", "VOC mAP", "new.qbundle.tar"):
        assert said in answer.out
    assert partial_files(Path()) == []


def test_bundle_holds_the_artifact_golden_tensors_layers_wheel_and_install_script(
    bundled: WrittenBundle,
) -> None:
    manifest, names = bundled.manifest, {file.name for file in bundled.manifest.files}
    artifact, _ = load_artifact(bundled.folder / "artifact")
    assert {"artifact/artifact.json", "artifact/detector.int8.onnx", "layers.json", INSTALL} <= names
    assert manifest.wheel in names
    assert manifest.artifact_sha256 == artifact.sha256
    assert (manifest.target, manifest.extra, manifest.labels) == ("onnx", "onnx-runtime", artifact.labels)
    assert manifest.input == artifact.input
    assert manifest.verdicts["parity"].startswith("parity ok")
    assert {gate.subject for gate in manifest.gates} == {"onnx"}
    assert len(manifest.golden) == 2
    assert [golden.sites is None for golden in manifest.golden] == [False, True]
    for golden in manifest.golden:
        assert load_frame(bundled.folder / golden.frame).shape == (*FRAME_PX, 3)
        assert set(load_arrays(bundled.folder / golden.outputs)) == {"boxes", "scores", "labels", "count"}
        assert len(golden.digests) == len({site.tensor for site in artifact.sites})
    assert sum(golden.detections for golden in manifest.golden) > 0
    assert os.access(bundled.folder / INSTALL, os.X_OK)


def test_golden_frames_are_images_of_the_evaluation_split_bit_for_bit(
    bundled: WrittenBundle, place: Path
) -> None:
    for golden in bundled.manifest.golden:
        assert "test" in golden.source
        with Image.open(place / "data" / golden.source) as image:
            assert np.array_equal(load_frame(bundled.folder / golden.frame), np.asarray(image.convert("RGB")))


def test_sums_of_a_bundle_hold_for_sha256sum(bundled: WrittenBundle) -> None:
    tool = shutil.which("sha256sum")
    if tool is None:
        pytest.skip("sha256sum is not installed")
    done = subprocess.run(
        [tool, "--check", SUMS], cwd=bundled.folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(bundled.manifest.files) + 1


def test_bundle_of_the_same_run_has_the_same_bytes(bundled: WrittenBundle, copied: Path) -> None:
    answer = call("bundle", "mine", "--target", "onnx", "--out", "demo.qbundle", "--with-baseline")
    assert answer.code == 0, answer.err
    assert digests(Path("demo.qbundle")) == digests(bundled.folder)
    assert Path("demo.qbundle.tar").read_bytes() == bundled.archive.read_bytes()


def test_bundle_without_baseline_leaves_the_float_file_out_and_still_loads(copied: Path) -> None:
    assert call("bundle", "mine", "--target", "onnx", "--out", "small.qbundle", "--frames", "1").code == 0
    with open_bundle(Path("small.qbundle")) as bundle:
        files = {path.name for path in bundle.artifact_folder.iterdir()}
        assert files == {"artifact.json", "detector.int8.onnx", "left-out.json"}
        assert load_artifact(bundle.artifact_folder)[0].sha256 == load_artifact(Path("mine/onnx"))[0].sha256
        assert len(bundle.manifest.golden) == 1


def test_bundle_that_is_there_is_replaced(bundled: WrittenBundle, copied: Path) -> None:
    shutil.copytree(bundled.folder, "old.qbundle")
    Path("old.qbundle/extra.txt").write_text("of before")
    assert call("bundle", "mine", "--target", "onnx", "--out", "old.qbundle").code == 0
    assert not Path("old.qbundle/extra.txt").exists()
    with open_bundle(Path("old.qbundle")) as bundle:
        assert bundle.manifest.target == "onnx"


def test_bundle_onto_something_else_is_refused_and_leaves_it(copied: Path) -> None:
    Path("notes").mkdir()
    Path("notes/mine.txt").write_text("kept")
    refused(call("bundle", "mine", "--target", "onnx", "--out", "notes"), "notes", "no bundle")
    assert Path("notes/mine.txt").read_text() == "kept"
    refused(call("bundle", "mine", "--target", "onnx", "--out", "new.tar"), "--out", ".tar")
    assert partial_files(Path()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nowhere", "--target", "onnx"), ("nowhere",)),
        (("mine", "--target", "tflite"), ("tflite",)),
        (("mine", "--target", "tensorrt"), ("engines", "deploy/jetson")),
        (("mine", "--target", "abacus"), ("abacus",)),
        (("mine", "--target", "onnx", "--frames", "100"), ("100 golden frames",)),
    ],
)
def test_bundle_of_what_is_not_there_is_refused(
    words: tuple[str, ...], said: tuple[str, ...], copied: Path
) -> None:
    refused(call("bundle", *words, "--out", "new.qbundle"), *said)
    assert not Path("new.qbundle").exists()
    assert partial_files(Path()) == []


def test_bundle_with_the_parity_of_another_artifact_is_refused(copied: Path) -> None:
    edit_json(Path("mine/onnx/parity.json"), lambda value: value.update(artifact_sha256="0" * 64))
    refused(call("bundle", "mine", "--target", "onnx", "--out", "new.qbundle"), "qexport compare", "0" * 12)


def test_bundle_before_parity_and_accuracy_says_that_they_were_not_measured(copied: Path) -> None:
    for name in ("onnx/parity.json", "accuracy.json"):
        Path("mine", name).unlink()
    answer = call("bundle", "mine", "--target", "onnx", "--out", "new.qbundle")
    assert answer.code == 0, answer.err
    assert "parity not measured" in answer.out
    assert "accuracy not measured" in answer.out


# Use


def test_detect_with_a_bundle_finds_what_the_artifact_finds(bundled: WrittenBundle, copied: Path) -> None:
    image = f"data/{bundled.manifest.golden[0].source}"
    found = [call("detect", path, image) for path in ("mine/onnx", bundled.folder, bundled.archive)]
    assert [answer.code for answer in found] == [0, 0, 0]
    assert found[0].out == found[1].out == found[2].out
    assert "boxes" in found[0].out
    assert partial_files(bundled.folder.parent) == []  # what was unpacked is gone


@pytest.mark.parametrize("size", [(200, 320), (240, 240)])
def test_image_of_another_size_is_letterboxed_or_refused_as_the_manifest_says(
    size: tuple[int, int], bundled: WrittenBundle, spoilt: Path
) -> None:
    image = spoilt.parent / "other.png"
    Image.fromarray(np.full((*size, 3), 120, np.uint8)).save(image)
    assert call("detect", bundled.folder, image).code == 0
    edit_json(spoilt / MANIFEST, lambda value: value.update(image_fit="refuse"))
    reseal(spoilt)
    refused(call("detect", spoilt, image), f"{size[0]}x{size[1]}", "240x320", "--other-sizes letterbox")
    frame = spoilt / bundled.manifest.golden[0].frame
    assert call("detect", spoilt, frame).code == 0


# What is refused


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("change", [append, flip])
@pytest.mark.parametrize(
    "name",
    [
        MANIFEST,
        SUMS,
        INSTALL,
        "layers.json",
        "artifact/detector.int8.onnx",
        "artifact/artifact.json",
        "golden/1/frame.png",
    ],
)
def test_changed_file_is_refused_by_name(name: str, change: Callable[[Path], None], spoilt: Path) -> None:
    change(spoilt / name)
    with pytest.raises(BundleError, match=name.replace(".", r"\.")), open_bundle(spoilt):
        pass


def test_every_file_of_a_bundle_is_checked(bundled: WrittenBundle, spoilt: Path) -> None:
    names = sorted(digests(bundled.folder))
    for name in names:
        flip(spoilt / name)
        with pytest.raises(BundleError), open_bundle(spoilt):
            pass
        flip(spoilt / name)
    with open_bundle(spoilt):
        assert len(names) > 10


@pytest.mark.parametrize(
    "name", [MANIFEST, SUMS, "layers.json", "artifact/artifact.json", "golden/0/sites.npz"]
)
def test_missing_file_is_refused_by_name(name: str, spoilt: Path) -> None:
    (spoilt / name).unlink()
    with pytest.raises(BundleError, match=rf"{name}.*(missing|no such file)"), open_bundle(spoilt):
        pass


@pytest.mark.parametrize("name", ["measurement.json", "artifact/detector.fp16.onnx", "golden/7/", "sub/"])
def test_extra_file_or_folder_is_refused_by_name(name: str, spoilt: Path) -> None:
    if name.endswith("/"):
        (spoilt / name).mkdir()
    else:
        (spoilt / name).write_text("{}")
    with pytest.raises(BundleError, match=f"{name} is not of this bundle"), open_bundle(spoilt):
        pass


def test_link_in_a_bundle_is_refused(spoilt: Path) -> None:
    (spoilt / "layers.json").rename(spoilt.parent / "layers.json")
    (spoilt / "layers.json").symlink_to(spoilt.parent / "layers.json")
    with pytest.raises(BundleError, match=r"layers\.json: a link"), open_bundle(spoilt):
        pass


def newer(value: Any) -> None:
    value.update(format_version=2, qexport_version="9.0.0", something_new=[1])


def climbing(value: Any) -> None:
    value["files"][0]["name"] = "../outside.json"


def absolute(value: Any) -> None:
    value["files"][0]["name"] = "/etc/hostname"


def other_kind(value: Any) -> None:
    value["kind"] = "qexport-measurement"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (newer, "format 2, made by qexport 9.0.0; this qexport reads 1.*install.sh"),
        (climbing, r"\.\./outside\.json leads out"),
        (absolute, "/etc/hostname leads out"),
        (other_kind, "qexport-measurement"),
    ],
)
def test_manifest_that_cannot_be_taken_is_refused(
    change: Callable[[Any], None], said: str, spoilt: Path
) -> None:
    edit_json(spoilt / MANIFEST, change)
    with pytest.raises(BundleError, match=said), open_bundle(spoilt):
        pass


def test_manifest_that_is_cut_off_is_refused(spoilt: Path) -> None:
    data = (spoilt / MANIFEST).read_bytes()
    (spoilt / MANIFEST).write_bytes(data[: len(data) // 2])
    with pytest.raises(BundleError, match=r"bundle\.json: not valid JSON"), open_bundle(spoilt):
        pass


def test_commands_given_a_changed_bundle_answer_with_exit_code_2(spoilt: Path, tmp_path: Path) -> None:
    flip(spoilt / "artifact" / "detector.int8.onnx")
    image = spoilt / "golden" / "0" / "frame.png"
    for words in (
        ("verify", spoilt),
        ("detect", spoilt, image),
        ("bench", spoilt, "--out", tmp_path / "m.json"),
    ):
        refused(call(*words), "detector.int8.onnx", "changed")
    assert not (tmp_path / "m.json").exists()


@pytest.mark.parametrize("path", ["nowhere.qbundle", "empty"])
def test_path_that_is_no_bundle_is_refused(path: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(call("verify", tmp_path / path), path)


def test_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not an archive\n" * 100)
    refused(call("verify", tmp_path / "notes.txt"), "not an archive")


def test_left_out_file_asked_for_says_how_to_take_it_along(copied: Path) -> None:
    assert call("bundle", "mine", "--target", "onnx", "--out", "small.qbundle").code == 0
    with pytest.raises(ArtifactError, match=r"fp32 file was left out.*--with-baseline"):
        OnnxRunner(Path("small.qbundle/artifact"), role="fp32")


def test_left_out_excuses_no_file_that_is_named_elsewhere(copied: Path) -> None:
    """The int8 file is not among those left out, so its loss is an error, as it is in a run."""
    assert call("bundle", "mine", "--target", "onnx", "--out", "small.qbundle").code == 0
    assert "int8" not in json.loads(Path("small.qbundle/artifact/left-out.json").read_bytes())["roles"]
    Path("small.qbundle/artifact/detector.int8.onnx").unlink()
    with pytest.raises(ArtifactError, match="int8 file is missing"):
        load_artifact(Path("small.qbundle/artifact"))
