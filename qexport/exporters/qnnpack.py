"""One TorchScript file of PyTorch's quantized modules, at the detector's own module paths; float32 beside it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

import qexport
from qexport.artifact import Artifact, TensorSite, describe_file, save_artifact
from qexport.encodings import Encodings
from qexport.errors import EncodingsError, ExportError
from qexport.files import sha256_json
from qexport.plugins.qnnpack.engine import check_engine
from qexport.plugins.qnnpack.file import write_torchscript
from qexport.plugins.qnnpack.lowering import PROPOSALS, Lowering
from qexport.plugins.qnnpack.operators import shape_of
from qexport.plugins.qnnpack.readback import ReadFile, read_back
from qexport.quantization.reference import QuantizedDetector
from qexport.runtimes.qnnpack_library import ENGINE, ZERO_POINT, as_exported, engine_set
from qexport.target_options import TargetOptions
from qexport.versions import package_versions

INT8, FP32 = "int8", "fp32"
FILE_NAMES = {INT8: "detector.int8.pt", FP32: "detector.fp32.pt"}


def export(
    quantized: QuantizedDetector,
    encodings: Encodings,
    folder: Path,
    *,
    labels: tuple[str, ...],
    options: TargetOptions,
) -> Artifact:
    """Write the artifact into `folder`; its files are loaded and read back first.

    Args:
        quantized: the detector with its encodings applied.
        encodings: the table that `quantized` was made with.
        folder: made where it is missing; files of the same names are replaced.
        labels: class names by label.
        options: none; the engine is QNNPACK.

    Raises:
        EncodingsError: a zero point that is not 0.
        ExportError: a layer is not what the encodings say, or a file computes otherwise than what was exported.
        TargetUnavailable: this PyTorch has no QNNPACK, or one without weights per channel.
        UnsupportedOperator: an operator of the detector that PyTorch and torchvision do not have.
    """
    del options
    _check_zero_points(encodings)
    check_engine(ENGINE)
    given = quantized.static.example_input()
    with engine_set():
        lowered, names = Lowering(quantized.graph, quantized.quantize_nodes).write()
    write_torchscript(lowered, given, folder / FILE_NAMES[INT8])
    file = _read_same(folder / FILE_NAMES[INT8], lowered, given, frozenset(names.values()))
    layers = read_back(file, quantized.graph, quantized.quantize_nodes, names, encodings)
    in_float, _ = Lowering(quantized.float_graph, {}).write()
    write_torchscript(in_float, given, folder / FILE_NAMES[FP32])
    _read_same(folder / FILE_NAMES[FP32], in_float, given, frozenset())
    artifact = Artifact(
        target="qnnpack",
        qexport_version=qexport.__version__,
        versions=package_versions("torch", "torchvision", "torchao"),
        detector_sha256=encodings.detector_sha256,
        encodings_sha256=sha256_json(encodings),
        labels=labels,
        input=quantized.static.spec,
        proposals=quantized.static.proposals,
        detections=quantized.static.detections,
        forms={"engine": ENGINE, "roi_align": "torchvision, float32", "nms": "torchvision"},
        files=tuple(describe_file(folder, name, role) for role, name in FILE_NAMES.items()),
        sites=tuple(
            TensorSite(key=key, tensor=names[key], zero_point=ZERO_POINT, shape=shape_of(node))
            for key, node in quantized.quantize_nodes.items()
        ),
        float_sites={PROPOSALS: names[PROPOSALS]},
        layers=layers,
    )
    save_artifact(artifact, folder)
    return artifact


def _check_zero_points(encodings: Encodings) -> None:
    """Refuse what quint8 with zero point 128 does not hold."""
    for row in encodings.rows:
        if row.params.zero_point != 0:
            raise EncodingsError(
                f"{row.key} has zero point {row.params.zero_point}; the scheme has 0, which is {ZERO_POINT} in "
                "QNNPACK's quint8. Calibrate again, or requantize the checkpoint that it is from."
            )


def _read_same(path: Path, module: GraphModule, given: Tensor, kept: frozenset[str]) -> ReadFile:
    """Return a file as it is loaded; refuse it where it computes other outputs than the module it was made of."""
    file = ReadFile(path, given, kept)
    with as_exported():
        wanted = module(given)
    found = [file.tensors[name] for name in file.program.results]
    differing = sum(not torch.equal(*pair) for pair in zip(wanted, found, strict=True))
    if differing:
        raise ExportError(
            f"{path}: loaded again, {differing} of its {len(wanted)} outputs are others than what was exported. Use "
            "tested versions of torch and torchvision: constraints.txt."
        )
    return file
