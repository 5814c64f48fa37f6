"""A run of the ExecuTorch target by the command line, whole: report, bundle, verify, detect, bench."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_fixtures import DETECTOR, MEASURED, call

from qexport.detectors.demo.scenes import write_scenes

pytest.importorskip("executorch", reason="ExecuTorch is not installed: pip install 'qexport[executorch]'")


@pytest.mark.slow
def test_run_and_bundle_of_executorch_by_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_scenes(tmp_path / "data", train=2, val=2, test=2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # tests share the machine
    for arguments in (
        ("run", *DETECTOR, "--target", "executorch", "--out", "mine", *MEASURED),
        ("bundle", "mine", "--target", "executorch", "--out", "mine.qbundle"),
    ):
        answer = call(*arguments)
        assert answer.code == 0, answer.err
    profile = json.loads(Path("mine/executorch/latency.json").read_text())
    assert profile["accounted_share"] > 0.9
    answer = call("verify", "mine.qbundle")
    assert answer.code == 0, answer.err
    assert answer.out.startswith("identical: 2 golden frames")
    image = next(Path("data/images").glob("*.png"))
    answer = call("detect", "mine.qbundle", str(image), "--json", "-")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["boxes"]
    answer = call(
        "bench", "mine.qbundle", "--runs", "2", "--warmup", "1", "--min-accounted", "0.01", "--out", "m.json"
    )
    assert answer.code == 0, answer.err
    assert json.loads(Path("m.json").read_text())["profile"]["target"] == "executorch"
