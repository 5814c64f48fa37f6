"""The C profiler of LiteRT: whole detectors timed by module path, XNNPACK's nodes dealt out, other versions refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed: pip install 'qexport[tflite]'")

from tflite_runner_model import (
    BLOCK,
    CODES,
    DETECTED,
    FIRST,
    HEAD,
    PROPOSALS,
    SIDE,
    STEM,
    make_artifact,
    make_network,
)

from qexport.artifact import load_artifact
from qexport.benchmarks.latency import count_steps, measure_latency
from qexport.errors import TargetUnavailable
from qexport.layers import Kind
from qexport.results import LatencyProfile
from qexport.runtimes import tflite, tflite_profiler
from qexport.runtimes.runner import NOWHERE, SharedKernel
from qexport.runtimes.tflite import BuiltinTfliteRunner, TfliteRunner
from qexport.runtimes.tflite_kernels import make_timeline, owners_of_operators, place_nodes
from qexport.runtimes.tflite_library import (
    Operator,
    OperatorGraph,
    load_library,
    open_interpreter,
    read_graph,
)
from qexport.runtimes.tflite_operators import kind_of_kernel
from qexport.runtimes.tflite_profiler import DELEGATE_NODE, OPERATOR, Event, RecordedRun, version_refusal

Frame = NDArray[np.uint8]
LIBRARY = load_library()
needs_profiler = pytest.mark.skipif(bool(version_refusal(LIBRARY)), reason=version_refusal(LIBRARY))
OLDER = dataclasses.replace(LIBRARY, version="1.4.0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(
        tmp_path_factory.mktemp("tflite"), int8=make_network(), fp32=make_network(quantized=False)
    )


@pytest.fixture
def frame() -> Frame:
    return np.random.default_rng(3).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


# Whole networks


@needs_profiler
@pytest.mark.parametrize("runner", [TfliteRunner, BuiltinTfliteRunner])
@pytest.mark.parametrize("threads", [1, 2])
def test_profile_network_times_every_module(
    runner: type[TfliteRunner], threads: int, folder: Path, frame: Frame
) -> None:
    with runner(folder, threads=threads) as opened:
        assert opened.profile_refusal() == ""
        runs = opened.profile(frame, warmup=1, runs=3)
        owners = opened.kernel_owners()
        operators = owners_of_operators(opened._graph)
    assert len(runs) == 3
    assert {kernel.name for run in runs for kernel in run.kernels} <= owners.keys()
    assert all(sum(kernel.duration_ms for kernel in run.kernels) <= run.whole_ms for run in runs)
    assert set(operators.values()) == {"preprocess", STEM, FIRST, BLOCK, PROPOSALS, HEAD, DETECTED}
    # XNNPACK's nodes of the convolutions and the addition are each of one module.
    heavy = {
        owners[kernel.name]
        for kernel in runs[0].kernels
        if kernel.kernel.startswith(("Convolution", "CONV_2D"))
    }
    assert heavy == {STEM, FIRST}


@needs_profiler
def test_profile_network_names_xnnpack_nodes_after_operators(folder: Path, frame: Frame) -> None:
    with TfliteRunner(folder) as runner:
        (run,) = runner.profile(frame, warmup=0, runs=1)
    kernels = {kernel.name: kernel.kernel for kernel in run.kernels}
    assert kernels[CODES].startswith("Convolution (NHWC, QC8)")
    assert kernels[f"{PROPOSALS}/TOPK_V2"] == "TOPK_V2"


@needs_profiler
def test_profile_network_in_builtin_kernels_times_every_operator_once(folder: Path, frame: Frame) -> None:
    with BuiltinTfliteRunner(folder) as runner:
        (run,) = runner.profile(frame, warmup=0, runs=1)
        operators = runner._graph.operators
    assert [(kernel.name, kernel.kernel) for kernel in run.kernels] == [
        (one.name, one.code) for one in operators
    ]


@needs_profiler
def test_between_kernels_is_less_than_a_few_microseconds(folder: Path) -> None:
    with TfliteRunner(folder) as runner:
        assert 0 < runner.between_kernels_ms() < 0.05


@needs_profiler
def test_profile_whose_outputs_differ_is_refused(folder: Path, frame: Frame, tmp_path: Path) -> None:
    with TfliteRunner(folder) as runner:
        runner.path = tmp_path / "other.tflite"
        runner.path.write_bytes(make_network(seed=1))
        with pytest.raises(TargetUnavailable, match=r"computes other .* in its profiling executor"):
            runner.profile(frame, warmup=0, runs=1)


@needs_profiler
def test_profiled_model_that_is_no_model_is_refused(folder: Path, tmp_path: Path) -> None:
    with TfliteRunner(folder) as runner:
        runner.path = tmp_path / "junk.tflite"
        runner.path.write_bytes(b"\xff" * 400)
        assert "LiteRtCreateModelFromFile failed with status" in runner.profile_refusal()


# Another version


def test_version_that_is_not_known_is_refused_with_the_one_that_is() -> None:
    refusal = version_refusal(OLDER)
    assert "ai-edge-litert 1.4.0 is installed" in refusal
    assert "pip install ai-edge-litert==2.3.0" in refusal
    assert version_refusal(dataclasses.replace(OLDER, package="tflite-runtime", version="2.3.0"))


def _measure(folder: Path, frame: Frame, limit: float) -> tuple[LatencyProfile, int]:
    steps: list[None] = []
    profile = measure_latency(
        artifact=folder,
        runner=TfliteRunner,
        detector=None,
        frame=frame,
        layers=(),
        warmup=1,
        runs=2,
        threads=1,
        min_accounted=limit,
        on_run=lambda: steps.append(None),
    )
    return profile, len(steps)


def test_measure_latency_unknown_version_measures_whole_runs_and_says_so(
    folder: Path, frame: Frame, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tflite, "load_library", lambda: OLDER)
    profile, steps = _measure(folder, frame, 0.95)
    assert set(profile.whole) == {"artifact", "fp32"}
    assert profile.layers == ()
    assert (profile.accounted_share, profile.profiled_whole_ms) == (0.0, profile.whole["artifact"].p50_ms)
    (gate,) = profile.gates
    assert not gate.passed
    assert gate.measured.startswith("whole runs alone, no layer was timed: ai-edge-litert 1.4.0 is installed")
    artifact, _ = load_artifact(folder)
    assert steps == count_steps(artifact, folder, eager=False, warmup=1, runs=2)


@needs_profiler
def test_measure_latency_known_version_gives_rows_with_kernels(folder: Path, frame: Frame) -> None:
    profile, steps = _measure(folder, frame, 0.0)
    rows = {row.path: row for row in profile.layers}
    assert rows[STEM].kind == "convolution"
    assert rows[STEM].fp32_ms is not None
    assert rows.keys() == {"preprocess", STEM, FIRST, BLOCK, PROPOSALS, HEAD, DETECTED}
    assert 0 < profile.accounted_share <= 1
    artifact, _ = load_artifact(folder)
    assert steps == count_steps(artifact, folder, eager=False, warmup=1, runs=2)


def test_profile_of_an_unknown_version_raises_target_unavailable(
    folder: Path, frame: Frame, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tflite, "load_library", lambda: OLDER)
    with TfliteRunner(folder) as runner, pytest.raises(TargetUnavailable, match="operators cannot be timed"):
        runner.profile(frame, warmup=0, runs=1)


@needs_profiler
def test_library_without_a_function_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with TfliteRunner(folder) as runner:
        library = runner._profiled()
        with pytest.raises(TargetUnavailable, match=r"library has no LiteRtNowhere\. Install it again"):
            library._call("LiteRtNowhere")


@pytest.mark.parametrize("events", [b"", tflite_profiler._EVENT.pack(0, OPERATOR, 0, 0, 5, *[0] * 10)])
def test_events_without_a_whole_run_are_refused(events: bytes) -> None:
    with pytest.raises(TargetUnavailable, match="names 0 whole runs"):
        tflite_profiler._recorded(events, "here")


# Events to operators


def _operators(*codes: str) -> tuple[Operator, ...]:
    """Return a chain of operators, each of a module of its own."""
    return tuple(
        Operator(index, code, f"module{index}/{code}", (index,), (index + 1,))
        for index, code in enumerate(codes)
    )


def _placed(operators: tuple[Operator, ...], *nodes: str) -> list[tuple[int, ...]]:
    return [tuple(operator.index for operator in place) for place in place_nodes(operators, nodes)]


def test_place_nodes_fused_padding_and_clamp_go_to_their_operators() -> None:
    operators = _operators("PAD", "CONV_2D", "ADD", "CONV_2D", "QUANTIZE", "RESHAPE")
    nodes = (
        "Convolution (NHWC, QC8) IGEMM",
        "Add (ND)",
        "Clamp (NC)",
        "Fully Connected (NC) GEMM",
        "Convert (NC)",
    )
    assert _placed(operators, *nodes) == [(1,), (2,), (2,), (3,), (4,)]


def test_place_nodes_left_open_which_operator_was_left_out_names_both() -> None:
    operators = _operators("CONV_2D", "RESHAPE", "RESHAPE", "SOFTMAX")
    assert _placed(operators, "Convolution", "Static Reshape (NC)", "Softmax") == [(0,), (1, 2), (3,)]


@pytest.mark.parametrize("nodes", [("Convolution", "Divide (ND)"), ("Convolution",), ("Convolution",) * 3])
def test_place_nodes_that_fit_no_order_could_be_any(nodes: tuple[str, ...]) -> None:
    assert _placed(_operators("CONV_2D", "EXP"), *nodes) == [(0, 1)] * len(nodes)


def test_place_nodes_operator_that_is_not_known_could_be_any() -> None:
    assert _placed(_operators("CONV_2D", "UNHEARD_OF"), "Convolution", "Unheard") == [(0, 1), (0, 1)]


def _recorded(*events: tuple[str, int, int]) -> RecordedRun:
    return RecordedRun(1.0, tuple(Event(tag, kind, index, 0.1) for tag, kind, index in events))


GRAPH = OperatorGraph(_operators("CONV_2D", "TOPK_V2", "EXP", "LOG"), ((0,), (2, 3)))
RUN = _recorded(
    ("Convolution", DELEGATE_NODE, 0),
    ("TOPK_V2", OPERATOR, 1),
    ("Exp", DELEGATE_NODE, 0),
    ("Log", DELEGATE_NODE, 1),
)


def test_timeline_two_pieces_in_a_row_are_told_apart_by_their_numbers() -> None:
    graph = OperatorGraph(_operators("CONV_2D", "EXP"), ((0,), (1,)))
    run = _recorded(("Convolution", DELEGATE_NODE, 0), ("Exp", DELEGATE_NODE, 0))
    assert make_timeline(graph, run).names == ("module0/CONV_2D", "module1/EXP")


def test_timeline_of_a_run_gives_each_operator_its_time() -> None:
    timeline = make_timeline(GRAPH, RUN)
    assert timeline.names == ("module0/CONV_2D", "module1/TOPK_V2", "module2/EXP", "module3/LOG")
    profiled = timeline.profiled(RUN)
    assert [(kernel.kernel, kernel.duration_ms) for kernel in profiled.kernels][:2] == [
        ("Convolution", 0.1),
        ("TOPK_V2", 0.1),
    ]


def test_timeline_nodes_of_several_modules_are_shared() -> None:
    graph = OperatorGraph(_operators("CONV_2D", "RESHAPE", "RESHAPE", "SOFTMAX"), ((0, 1, 2, 3),))
    run = _recorded(
        ("Convolution", DELEGATE_NODE, 0), ("Static Reshape", DELEGATE_NODE, 1), ("Softmax", DELEGATE_NODE, 2)
    )
    owners = make_timeline(graph, run).owners()
    assert owners["module1/RESHAPE | module2/RESHAPE"] == SharedKernel(("module1", "module2"), by_macs=True)
    assert owners["module1/RESHAPE"] == "module1"


@pytest.mark.parametrize(
    "run",
    [
        _recorded(*[(event.tag, event.type, event.index) for event in RUN.events[:2]]),
        _recorded(*[(event.tag, event.type, event.index) for event in RUN.events], ("EXP", OPERATOR, 2)),
        _recorded(("Convolution", DELEGATE_NODE, 0), ("GATHER", OPERATOR, 1), ("Exp", DELEGATE_NODE, 0)),
        _recorded(("TOPK_V2", OPERATOR, 9)),
        _recorded(("TOPK_V2", OPERATOR, 1), ("TOPK_V2", OPERATOR, 1)),
    ],
    ids=["a piece is missing", "in both", "another operator", "no such operator", "twice"],
)
def test_timeline_events_of_another_graph_are_refused(run: RecordedRun) -> None:
    with pytest.raises(TargetUnavailable, match="LiteRT's profiler timed"):
        make_timeline(GRAPH, run)


def test_timeline_run_with_other_kernels_than_the_first_is_refused() -> None:
    other = _recorded(*[(event.tag, event.type, event.index) for event in reversed(RUN.events)])
    with pytest.raises(TargetUnavailable, match="cannot be summed"):
        make_timeline(GRAPH, RUN).profiled(other)


def test_graph_of_a_delegated_network_has_every_operator_once(folder: Path) -> None:
    graph = read_graph(open_interpreter(LIBRARY, folder / "detector.int8.tflite", threads=1))
    plain = read_graph(open_interpreter(LIBRARY, folder / "detector.int8.tflite", threads=1, builtin=True))
    assert graph.operators == plain.operators
    assert plain.partitions == ()
    taken = [index for partition in graph.partitions for index in partition]
    assert len(taken) == len(set(taken)) == graph.delegated
    codes = [graph.operators[index].code for index in taken]
    assert codes.count("CONV_2D") == 2
    assert "TOPK_V2" not in codes
    assert len(graph.partitions) > 1


# Paths and kinds


def test_owners_output_of_the_model_goes_to_what_it_is_made_of() -> None:
    operators = (
        Operator(0, "MUL", "roi_heads.detections@1/MUL", (0,), (1,)),
        Operator(1, "CAST", "boxes", (1,), (2,)),
        Operator(2, "CAST", "labels", (9,), (3,)),
    )
    assert owners_of_operators(OperatorGraph(operators, ())) == {
        "roi_heads.detections@1/MUL": "roi_heads.detections",
        "boxes": "roi_heads.detections",
        "labels": NOWHERE,
    }


@pytest.mark.parametrize(
    ("rows", "expected"), [(None, "module1"), (["module0", "module1"], "module1"), (["module0"], "module0")]
)
def test_owners_activation_of_its_own_follows_the_artifact_rows(
    rows: list[str] | None, expected: str
) -> None:
    graph = OperatorGraph(_operators("CONV_2D", "RELU"), ())
    assert owners_of_operators(graph, rows)["module1/RELU"] == expected


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("CONV_2D", "convolution"),
        ("Convolution (NHWC, QC8) IGEMM", "convolution"),
        ("FULLY_CONNECTED", "linear"),
        ("Fully Connected (NC, QS8, QC8W) GEMM", "linear"),
        ("Max Pooling (NHWC, S8)", "pooling"),
        ("Average Pooling (NHWC, F32) Average Pooling", "pooling"),
        ("Add (ND)", "elementwise"),
        ("Reciprocal Square Root (NC)", "elementwise"),
        ("Clamp (NC)", "activation"),
        ("SOFTMAX", "activation"),
        ("RESIZE_NEAREST_NEIGHBOR", "resize"),
        ("CONCATENATION", "concatenation"),
        ("NON_MAX_SUPPRESSION_V4", "nms"),
        ("Convert (NC)", "reformat"),
        ("Copy (NC, X8)", "reformat"),
        ("Static Reshape (NC)", "reformat"),
        ("STRIDED_SLICE", "reformat"),
        ("GATHER", "other"),
        ("TOPK_V2", "other"),
    ],
)
def test_kind_of_kernel(kernel: str, kind: Kind) -> None:
    assert kind_of_kernel(kernel) == kind
