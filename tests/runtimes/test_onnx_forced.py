"""ONNX Runtime on inputs that are given: what it computed itself comes out again, by the same kernels."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from conftest import Frame
from forced_fixtures import assert_forced_run_reproduces, free_run

from qexport.errors import ArtifactError
from qexport.runtimes.onnx import OnnxRunner
from qexport.runtimes.onnx_forced import ForcedSession
from qexport.runtimes.onnx_session import make_session


def test_run_forced_of_its_own_codes_reproduces_them(demo_artifact: Path, demo_frames: list[Frame]) -> None:
    with OnnxRunner(demo_artifact) as runner:
        assert_forced_run_reproduces(runner, demo_frames[0])


def test_forced_session_runs_the_kernels_of_the_file(demo_artifact: Path, tmp_path: Path) -> None:
    with OnnxRunner(demo_artifact) as runner:
        forced = ForcedSession(runner.path, runner.artifact, threads=1)
        kernels = []
        for number, model in enumerate((forced.model, runner.path)):
            written = tmp_path / f"{number}.onnx"
            make_session(model, optimized=written)
            nodes = onnx.load(written).graph.node
            kernels.append({node.name.partition("_token_")[0]: node.op_type for node in nodes})
    cut, whole = kernels
    integer = {name: kind for name, kind in whole.items() if kind.startswith("QLinear") or kind == "QGemm"}
    assert len(integer) > 20
    assert {name: cut.get(name) for name in integer} == integer


def test_run_forced_without_codes_of_a_site_is_refused(demo_artifact: Path, demo_frames: list[Frame]) -> None:
    with OnnxRunner(demo_artifact) as runner:
        codes, proposals = free_run(runner, demo_frames[0])
        victim = runner.artifact.sites[3].key
        array = runner.input_of(demo_frames[0])
        with pytest.raises(ArtifactError, match=f"given codes of .*{codes[victim].shape[1]}"):
            runner.run_forced(array, codes | {victim: codes[victim][:, :, 1:]}, proposals)
        del codes[victim]
        with pytest.raises(ArtifactError, match=f"no codes for {victim}"):
            runner.run_forced(array, codes, proposals)


def test_run_forced_of_an_artifact_without_a_place_for_proposals_is_refused(demo_artifact: Path) -> None:
    with OnnxRunner(demo_artifact) as runner:
        lost = msgspec.structs.replace(runner.artifact, float_sites={})
        with pytest.raises(ArtifactError, match="does not say where its proposals are"):
            ForcedSession(runner.path, lost, threads=1)
        image = msgspec.structs.replace(runner.artifact.sites[0], tensor="boxes")
        wrong = msgspec.structs.replace(runner.artifact, float_sites={"proposals": "labels"}, sites=(image,))
        with pytest.raises(ArtifactError, match="tensor labels is tensor"):
            ForcedSession(runner.path, wrong, threads=1)


def test_run_forced_of_a_tensor_with_two_keys_returns_the_second_as_it_was_given(
    demo_artifact: Path, demo_frames: list[Frame]
) -> None:
    with OnnxRunner(demo_artifact) as runner:
        site = runner.artifact.sites[3]
        view = msgspec.structs.replace(site, key="view@0/output:view", shape=(1, int(np.prod(site.shape))))
        runner.artifact = msgspec.structs.replace(runner.artifact, sites=(*runner.artifact.sites, view))
        codes, proposals = free_run(runner, demo_frames[0])
        codes[site.key] = np.full_like(codes[site.key], 7)
        forced = runner.run_forced(runner.input_of(demo_frames[0]), codes, proposals)
    assert (forced[view.key] == 7).all()
    assert forced[site.key].any() and not (forced[site.key] == 7).all()
