"""Means against the loss of accuracy: each does what it says, and harm done on purpose is mended."""

from __future__ import annotations

import copy
from pathlib import Path

import msgspec
import pytest
import torch
from cli_fixtures import call, copied, place
from conftest import Frame
from torch import Tensor, nn

from qexport import mending, pipeline
from qexport.benchmarks.report import build_report
from qexport.benchmarks.sensitivity import measure_noise
from qexport.calibration.calibrator import calibrate
from qexport.calibration.means.bias import correct_biases
from qexport.calibration.means.equalization import equalize, find_links
from qexport.calibration.means.rounding import learn_rounding
from qexport.detectors.demo.scenes import HEIGHT, WIDTH
from qexport.detectors.load import LoadedDetector
from qexport.detectors.static import StaticDetector, make_static
from qexport.encodings import Encodings, QuantParams
from qexport.errors import RunFolderError
from qexport.files import read_json
from qexport.mend_results import MendReport
from qexport.quantization.fold import fold_batch_norm
from qexport.quantization.graph import export_graph
from qexport.quantization.partial import PartlyQuantized
from qexport.quantization.reference import QuantizedDetector, quantize
from qexport.settings import WeightScales

__all__ = ["copied", "place"]

PRODUCER, READER = "backbone.body.layer2.0.conv1", "backbone.body.layer2.0.conv2"


@pytest.fixture(scope="module")
def folded(demo_static: StaticDetector) -> StaticDetector:
    return fold_batch_norm(demo_static)


def tensor(static: StaticDetector, name: str) -> Tensor:
    found: Tensor = static.state_dict()[name]
    return found


def widened(folded: StaticDetector) -> StaticDetector:
    """Return the same function with one channel 500 times as wide between two layers."""
    harmed = copy.deepcopy(folded)
    with torch.no_grad():
        tensor(harmed, f"{PRODUCER}.weight")[0] *= 500
        tensor(harmed, f"{PRODUCER}.bias")[0] *= 500
        tensor(harmed, f"{READER}.weight")[:, 0] /= 500
    return harmed


def sqnr_db(
    static: StaticDetector, frames: list[Frame], weight_scales: WeightScales = "per-channel"
) -> float:
    quantized = quantize(static, calibrate(static, frames, weight_scales=weight_scales))
    _, db = measure_noise(quantized, PartlyQuantized(quantized), [], frames[:2])
    assert db is not None
    return db


def weight_scales(encodings: Encodings) -> dict[str, Tensor]:
    found = {}
    for row in encodings.rows:
        if row.port == "weight":
            assert isinstance(row.params, QuantParams)
            found[row.path] = torch.tensor(row.params.scale)
    return found


def test_links_are_layers_whose_every_reader_is_a_layer(folded: StaticDetector) -> None:
    links = {link.producer: link.readers for link in find_links(export_graph(folded))}
    assert links[PRODUCER] == (READER,)
    assert links["rpn.head.conv.0.0"] == ("rpn.head.cls_logits", "rpn.head.bbox_pred")
    assert links["roi_heads.box_head.fc6"] == ("roi_heads.box_head.fc7",)
    assert READER not in links  # an add reads it
    assert "rpn.head.cls_logits" not in links  # box arithmetic reads it


@pytest.fixture(scope="module")
def depthwise(demo: LoadedDetector) -> StaticDetector:
    """The demo detector with a depthwise layer behind another."""
    module = copy.deepcopy(demo.module)
    block = module.get_submodule(READER.rpartition(".")[0])
    block.conv2 = nn.Conv2d(64, 64, kernel_size=3, padding=1, groups=64, bias=False)
    return fold_batch_norm(make_static(module.eval(), frame_px=(HEIGHT, WIDTH)))


def test_links_reach_depthwise_layers(depthwise: StaticDetector) -> None:
    links = {link.producer: link.readers for link in find_links(export_graph(depthwise))}
    assert links[PRODUCER] == (READER,)


@pytest.mark.parametrize("weight_scales", ["per-channel", "per-tensor"])
def test_depthwise_detector_equalised_computes_the_same(
    depthwise: StaticDetector, demo_frames: list[Frame], weight_scales: WeightScales
) -> None:
    equal, _ = equalize(depthwise, demo_frames[:1], weight_scales=weight_scales)
    assert not torch.equal(tensor(equal, f"{READER}.weight"), tensor(depthwise, f"{READER}.weight"))
    frame = torch.from_numpy(demo_frames[0])
    with torch.no_grad():
        wanted, found = depthwise(frame), equal(frame)
    assert torch.equal(wanted.labels, found.labels)
    assert torch.allclose(wanted.boxes, found.boxes, atol=1e-2)


def test_equalize_gives_back_what_one_scale_for_unequal_weights_costs(
    folded: StaticDetector, demo_frames: list[Frame]
) -> None:
    plain = sqnr_db(folded, demo_frames, "per-tensor")
    harmed = widened(folded)
    assert sqnr_db(harmed, demo_frames, "per-tensor") < plain - 10
    equal, _ = equalize(harmed, demo_frames[:1], weight_scales="per-tensor")
    assert sqnr_db(equal, demo_frames, "per-tensor") > plain - 1
    own = tensor(equal, f"{PRODUCER}.weight").flatten(1).abs().amax(1)
    read = tensor(equal, f"{READER}.weight").transpose(0, 1).flatten(1).abs().amax(1)
    assert torch.allclose(own, read, rtol=1e-3)


def test_equalised_detector_computes_the_same(
    folded: StaticDetector, calibration_frames: list[Frame]
) -> None:
    equal, links = equalize(folded, calibration_frames[:4])
    assert len(links) >= 5
    frame = torch.from_numpy(calibration_frames[0])
    with torch.no_grad():
        wanted, found = folded(frame), equal(frame)
    assert int(wanted.count) == int(found.count) > 0
    torch.testing.assert_close(found.boxes, wanted.boxes, atol=1e-2, rtol=0)
    torch.testing.assert_close(found.scores, wanted.scores, atol=1e-4, rtol=0)


def test_equalising_mends_a_channel_that_took_the_range_of_all(
    folded: StaticDetector, calibration_frames: list[Frame]
) -> None:
    before = sqnr_db(folded, calibration_frames)
    harmed = widened(folded)
    hurt = sqnr_db(harmed, calibration_frames)
    mended, _ = equalize(harmed, calibration_frames)
    assert hurt < before - 3
    assert sqnr_db(mended, calibration_frames) > before - 0.5


def test_learned_weights_are_on_the_grid_and_closer_at_the_output(
    demo_quantized: QuantizedDetector, demo_encodings: Encodings, calibration_frames: list[Frame]
) -> None:
    scales, frames = weight_scales(demo_encodings), calibration_frames[:2]
    partly = PartlyQuantized(demo_quantized)
    weights = {path: tensor(demo_quantized.static, f"{path}.weight") for path in partly.layers()}
    node = partly.nodes_of(PRODUCER)[0]
    given = torch.from_numpy(calibration_frames[2])
    float_out = partly.run(given, frozenset())[node]
    # This layer alone, so that what it reads is the same before and after.
    alone = partly.keys - {key for key in partly.keys if not key.startswith(PRODUCER + "@0/weight")}
    before = partly.run(given, alone)[node]
    rounded = learn_rounding(partly, weights, scales, frames)
    after = partly.run(given, alone)[node]
    for path, weight in rounded.items():
        steps = scales[path].reshape(-1, *[1] * (weight.dim() - 1))
        codes = torch.round(weight / steps)
        assert torch.equal(codes * steps, weight), path
        assert codes.abs().max() <= 127
    assert (rounded[PRODUCER] - weights[PRODUCER]).abs().max() > 0
    assert (after - float_out).square().sum() < (before - float_out).square().sum()


def test_corrected_biases_leave_the_means_of_the_channels_as_they_were(
    demo_quantized: QuantizedDetector, calibration_frames: list[Frame]
) -> None:
    partly, frames = PartlyQuantized(demo_quantized), calibration_frames[:2]
    biases = {path: tensor(demo_quantized.static, f"{path}.bias") for path in partly.layers()}
    node = partly.nodes_of(READER)[0]

    def shift() -> float:
        means = []
        for frame in frames:
            given = torch.from_numpy(frame)
            wanted, found = partly.run(given, frozenset())[node], partly.run(given, partly.keys)[node]
            means.append((wanted - found).mean((0, 2, 3)))
        return float(torch.stack(means).mean(0).abs().max())

    before = shift()
    corrected = correct_biases(partly, biases, frames)
    assert corrected.keys() == biases.keys()
    assert shift() < before / 10


def test_mend_writes_a_checkpoint_that_a_run_takes_with_the_very_scales(copied: Path) -> None:
    answer = call("mend", "mine", "--images", "3")
    assert answer.code == 0, answer.err
    for means in mending.MEANS:
        assert means in answer.out
    report = read_json(Path("mine/mended/mended.json"), MendReport, RunFolderError)
    assert [result.means for result in report.results] == ["none", *mending.MEANS]
    best = report.results[0].sqnr_db
    for result in report.results[1:]:  # what loses is left out
        assert result.kept == (result.sqnr_db >= best)
        best = max(best, result.sqnr_db)
    begun = call(
        "inspect", "--qat", "mine/mended/mended.pt", "--model", "demo", "--data", "data", "--out", "new"
    )
    assert begun.code == 0, begun.err
    assert call("calibrate", "new").code == 0
    stored = torch.load("mine/mended/mended.pt", weights_only=True)
    mended = msgspec.json.decode(stored["encodings"].encode(), type=Encodings)
    scales = {row.key: row.params.scale for row in pipeline.resume(Path("new")).encodings.rows}
    assert scales == {row.key: row.params.scale for row in mended.rows}
    assert (
        f"next: qexport run --qat {Path('mine/mended/mended.pt')} --model demo --data data --frame 240x320"
        in answer.out
    )
    assert read_json(Path("new/mending.json"), MendReport, RunFolderError) == report
    page = build_report(Path("new"), dataset_root=None).html.read_text()
    section = page[page.index('id="origin"') :]
    assert f"{report.results[1].sqnr_db:.2f}" in section
    assert report.results[1].changed in section
    stored["notes"]["mended"] = "{"
    torch.save(stored, "damaged.pt")
    refused = call("inspect", "--qat", "damaged.pt", "--model", "demo", "--data", "data", "--out", "other")
    assert refused.code == 2
    assert "its note mended is damaged" in " ".join(refused.err.split())


def test_single_means_is_taken_alone(copied: Path) -> None:
    work = pipeline.resume(Path("mine"))
    report, path = mending.mend(work, ["correct-bias"], images=2)
    assert [result.means for result in report.results] == ["none", "correct-bias"]
    assert path.is_file()
