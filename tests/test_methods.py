"""Other methods of quantization: what they change, what they leave, and what cannot be asked of them."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_fixtures import copied, place
from conftest import Frame
from torch import nn

from qexport import pipeline
from qexport.benchmarks import detect
from qexport.benchmarks.methods import (
    describe_activations,
    describe_dynamic,
    describe_float,
    dynamic_linears,
    eager_dynamic,
    engine_name,
    state_bytes,
    time_methods,
)
from qexport.detectors.load import LoadedDetector
from qexport.detectors.static import StaticDetector
from qexport.encodings import Encodings, without_weights
from qexport.errors import QexportError, RunFolderError
from qexport.files import read_json
from qexport.method_results import FLOAT
from qexport.methods import check_methods
from qexport.quantization.graph import is_dequantize, op_name
from qexport.quantization.local import Recorder
from qexport.quantization.quantizer import WEIGHTED
from qexport.quantization.reference import QuantizedDetector, quantize
from qexport.results import AccuracyReport

__all__ = ["copied", "place"]


@pytest.fixture(scope="module")
def dynamic(demo: LoadedDetector) -> nn.Module:
    return dynamic_linears(demo.module)


def test_dynamic_linears_quantizes_linears_alone_and_leaves_the_detector(
    demo: LoadedDetector, dynamic: nn.Module
) -> None:
    before = {name: type(module) for name, module in demo.module.named_modules()}
    changed = {
        name for name, module in dynamic.named_modules() if before.get(name, type(module)) is not type(module)
    }
    assert changed == {name for name, kind in before.items() if kind is nn.Linear}
    assert len(changed) == 4


def test_dynamic_linears_computes_what_its_scheme_says(demo: LoadedDetector, dynamic: nn.Module) -> None:
    own = demo.module.get_submodule("roi_heads.box_head.fc7")
    rows = torch.linspace(-1, 3, 4 * own.in_features).reshape(4, -1)
    found = dynamic.get_submodule("roi_heads.box_head.fc7")(rows)
    scale_w = (
        float(own.weight.abs().max()) / 127.5
    )  # symmetric over -128..127, one scale for the whole tensor
    # Both ends of the range are quantized to 7 bits by PyTorch's kernels, whose sums are of 16.
    scale_x = 4 / 127
    wanted = own(rows)
    bound = 0.5 * (scale_w * rows.abs().sum(1, keepdim=True) + scale_x * own.weight.abs().sum(1))
    assert ((found - wanted).abs() <= bound + scale_w * scale_x * own.in_features).all()
    assert not torch.equal(found, wanted)


def test_dynamic_detector_finds_what_the_float_one_does(
    demo: LoadedDetector, dynamic: nn.Module, demo_frames: list[Frame]
) -> None:
    before = torch.backends.quantized.engine
    loaded = LoadedDetector(
        module=dynamic,
        source=demo.source,
        labels=demo.labels,
        num_classes=demo.num_classes,
        weights_sha256=demo.weights_sha256,
        random_weights=demo.random_weights,
        backbone=demo.backbone,
    )
    with eager_dynamic(loaded) as run, detect.eager(demo) as wanted:
        assert torch.backends.quantized.engine == engine_name()
        for frame in demo_frames[:2]:
            found, expected = run(frame), wanted(frame)
            sure = expected.scores > 0.9
            assert sure.any()
            np.testing.assert_allclose(found.boxes[: sure.sum()], expected.boxes[sure], atol=4)
    assert torch.backends.quantized.engine == before


def test_dynamic_linears_without_a_linear_is_refused() -> None:
    with pytest.raises(QexportError, match="no linear layer"):
        dynamic_linears(nn.Sequential(nn.Conv2d(3, 3, 1)))


def test_float_weights_leave_feature_maps_quantized_and_weights_as_they_were(
    demo_static: StaticDetector,
    demo_encodings: Encodings,
    demo_quantized: QuantizedDetector,
    demo_frames: list[Frame],
) -> None:
    found = quantize(demo_static, without_weights(demo_encodings))
    assert found.quantize_nodes.keys() == demo_quantized.quantize_nodes.keys()
    assert not any(
        is_dequantize(node.args[1]) for node in found.graph.graph.nodes if op_name(node) in WEIGHTED
    )
    frame = torch.from_numpy(demo_frames[0])
    wanted = {node.name: key for key, node in demo_quantized.quantize_nodes.items()}
    first = "backbone.body.conv1@0/output:conv2d"
    values = []
    for graph in (demo_quantized.graph, found.graph):
        recorder = Recorder(graph, wanted)
        with torch.no_grad():
            recorder.run(frame)
        values.append(recorder.values)
    reference, actual = values
    image = next(iter(demo_quantized.quantize_nodes))
    assert torch.equal(reference[image], actual[image])
    difference = (reference[first].int() - actual[first].int()).abs()
    assert 0 < int(difference.max()) <= 4
    # Beginning with the very integers of the image, the first layer is the float convolution of them.
    node = demo_quantized.quantize_nodes[first]
    conv = demo_quantized.static.get_submodule("backbone.body.conv1")
    scale = demo_quantized.quantize_nodes[image].args[1]
    with torch.no_grad():
        expected = torch.relu(conv(actual[image].float() * scale))
    codes = torch.clamp(torch.round(expected / node.args[1]), -128, 127).to(torch.int8)
    assert int((codes.int() - actual[first].int()).abs().max()) <= 1
    assert int((codes != actual[first]).sum()) <= 5


def test_sizes_are_those_of_the_saved_state(demo: LoadedDetector, dynamic: nn.Module) -> None:
    own, small = describe_float(demo.module), describe_dynamic(demo.module, dynamic)
    weights = sum(module.weight.numel() for module in demo.module.modules() if isinstance(module, nn.Linear))
    assert own.size_bytes == state_bytes(demo.module) > 4 * sum(p.numel() for p in demo.module.parameters())
    assert small.size_bytes == pytest.approx(own.size_bytes - 3 * weights, rel=0.01)
    assert describe_activations(demo.module).size_bytes == own.size_bytes
    assert (own.name, small.what.partition(":")[0]) == (FLOAT, "4 linears")


def test_time_methods_runs_both_in_turns_and_warns_of_nothing(
    demo: LoadedDetector, dynamic: nn.Module, demo_frames: list[Frame]
) -> None:
    modules = {FLOAT: demo.module, "dynamic": dynamic}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = time_methods(modules, demo_frames[0], detector_sha256="0" * 64, warmup=0, runs=2)
    assert not said
    assert {name: stats.runs for name, stats in found.whole.items()} == {FLOAT: 2, "dynamic": 2}
    assert found.threads == 1
    with pytest.raises(QexportError, match="0 runs after 0"):
        time_methods(modules, demo_frames[0], detector_sha256="0" * 64, warmup=0, runs=0)


def test_check_methods_names_what_there_is() -> None:
    assert check_methods(["activations", "dynamic"]) == ("activations", "dynamic")
    with pytest.raises(
        QexportError, match="no method 'static'; there is dynamic, activations, ptq, and static"
    ):
        check_methods(["static"])
    with pytest.raises(QexportError, match="dynamic is given more than once"):
        check_methods(["dynamic", "dynamic"])


def test_ptq_of_a_run_without_checkpoint_is_its_own_reference(copied: Path) -> None:
    report, latency = pipeline.compare_methods(pipeline.resume(Path("mine")), ["ptq"], runs=1, warmup=0)
    accuracy = read_json(Path("mine/accuracy.json"), AccuracyReport, RunFolderError)
    reference = next(each for each in accuracy.subjects if each.subject == "reference")
    row = report.rows[1]
    assert row.method == "ptq"
    assert (row.voc_map50, row.coco_map) == (reference.voc_map50, reference.coco_map)
    assert row.size_bytes < report.rows[0].size_bytes / 2
    assert latency is None
