"""From the layers of an engine, and what the profiler heard of them, to modules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorrt_runner_model import CONV, FILE_NAME, POOL, RELU, make_network

from qexport.benchmarks.latency_rows import shares_of, sum_by_path
from qexport.runtimes.runner import NOWHERE, KernelTime, SharedKernel
from qexport.runtimes.tensorrt_builder import EngineBuilder
from qexport.runtimes.tensorrt_engine import without_control_characters
from qexport.runtimes.tensorrt_layers import EngineLayer, parse_inspector
from qexport.runtimes.tensorrt_library import installed_flavour, load_library
from qexport.runtimes.tensorrt_owners import owner_of, owners_of_layers
from qexport.runtimes.tensorrt_profile import profiled_run
from qexport.target_options import BuildOptions

CLS, BOX = "roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"


def _layer(name: str, kernel: str, *nodes: str) -> EngineLayer:
    return EngineLayer(name, kernel, ("Int8",), ("Int8",), nodes)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        # The layer before it only lends its scale.
        (_layer("a", "correlation", f"{CONV}/Conv", "backbone.body.layer1.0/DequantizeLinear_1"), CONV),
        (_layer("b", "CaskConvolution", f"{CONV}@2/Conv", f"{CONV}@2/QuantizeLinear"), CONV),
        (
            _layer("c", "CaskConvolution", f"{CONV}/Conv", f"{RELU}/Relu", "backbone.body.layer1.0/Add"),
            SharedKernel((CONV,), by_macs=True, fused=(RELU, "backbone.body.layer1.0")),
        ),
        (_layer("d", "gemm", f"{BOX}/Gemm", f"{CLS}/Gemm"), SharedKernel((BOX, CLS), by_macs=True)),
        (
            _layer("e", "kgen", f"{CONV}/Conv", f"{CONV}/QuantizeLinear", f"{RELU}/Relu"),
            SharedKernel((CONV, RELU)),
        ),
        (_layer("f", "Reformat", f"{CONV}/QuantizeLinear"), CONV),
        (_layer("g", "memset"), NOWHERE),
        (_layer("h", "greater", "val_853/loop/Greater_9"), NOWHERE),
        # `ConvertSomething` is no convolution.
        (
            _layer("i", "correlation", f"{CONV}/Conv", f"{RELU}/ConvertLike"),
            SharedKernel((CONV,), by_macs=True, fused=(RELU,)),
        ),
    ],
    ids=lambda value: value.name if isinstance(value, EngineLayer) else "",
)
def test_owner_of_a_layer_is_who_computes_in_it(layer: EngineLayer, expected: object) -> None:
    assert owner_of(layer) == expected


def test_owner_of_a_baseline_layer_is_among_the_rows_of_the_artifact() -> None:
    layer = _layer("e", "PointWise", f"{CONV}/Mul", f"{RELU}/Relu")
    assert owner_of(layer, [CONV, POOL]) == CONV
    assert owner_of(layer, [POOL]) == SharedKernel((CONV, RELU))


@pytest.mark.skipif(installed_flavour() is None, reason="no TensorRT: pip install 'qexport[tensorrt-cpu]'")
def test_owners_of_an_engine_that_was_really_built_find_every_layer(
    tmp_path: Path,
) -> None:
    builder = EngineBuilder(load_library())
    builder.parse(make_network(tmp_path / FILE_NAME))
    layers = builder.build(BuildOptions()).layers
    owners = owners_of_layers(layers)
    assert owners.keys() == {layer.name for layer in layers}
    assert [owners[layer.name] for layer in layers if layer.kind == "convolution"] == [CONV]
    assert [owners[layer.name] for layer in layers if layer.kind == "pooling"] == [POOL]
    shares = [shares_of(owner, {CONV: 100}) for owner in owners.values()]
    assert [sum(share.values()) for share in shares] == pytest.approx([1.0] * len(layers))
    assert {path for share in shares for path in share} == {
        "preprocess",
        CONV,
        RELU,
        POOL,
        "roi_heads",
        NOWHERE,
    }


INSPECTED: tuple[tuple[str, str, tuple[str, ...], float], ...] = (
    ("Reformatting CopyNode for Input Tensor 0 to backbone.body.conv1/Conv", "Reformat", (), 0.02),
    (f"{CONV}/Conv + {RELU}/Relu", "CaskGemmConvolution", (f"{CONV}/Conv", f"{RELU}/Relu"), 0.5),
    (f"{BOX}/Gemm + {CLS}/Gemm", "CaskGemmMatrixMultiply", (f"{BOX}/Gemm", f"{CLS}/Gemm"), 0.3),
    ("{ForeignNode[roi_heads/Sub...roi_heads/Loop]}", "Myelin", ("roi_heads/Sub", "roi_heads/Loop"), 0.1),
    ("__mye_memset", "memset", (), 0.01),
)
"""An engine as the inspector of TensorRT 8.6 and newer lists it; no time is a measured one."""


def _inspector_json() -> str:
    tensor = {"Name": "t", "Dimensions": [1, 8, 4, 4], "Format/Datatype": "Row major Int8 format"}
    layers = [
        {
            "Name": name,
            "LayerType": kernel,
            "Inputs": [tensor],
            "Outputs": [tensor],
            "Metadata": " ".join(f"[ONNX Layer: {node}]" for node in nodes),
        }
        for name, kernel, nodes, _ in INSPECTED
    ]
    return json.dumps({"Layers": layers, "Bindings": ["frame", "boxes"]})


def test_profiled_run_of_an_inspected_engine_adds_up_by_module() -> None:
    layers = parse_inspector(_inspector_json())
    times = [(name, ms) for name, _, _, ms in INSPECTED]
    runs = [profiled_run(1.0, times, layers), profiled_run(1.1, [*times, times[-1]], layers)]
    assert [kernel.kernel for kernel in runs[0].kernels] == [kernel for _, kernel, _, _ in INSPECTED]
    costs = sum_by_path(runs[:1], owners_of_layers(layers))
    assert sum(cost.median_ms for cost in costs.values()) == pytest.approx(sum(ms for _, ms in times))
    assert costs[CONV].median_ms == pytest.approx(0.52)
    assert costs[RELU].median_ms == 0
    assert costs[RELU].others == {"CaskGemmConvolution": (CONV,)}
    assert costs[BOX].median_ms == costs[CLS].median_ms == pytest.approx(0.15)
    assert costs[NOWHERE].median_ms == pytest.approx(0.01)
    assert len(runs[1].kernels) == len(INSPECTED) + 1  # a layer of a loop is timed each time that it runs


def test_profiled_layer_that_the_inspector_does_not_list_stays_in_the_run() -> None:
    run = profiled_run(1.0, [("unknown", 0.5)], parse_inspector(_inspector_json()))
    assert [(kernel.name, kernel.duration_ms) for kernel in run.kernels] == [("unknown", 0.5)]
    assert "unknown" not in owners_of_layers(parse_inspector(_inspector_json()))


def test_profiled_layer_with_control_characters_in_its_name_is_found() -> None:
    text = '{"Layers": [{"Name": "a\x1eb", "LayerType": "kgen", "Metadata": "[ONNX Layer: x/A]\x1e[ONNX Layer: y/B]"}]}'
    (layer,) = layers = parse_inspector(without_control_characters(text))
    assert layer.nodes == ("x/A", "y/B")
    assert profiled_run(1.0, [("a\x1eb", 0.5)], layers).kernels == (KernelTime(layer.name, "kgen", 0.5),)
