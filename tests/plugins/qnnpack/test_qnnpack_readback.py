"""What reading back finds: files with other integers, scales, engines' needs; sabotaged where they are made."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from graph_cases import Cases, case
from qnnpack_graphs import lower
from torch import nn
from torch.ao.nn import quantized as nnq

from qexport.calibration.calibrator import calibrate
from qexport.encodings import Encodings, FloatRow
from qexport.errors import ArtifactError, ExportError, TargetUnavailable
from qexport.plugins.qnnpack import engine
from qexport.plugins.qnnpack.file import without_sources, write_torchscript
from qexport.plugins.qnnpack.lowering import Lowering
from qexport.plugins.qnnpack.readback import ReadFile, read_back
from qexport.quantization.reference import QuantizedDetector, quantize
from qexport.runtimes.qnnpack_library import quiet

CASES = [case(nn.Sequential(nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)), (1, 8, 12, 10))]
FIRST, SECOND = "backbone.0.0", "backbone.0.2"
Spoil = Callable[[Any], None]


def made() -> tuple[Encodings, QuantizedDetector, torch.Tensor]:
    module: Any = Cases(CASES)
    given = module.example_input()
    encodings = calibrate(module, [given.numpy()])
    return encodings, quantize(module, encodings), given


def read_spoilt(spoil: Spoil, folder: Path) -> None:
    """Spoil the lowered module before it is written; write it and read it back."""
    encodings, detector, given = made()
    parts, names = Lowering(detector.graph, detector.quantize_nodes).write()
    spoil(parts)
    write_torchscript(parts, given, folder / "spoilt.pt")
    file = ReadFile(folder / "spoilt.pt", given, frozenset(names.values()))
    read_back(file, detector.graph, detector.quantize_nodes, names, encodings)


def other_scale(parts: Any) -> None:
    parts.get_submodule(SECOND).scale *= 2


def other_zero_point(parts: Any) -> None:
    parts.get_submodule(SECOND).zero_point = 100


def change_weight(parts: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    module = parts.get_submodule(FIRST)
    with quiet():
        module.set_weight_bias(change(module.weight()), module.bias())


def per_tensor(weight: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(weight.dequantize(), 0.01, 0, torch.qint8)


def one_code_off(weight: torch.Tensor) -> torch.Tensor:
    codes = weight.int_repr()
    codes[0, 0, 0, 0] += 1 if codes[0, 0, 0, 0] < 0 else -1
    return torch._make_per_channel_quantized_tensor(
        codes, weight.q_per_channel_scales(), weight.q_per_channel_zero_points(), 0
    )


def one_scale_off(weight: torch.Tensor) -> torch.Tensor:
    scales = weight.q_per_channel_scales()
    scales[0] *= 1 + 2e-7
    return torch._make_per_channel_quantized_tensor(
        weight.int_repr(), scales, weight.q_per_channel_zero_points(), 0
    )


def other_bias(parts: Any) -> None:
    module = parts.get_submodule(FIRST)
    module.set_weight_bias(module.weight(), module.bias() + 1)


def in_float(parts: Any) -> None:
    """A part that dequantizes, convolves in float and quantizes again."""
    own = parts.get_submodule(SECOND)
    weight, bias, scale, zero_point = own.weight(), own.bias(), own.scale, own.zero_point

    class Float(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result = nn.functional.conv2d(x.dequantize(), weight.dequantize(), bias)
            return torch.quantize_per_tensor(result, scale, zero_point, torch.quint8)

    parts.get_submodule("backbone.0").add_module("2", Float())


SPOILT: dict[str, tuple[Spoil, str]] = {
    "scale": (other_scale, rf"{SECOND}@0/output:conv2d: scale .* the encodings say"),
    "zero point": (other_zero_point, rf"{SECOND}@0/output:conv2d: .* zero point 100"),
    "weight per tensor": (
        lambda parts: change_weight(parts, per_tensor),
        rf"{FIRST}@0: weight torch.qint8 torch.per_tensor_affine, expected qint8 per channel",
    ),
    "one weight": (lambda parts: change_weight(parts, one_code_off), rf"{FIRST}@0: weight of other integers"),
    "one scale of a weight": (
        lambda parts: change_weight(parts, one_scale_off),
        rf"{FIRST}@0: weight of scales that are not the encodings'",
    ),
    "bias": (other_bias, rf"{FIRST}@0: another bias"),
    "in float": (in_float, rf"{SECOND}@0: aten::dequantize, .*expected a quantized module"),
}


def test_file_as_it_was_made_passes(tmp_path: Path) -> None:
    read_spoilt(lambda parts: None, tmp_path)


@pytest.mark.filterwarnings("ignore:.*torch.quantize_per_tensor")
@pytest.mark.parametrize("name", SPOILT)
def test_file_that_was_spoilt_is_refused_by_layer(name: str, tmp_path: Path) -> None:
    spoil, message = SPOILT[name]
    with pytest.raises(ExportError, match=message):
        read_spoilt(spoil, tmp_path)


def test_layer_that_was_to_stay_float_and_is_quantized_is_refused(tmp_path: Path) -> None:
    lowered = lower(CASES, tmp_path / "cases.pt")
    row = FloatRow(FIRST, 0, "conv2d", "test")
    kept = msgspec.structs.replace(lowered.encodings, float_rows=(row,))
    with pytest.raises(ExportError, match=rf"{FIRST}@0: was kept in float, is quantized::conv2d_relu"):
        read_back(
            lowered.file, lowered.quantized.graph, lowered.quantized.quantize_nodes, lowered.names, kept
        )


def test_engine_with_weights_per_channel_passes() -> None:
    engine.check_engine("qnnpack")


def test_engine_without_weights_per_channel_is_refused_with_its_own_words() -> None:
    """FBGEMM has none for transposed convolutions; QNNPACK has them for all that is asked of it."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch has no FBGEMM, whose transposed convolutions have no weights per channel")

    def transposed() -> nn.Module:
        module: nn.Module = nnq.ConvTranspose2d(4, 4, 3)
        return module

    before = torch.backends.quantized.engine
    with pytest.raises(
        TargetUnavailable, match=r"'fbgemm' in torch .* Per Channel Quantization is currently disabled"
    ):
        engine.require_per_channel(
            "fbgemm", "transposed convolutions", transposed, (4, 4, 3, 3), torch.ones(1, 4, 5, 5), axis=1
        )
    assert torch.backends.quantized.engine == before


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "none",
            TargetUnavailable,
            r"wants PyTorch's quantization engine 'none'; torch .* here has .*qnnpack",
        ),
        ("fbgemm", ArtifactError, r"made for PyTorch's quantization engine 'fbgemm', which rounds otherwise"),
    ],
)
def test_engine_that_is_not_there_or_another_is_refused(
    name: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        engine.check_engine(name)


def test_file_without_sources_names_no_path_of_this_machine(tmp_path: Path) -> None:
    lower(CASES, tmp_path / "cases.pt")
    data = (tmp_path / "cases.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "cases.pt") as file:
        assert not [name for name in file.namelist() if name.endswith(".debug_pkl")]
        here = (str(Path(torch.__file__).parent), str(Path(engine.__file__).parent))
        assert not [name for name in file.namelist() for path in here if path.encode() in file.read(name)]
        stored = [entry for entry in file.infolist() if "/data/" in entry.filename]
    assert stored
    starts = [entry.header_offset + 30 + len(entry.filename) + len(entry.extra) for entry in stored]
    assert not any(start % 64 for start in starts)
    assert without_sources(data) == data
