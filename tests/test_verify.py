"""Golden frames run again: bit-identical, or the layer where it begins to differ and by how much."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import msgspec
import numpy as np
import pytest
from bundle_fixtures import CHANGED_LAYER, bundled, change_weight, edit_file, reseal, spoilt
from cli_fixtures import call, edit_json, place
from test_device_side import run_command_hidden, run_hidden

from qexport.bundle import MANIFEST, open_bundle
from qexport.bundling import WrittenBundle
from qexport.errors import BundleError
from qexport.golden import load_arrays, save_arrays
from qexport.verifying import VerifyReport, compare_arrays, verify

__all__ = ["bundled", "place", "spoilt"]

CHANGED_ROW = f"{CHANGED_LAYER}@0/output:conv2d"


def verified(path: Path, tolerance_steps: int | None = None) -> VerifyReport:
    with open_bundle(path) as bundle:
        return verify(bundle, tolerance_steps=tolerance_steps)


def test_verify_here_is_identical_and_exits_with_0(bundled: WrittenBundle, tmp_path: Path) -> None:
    answer = call("verify", bundled.archive, "--json", tmp_path / "found.json")
    assert answer.code == 0, answer.err
    assert answer.out.startswith("identical: 2 golden frames, ")
    assert "onnxruntime " in answer.out
    assert "parity ok" in answer.out
    report = msgspec.json.decode((tmp_path / "found.json").read_bytes(), type=VerifyReport)
    assert report.verdict == "identical"
    assert all(
        frame.layers_compared > 40 and not frame.layers and not frame.outputs for frame in report.frames
    )
    assert [frame.detections for frame in report.frames] == [
        golden.detections for golden in bundled.manifest.golden
    ]


def test_verify_with_two_threads_is_identical(bundled: WrittenBundle) -> None:
    assert call("verify", bundled.folder, "--threads", "2").code == 0


def test_verify_without_torch_and_onnx_is_identical(bundled: WrittenBundle, tmp_path: Path) -> None:
    assert run_command_hidden("verify", bundled.archive, cwd=tmp_path).startswith("identical")


def test_verify_with_a_changed_weight_names_the_layer_where_it_begins(spoilt: Path, tmp_path: Path) -> None:
    change_weight(spoilt)
    answer = call("verify", spoilt, "--json", tmp_path / "found.json")
    assert answer.code == 1, answer.err
    assert f"first at {CHANGED_ROW} (trunk)" in answer.err
    assert "Traceback" not in answer.err
    report = msgspec.json.decode((tmp_path / "found.json").read_bytes(), type=VerifyReport)
    assert report.verdict == "differs"
    first = report.frames[0].layers[0]
    assert (first.name, first.stage) == (CHANGED_ROW, "trunk")
    assert first.values is not None
    assert first.differing is not None
    assert 0 < first.differing <= first.values
    assert first.largest is not None
    assert first.largest >= 1
    assert 1 < len(report.frames[0].layers) < report.frames[0].layers_compared
    digests_alone = report.frames[1].layers[0]
    assert digests_alone.name == CHANGED_ROW
    assert digests_alone.values is None
    assert "digests alone" in digests_alone.problem


def test_verify_counts_what_differs_as_numpy_does(bundled: WrittenBundle, spoilt: Path) -> None:
    change_weight(spoilt)
    found = verified(spoilt).frames[0]
    golden = load_arrays(spoilt / "golden/0/sites.npz")[CHANGED_ROW]
    change = next(layer for layer in found.layers if layer.name == CHANGED_ROW)
    # The row is 8-bit: no difference can be more than its range, and there is one.
    assert change.values == golden.size
    assert change.largest is not None
    assert 1 <= change.largest <= 255


def test_layers_before_the_changed_one_are_identical(spoilt: Path) -> None:
    change_weight(spoilt)
    with open_bundle(spoilt) as bundle:
        order = {layer.path: layer.order for layer in reversed(bundle.layers())}
        report = verify(bundle)
    touched = [layer.name.partition("@")[0] for layer in report.frames[0].layers]
    assert min(order[path] for path in touched if path in order) == order[CHANGED_LAYER]


def test_tolerance_passes_a_small_difference_and_not_a_larger_one(
    bundled: WrittenBundle, spoilt: Path
) -> None:
    sites = spoilt / "golden/0/sites.npz"
    arrays = load_arrays(sites)
    changed = np.array(arrays[CHANGED_ROW])
    changed.flat[3] = changed.flat[3] + 2 if changed.flat[3] < 200 else changed.flat[3] - 2
    save_arrays({**arrays, CHANGED_ROW: changed}, sites)
    edit_json(spoilt / MANIFEST, lambda value: value["golden"][0]["digests"].update({CHANGED_ROW: "0" * 64}))
    reseal(spoilt)
    assert verified(spoilt).verdict == "differs"
    assert verified(spoilt, 1).verdict == "differs"
    assert verified(spoilt, 2).verdict == "within tolerance"
    assert verified(bundled.folder, 0).verdict == "identical"
    assert call("verify", spoilt, "--tolerance-steps", "2").code == 0
    answer = call("verify", spoilt, "--tolerance-steps", "1")
    assert answer.code == 1
    assert f"{CHANGED_ROW} (trunk): 1 of {changed.size} values, 2 steps at most" in answer.out


def test_tolerance_does_not_pass_other_detections(spoilt: Path) -> None:
    path = spoilt / "golden/0/outputs.npz"
    arrays = load_arrays(path)
    save_arrays({**arrays, "count": arrays["count"] + 1}, path)
    reseal(spoilt)
    report = verified(spoilt, 255)
    assert report.verdict == "differs"
    assert [output.name for output in report.frames[0].outputs] == ["count"]
    assert report.frames[0].layers == ()


@pytest.mark.parametrize(
    ("golden", "actual", "differing", "largest"),
    [
        (np.array([1, 2, 250], np.uint8), np.array([1, 4, 0], np.uint8), 2, 250.0),
        (np.array([-128, 127], np.int8), np.array([127, 127], np.int8), 1, 255.0),
        (np.array([0.0, 1.0], np.float32), np.array([-0.0, 1.5], np.float32), 2, 0.5),
        (np.array([np.nan, 1.0], np.float32), np.array([2.0, 1.0], np.float32), 1, 0.0),
        (np.array([np.inf], np.float32), np.array([2.0], np.float32), 1, None),
    ],
)
def test_compare_arrays_counts_bits_and_measures_values(
    golden: np.ndarray, actual: np.ndarray, differing: int, largest: float | None
) -> None:
    found = compare_arrays("tensor", golden=golden, actual=actual)
    assert found is not None
    assert (found.values, found.differing, found.largest) == (golden.size, differing, largest)
    assert compare_arrays("tensor", golden=golden, actual=golden.copy()) is None


@pytest.mark.parametrize("actual", [np.zeros((2, 3), np.int8), np.zeros((3, 2), np.uint8)])
def test_compare_arrays_of_another_shape_or_type_says_so(actual: np.ndarray) -> None:
    found = compare_arrays("tensor", golden=np.zeros((3, 2), np.int8), actual=actual)
    assert found is not None
    assert found.problem == f"{actual.dtype} of shape {actual.shape}, expected int8 of shape (3, 2)"


def test_verify_where_the_runtime_is_missing_exits_with_3_and_says_what_installs_it(
    bundled: WrittenBundle, tmp_path: Path
) -> None:
    code = """
    HIDDEN.add("onnxruntime")
    sys.stderr = sys.stdout
    sys.argv = ["qexport", "verify", sys.argv[1]]
    from qexport.cli import main
    try:
        main()
    except SystemExit as leave:
        print("code", leave.code)
    """
    out = run_hidden(textwrap.dedent(code), bundled.folder, cwd=tmp_path)
    assert "missing onnxruntime" in out
    assert "pip install 'qexport[onnx-runtime]'" in out
    assert "code 3" in out


def test_verify_of_a_truncated_onnx_is_refused_by_name(spoilt: Path) -> None:
    edit_file(spoilt / "artifact/detector.int8.onnx", lambda data: data[: len(data) // 2])
    answer = call("verify", spoilt)
    assert answer.code == 2
    assert "detector.int8.onnx" in answer.err
    assert "Traceback" not in answer.err


def test_verify_of_golden_tensors_of_another_artifact_is_refused(spoilt: Path) -> None:
    def rename(value: dict[str, list[dict[str, dict[str, str]]]]) -> None:
        digests = value["golden"][1]["digests"]
        digests["backbone.unknown@0/output:conv2d"] = digests.pop(CHANGED_ROW)

    edit_json(spoilt / MANIFEST, rename)
    reseal(spoilt)
    with pytest.raises(BundleError, match="do not agree on backbone"):
        verified(spoilt)


@pytest.mark.parametrize("name", ["golden/0/frame.png", "golden/0/outputs.npz"])
def test_golden_file_that_cannot_be_read_is_refused_by_name(name: str, spoilt: Path) -> None:
    (spoilt / name).write_bytes(b"not what it says")
    reseal(spoilt)
    with pytest.raises(BundleError, match=name):
        verified(spoilt)


def test_verify_writes_no_report_into_the_bundle(spoilt: Path) -> None:
    answer = call("verify", spoilt, "--json", spoilt / "found.json")
    assert answer.code == 2
    assert "would then be another" in answer.err
    assert not (spoilt / "found.json").exists()


def test_verify_report_is_plain_json_with_its_kind(bundled: WrittenBundle, tmp_path: Path) -> None:
    assert call("verify", bundled.folder, "--json", tmp_path / "found.json").code == 0
    found = json.loads((tmp_path / "found.json").read_bytes())
    assert (found["kind"], found["format_version"]) == ("qexport-verify", 1)
    assert found["golden_versions"] == bundled.manifest.versions
