"""Small modules taken down the exporter's own road: calibrated, quantized, lowered, written, loaded and run.

The graph's input is one flat vector, cut into the tensors that a module takes outside of the quantized stages. Input
values lie on the grid of their scale, so that quantizing them is exact and what differs is the operator's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from graph_cases import Case, Cases
from torch import Tensor

from qexport.artifact import LayerDecision
from qexport.calibration.calibrator import calibrate
from qexport.encodings import Encodings
from qexport.plugins.qnnpack.file import write_torchscript
from qexport.plugins.qnnpack.lowering import Lowering
from qexport.plugins.qnnpack.readback import ReadFile, read_back
from qexport.quantization.reference import QuantizedDetector, quantize

SCALE = 1 / 32


@dataclass(frozen=True, slots=True)
class Lowered:
    """Cases as a file, read back, and what the reference makes of them."""

    encodings: Encodings
    quantized: QuantizedDetector
    names: dict[str, str]
    file: ReadFile
    layers: tuple[LayerDecision, ...]
    wanted: tuple[Tensor, ...]

    @property
    def results(self) -> list[Tensor]:
        """What the file gives."""
        return [self.file.tensors[name] for name in self.file.program.results]


def lower(cases: Sequence[Case], path: Path, *, keep_float: tuple[str, ...] = ()) -> Lowered:
    """Quantize cases in one graph, write them and read them back as the exporter does."""
    module: Any = Cases(cases)
    given = module.example_input()
    encodings = calibrate(module, [given.numpy()], keep_float=keep_float)
    made = quantize(module, encodings)
    parts, names = Lowering(made.graph, made.quantize_nodes).write()
    write_torchscript(parts, given, path)
    file = ReadFile(path, given, frozenset(names.values()))
    layers = read_back(file, made.graph, made.quantize_nodes, names, encodings)
    with torch.no_grad():
        wanted = made.graph(given)
    return Lowered(encodings, made, names, file, layers, tuple(wanted))
