"""QAT checkpoints that cannot be used are refused, by name; what can only partly be used says what was given away."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import qat_models
import torch
from conftest import Frame
from qat_cases import ASSETS, EAGER, FX, MODELS, PT2E, write_modelopt
from torch import Tensor

from qexport.calibration.checkpoints import QatCheckpoint, QatRange, read_checkpoint
from qexport.calibration.expression import express_activation, express_weight
from qexport.calibration.filling import encodings_from_checkpoint
from qexport.calibration.loading import load_trained
from qexport.detectors.load import LoadedDetector
from qexport.detectors.static import StaticDetector
from qexport.encodings import Encodings, origin_of
from qexport.errors import CheckpointError

SINGLE_LEVEL = f"{Path(__file__).parents[1] / 'torchvision_detectors.py'}:build_single_level"
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return EAGER.write(tmp_path_factory.mktemp("eager"))


@pytest.fixture(scope="module")
def fx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FX.write(tmp_path_factory.mktemp("fx"))


@pytest.fixture(scope="module")
def modelopt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_modelopt(tmp_path_factory.mktemp("modelopt"))


def changed(path: Path, folder: Path, change: Callable[[State], object]) -> Path:
    """Return a copy of a checkpoint with another state dict."""
    loaded = torch.load(path, weights_only=True)
    change(loaded.get("model_state_dict", loaded))
    torch.save(loaded, folder / "changed.pt")
    return folder / "changed.pt"


def load(
    path: Path, *, model: str = "demo", weights: Path | None = None, prepare: str | None = None
) -> QatCheckpoint:
    return load_trained(model, path, weights=weights, prepare=prepare, seed=0)[1]


def encodings(
    static: StaticDetector, checkpoint: QatCheckpoint, frames: list[Frame], **options: Any
) -> Encodings:
    return encodings_from_checkpoint(static, checkpoint, frames, **options)


def test_checkpoint_of_another_architecture_raises(eager: Path, modelopt: Path) -> None:
    with pytest.raises(CheckpointError, match="of another architecture"):
        load(modelopt, model=SINGLE_LEVEL)
    with pytest.raises(CheckpointError, match=r"fused with a BatchNorm.*none behind them"):
        load(eager, model=SINGLE_LEVEL)


def test_checkpoint_saved_before_the_first_step_raises(tmp_path: Path) -> None:
    path = qat_models.save(qat_models.prepare_fx(), tmp_path / "fresh.pt")
    with pytest.raises(CheckpointError, match=r"quantizers never saw data.*scale 1, observed range empty"):
        load(path, prepare=FX.prepare)


def test_one_quantizer_that_never_saw_data_raises_where_a_row_needs_it(
    eager: Path, tmp_path: Path, demo_static: StaticDetector, calibration_frames: list[Frame]
) -> None:
    def forget(state: State) -> None:
        name = "roi_heads.box_head.fc6.activation_post_process"
        state[f"{name}.scale"].fill_(1)
        state[f"{name}.zero_point"].zero_()
        state[f"{name}.activation_post_process.min_val"].fill_(math.inf)
        state[f"{name}.activation_post_process.max_val"].fill_(-math.inf)

    checkpoint = load(changed(eager, tmp_path, forget))
    with pytest.raises(
        CheckpointError, match=r"fc6\.activation_post_process\.scale cannot be used: it never saw data"
    ):
        encodings(demo_static, checkpoint, calibration_frames[:1])
    kept = encodings(demo_static, checkpoint, calibration_frames[:1], keep_float=("roi_heads.box_head",))
    assert "roi_heads.box_head.fc6@0/weight" not in kept.by_key()


def test_input_without_amax_raises(modelopt: Path, tmp_path: Path) -> None:
    name = "backbone.fpn.layer_blocks.1.0.input_quantizer"
    path = changed(modelopt, tmp_path, lambda state: state.pop(f"{name}._amax"))
    with pytest.raises(
        CheckpointError, match=rf"1 quantizers never saw data: {name} \(no _amax, the weight has one\)"
    ):
        load(path)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("kind", ["eager", "modelopt"])
def test_scale_that_is_zero_negative_or_not_finite_raises(
    request: pytest.FixtureRequest, tmp_path: Path, value: float, kind: str
) -> None:
    source: Path = request.getfixturevalue(kind)
    name = {
        "eager": "rpn.head.cls_logits.activation_post_process.scale",
        "modelopt": "rpn.head.cls_logits.input_quantizer._amax",
    }[kind]
    path = changed(source, tmp_path, lambda state: state[name].fill_(value))
    with pytest.raises(CheckpointError, match=rf"1 of \d+ scales are zero, negative or not finite: {name}"):
        load(path)


def test_weights_of_half_of_the_layers_missing_raises(modelopt: Path, tmp_path: Path) -> None:
    def halve(state: State) -> None:
        for key in [
            key for key in state if key.startswith(("rpn.", "roi_heads.")) and "quantizer" not in key
        ]:
            del state[key]

    with pytest.raises(CheckpointError, match=r"14 missing: .*rpn\.head"):
        load(changed(modelopt, tmp_path, halve))


def test_scales_of_half_of_the_layers_missing_are_calibrated_and_refused_by_strict(
    modelopt: Path, tmp_path: Path, demo_static: StaticDetector, calibration_frames: list[Frame]
) -> None:
    def halve(state: State) -> None:
        for key in [key for key in state if key.startswith(("rpn.", "roi_heads.")) and "_amax" in key]:
            del state[key]

    checkpoint = load(changed(modelopt, tmp_path, halve))
    rows = encodings(demo_static, checkpoint, calibration_frames[:1]).by_key()
    assert rows["rpn.head.cls_logits@0/weight"].source == "calibrated min-max"
    assert origin_of(rows["backbone.body.conv1@0/weight"]) == "checkpoint"
    with pytest.raises(
        CheckpointError, match=r"--strict, and the checkpoint does not say \d+ scales:\n(.*\n)*.*rpn"
    ):
        encodings(demo_static, checkpoint, calibration_frames[:1], strict=True)


def test_fused_batch_norm_that_is_there_twice_raises(eager: Path, tmp_path: Path) -> None:
    def double(state: State) -> None:
        state["backbone.body.module.bn1.running_mean"] = torch.zeros(24)

    with pytest.raises(CheckpointError, match=r"holds its BatchNorm as backbone\.body\.conv1\.bn"):
        load(changed(eager, tmp_path, double))


def test_fused_batch_norm_of_another_width_raises(eager: Path, tmp_path: Path) -> None:
    def widen(state: State) -> None:
        for name in ("weight", "bias", "running_mean", "running_var"):
            state[f"backbone.body.module.conv1.bn.{name}"] = torch.ones(25)

    with pytest.raises(
        CheckpointError, match=r"wrong shape: backbone\.body\.bn1\.weight \(25,\), expected \(24,\)"
    ):
        load(changed(eager, tmp_path, widen))


@pytest.mark.parametrize("section", ["activation_encodings", "param_encodings"])
def test_aimet_encodings_with_unknown_paths_raise(tmp_path: Path, section: str) -> None:
    document = json.loads((ASSETS / "aimet_plain_0.6.1_torch.json").read_bytes())
    name = next(iter(document[section]))
    document[section][name.replace("backbone.", "trunk.")] = document[section].pop(name)
    path = tmp_path / "encodings.json"
    path.write_text(json.dumps(document))
    with pytest.raises(
        CheckpointError, match=r"1 encodings name modules that the detector does not have: trunk\.0"
    ):
        read_checkpoint(path, load_single_level())


def load_single_level() -> torch.nn.Module:
    from torchvision_detectors import build_single_level  # noqa: PLC0415 - it runs the detector

    return build_single_level()


def test_aimet_encoding_without_a_scale_raises(tmp_path: Path) -> None:
    document = json.loads((ASSETS / "aimet_plain_0.6.1_torch.json").read_bytes())
    del document["param_encodings"]["backbone.0.weight"][2]["scale"]
    path = tmp_path / "encodings.json"
    path.write_text(json.dumps(document))
    with pytest.raises(
        CheckpointError, match=r"param_encodings\.backbone\.0\.weight has no scale and offset"
    ):
        read_checkpoint(path, load_single_level())


def test_file_of_no_known_format_raises_what_is_recognised_and_what_was_found(
    demo: LoadedDetector, tmp_path: Path
) -> None:
    path = qat_models.save(demo.module, tmp_path / "float.pt")
    with pytest.raises(CheckpointError) as raised:
        load(path)
    said = str(raised.value)
    assert "a state dict of 116 tensors whose keys end in bias, num_batches_tracked" in said
    for name in ("PyTorch FX QAT", "NVIDIA ModelOpt", "AIMET encodings", "qexport QAT"):
        assert name in said
    (tmp_path / "other.json").write_text('{"scales": [1]}')
    with pytest.raises(CheckpointError, match="a JSON document with scales"):
        load(tmp_path / "other.json")
    (tmp_path / "cut.json").write_text('{"activation_encodings": {')
    with pytest.raises(CheckpointError, match="damaged or cut short JSON"):
        load(tmp_path / "cut.json")


def test_converted_model_raises(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.zeros(2, dtype=torch.int8)}, tmp_path / "int8.pt")
    with pytest.raises(CheckpointError, match="converted already"):
        load(tmp_path / "int8.pt")


def test_pt2e_checkpoint_without_the_prepared_model_raises(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--qat-prepare FILE:FUNCTION"):
        load(PT2E.write(tmp_path))


def test_fx_checkpoint_without_the_prepared_model_keeps_weights_and_says_what_to_give(
    fx: Path, demo_static: StaticDetector, calibration_frames: list[Frame]
) -> None:
    checkpoint = load(fx)
    found = encodings(demo_static, checkpoint, calibration_frames[:1])
    assert "--qat-prepare FILE:FUNCTION" in str(found.calibration["qat note"])
    assert {row.port for row in found.rows if origin_of(row) == "checkpoint"} == {"weight"}
    with pytest.raises(CheckpointError, match=r"--strict(.*\n)*.*--qat-prepare FILE:FUNCTION"):
        encodings(demo_static, checkpoint, calibration_frames[:1], strict=True)


def test_prepared_model_that_does_not_fit_raises(fx: Path) -> None:
    with pytest.raises(CheckpointError, match="builds another model than"):
        load(fx, prepare=f"{MODELS}:demo_detector")
    with pytest.raises(CheckpointError, match=r"there is no file missing\.py"):
        load(fx, prepare="missing.py:prepare")
    with pytest.raises(CheckpointError, match="expected FILE:FUNCTION"):
        load(fx, prepare="missing")


def test_prepared_model_for_a_format_that_needs_none_raises(modelopt: Path) -> None:
    with pytest.raises(CheckpointError, match="is for checkpoints of FX, PT2E and eager QAT"):
        load(modelopt, prepare=FX.prepare)


def test_scales_alone_without_weights_raise() -> None:
    with pytest.raises(CheckpointError, match="holds scales alone"):
        load(ASSETS / "aimet_plain_1.0.0.json", model=SINGLE_LEVEL)


def test_modelopt_with_other_than_8_bits_raises(modelopt: Path, tmp_path: Path) -> None:
    loaded = torch.load(modelopt, weights_only=True)
    quantizers = loaded["modelopt_state"]["modelopt_state_dict"][-1][1]["metadata"]["quantizer_state"]
    quantizers["backbone.body.conv1.weight_quantizer"]["_num_bits"] = (4, 3)
    torch.save(loaded, tmp_path / "fp8.pt")
    with pytest.raises(CheckpointError, match=r"1 quantizers are not of 8-bit integers.*\(4, 3\)"):
        load(tmp_path / "fp8.pt")


def test_affine_activations_are_requantized_with_the_loss_shown_and_refused_by_strict(
    tmp_path: Path, demo_static: StaticDetector, calibration_frames: list[Frame]
) -> None:
    model = qat_models.train_parts(qat_models.prepare_fx_default())
    path = qat_models.save(model, tmp_path / "affine.pt")
    checkpoint = load(path, prepare=f"{MODELS}:prepare_fx_default")
    rows = encodings(demo_static, checkpoint, calibration_frames[:1]).by_key()
    relu = rows["backbone.body.conv1@0/output:conv2d"]
    assert "zero point 0 of codes 0 to 255; step" in relu.source
    assert relu.source.endswith("6.1 dB given away")
    trained = float(model.state_dict()["backbone.activation_post_process_1.scale"])
    assert relu.params.scale[0] == pytest.approx(trained * 255 / 127, rel=1e-6)
    assert "one scale for all 96 channels" in rows["backbone.body.layer3.1.conv1@0/weight"].source
    assert len(set(rows["backbone.body.layer3.1.conv1@0/weight"].params.scale)) == 1
    kept = ("rpn", "roi_heads")
    with pytest.raises(CheckpointError, match=r"\d+ of \d+ scales are not the checkpoint's:\n.*preprocess"):
        encodings(demo_static, checkpoint, calibration_frames[:1], strict=True, keep_float=kept)


@pytest.mark.parametrize(
    ("qmin", "qmax", "zero", "kept"),
    [
        (-128, 127, 0, True),
        (0, 255, 128, True),  # symmetric quint8
        (0, 127, 0, True),  # reduce_range behind a ReLU
        (0, 127, 40, True),
        (-64, 63, 0, True),
        (0, 255, 127, True),
        (0, 255, 0, False),
        (-128, 127, -128, False),
        (0, 65535, 32768, False),
    ],
)
def test_activation_scale_is_kept_where_int8_with_zero_point_0_has_its_codes(
    qmin: int, qmax: int, zero: int, kept: bool
) -> None:
    entry = QatRange("layer", "output", (0.1,), "buffer", zero_point=(zero,), qmin=qmin, qmax=qmax)
    found = express_activation(entry)
    assert (found.scale == (0.1,)) == kept
    if not kept:
        assert found.source.startswith("requantized: buffer, zero point")
        assert "dB given away" in found.source
        assert found.scale[0] * 127 == pytest.approx(0.1 * max(zero - qmin, qmax - zero), rel=1e-6)


def test_weight_codes_of_minus_128_become_minus_127_and_are_counted() -> None:
    weight = torch.tensor([[-12.8, 1.0], [6.0, 3.0]])
    entry = QatRange("layer", "weight", (0.1, 0.1), "buffer", qmin=-128, qmax=127, axis=0)
    found = express_weight(entry, weight, None)
    assert found.scale == pytest.approx((0.1, 0.1))
    assert found.source.startswith("requantized: buffer; 1 of 4 codes of -128 became -127")
    assert not express_weight(entry, weight.clamp(min=-12.7), None).requantized


def test_weight_channel_without_a_value_keeps_a_scale_above_zero() -> None:
    weight = torch.tensor([[0.0, 0.0], [1.27, 0.5]])
    entry = QatRange("layer", "weight", (0.0, 0.01), "buffer", qmin=-127, qmax=127, axis=0)
    found = express_weight(entry, weight, torch.tensor([0.0, -1.0]))
    assert min(found.scale) > 0
    assert not found.requantized
