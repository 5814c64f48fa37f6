"""Every target against every other, layer by layer: all are given the integers of the quantized reference.

End to end, a value that two runtimes round differently moves everything behind it, so that their difference says
little. Here no layer sees what another runtime, or its own, computed before: what differs is the layer's.

Images are streamed: sums are kept, tensors are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import Node

from qexport.cross_results import CrossLayer, CrossPair, CrossReport, CrossSum, CrossTarget
from qexport.errors import ArtifactError, ParityError, QexportError
from qexport.layers import Kind, Layer, Stage, stage_of
from qexport.quantization.graph import IMAGE_KEY, argument_node, is_dequantize, is_quantize
from qexport.quantization.local import Recorder, proposals_node
from qexport.quantization.reference import QuantizedDetector
from qexport.results import Gate
from qexport.runtimes.runner import ForcedRunner, input_of

REFERENCE = "reference"
VALUES_GATE, ADDS_GATE, STEP_GATE = "targets differ", "targets differ in adds", "targets' largest step"
SAME_ARITHMETIC = frozenset({"onnx", "tflite", "executorch", "qnnpack"})
"""Targets whose kernels compute the very integers of the scheme: between them next to nothing may differ."""
MOST_PER_MILLION = 10
MOST_PER_MILLION_ADDED = 1000
"""XNNPACK and QNNPACK scale the two sides of an add by fixed-point numbers of 20 bits, ONNX Runtime in float32. Where
the scales are nearly in a simple ratio, such as 2 to 1, many sums lie that close to half a step."""
MOST_STEPS = 1

_PROPOSALS = "proposals"
_PROMISED_KINDS = ("convolution", "linear")
_ADD = "output:add"
Codes = Mapping[str, NDArray[np.int8]]


def compare_all(
    quantized: QuantizedDetector,
    runners: Sequence[ForcedRunner],
    layers: Iterable[Layer],
    frames: Iterable[NDArray[np.uint8]],
    *,
    split: str,
    on_image: Callable[[], None] = lambda: None,
) -> CrossReport:
    """Run every layer of every target on the integers of the quantized reference; compare what comes out.

    Args:
        quantized: the detector and encodings that the artifacts were made of.
        runners: of the artifacts, open; at least two.
        layers: of the detector, as `inspect_layers` gives them.
        frames: (H, W, 3) uint8 RGB of the artifacts' size; one is held at a time.
        split: where the frames are from, for the report.
        on_image: called after each frame.

    Raises:
        QexportError: fewer than two targets.
        ArtifactError: they are not the same model: other encodings, another frame, another number of proposals.
        ParityError: no frame was given, or two targets have no convolution, linear or add in common.
    """
    _check_same_model(runners)
    known = {f"{layer.path}@{layer.call}/output:{layer.op}": layer for layer in layers}
    session = _Session(quantized, runners)
    images = 0
    for frame in frames:
        session.add(frame)
        images += 1
        on_image()
    if not images:
        raise ParityError("no image to compare on: choose another --split, or more --parity-images.")
    pairs = tuple(
        _pair(names, tallies, list(quantized.quantize_nodes), known)
        for names, tallies in session.tallies.items()
    )
    return CrossReport(
        encodings_sha256=runners[0].artifact.encodings_sha256,
        images=images,
        split=split,
        targets=(
            CrossTarget(name=REFERENCE, artifact_sha256="", rung="run"),
            *(
                CrossTarget(
                    name=runner.artifact.target,
                    artifact_sha256=runner.artifact.sha256,
                    rung=runner.rung,
                    kernels=runner.kernel_set,
                )
                for runner in runners
            ),
        ),
        pairs=pairs,
        gates=tuple(gate for pair in pairs if pair.first != REFERENCE for gate in _gates(pair)),
    )


def is_promised(kind: Kind, port: str) -> bool:
    """Say whether a gate is about a layer: a convolution, a linear or an add."""
    return kind in _PROMISED_KINDS or _is_add(port)


def _is_add(port: str) -> bool:
    return port.partition("#")[0] == _ADD


@dataclass(slots=True)
class _Tally:
    """What is kept of one tensor of two targets over all images."""

    values: int = 0
    differing: int = 0
    max_step: int = 0

    def add(self, one: NDArray[np.int8], other: NDArray[np.int8]) -> None:
        steps = np.abs(one.astype(np.int16) - other.reshape(one.shape))
        self.values += steps.size
        self.differing += int(np.count_nonzero(steps))
        self.max_step = max(self.max_step, int(steps.max(initial=0)))


@dataclass(slots=True)
class _Session:
    """Streams frames through the reference, and its integers through every target."""

    quantized: QuantizedDetector
    runners: Sequence[ForcedRunner]
    tallies: dict[tuple[str, str], dict[str, _Tally]] = field(init=False)
    _same: dict[tuple[str, str], frozenset[str]] = field(init=False)
    """Keys of the layers that compute the same thing in both, by pair."""
    _wanted: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        fused: dict[str, frozenset[str]] = {REFERENCE: frozenset()}
        for runner in self.runners:
            fused[runner.artifact.target] = frozenset(row.key for row in runner.artifact.unquantized)
        self.tallies = {pair: {} for pair in combinations(fused, 2)}
        inputs = _inputs_by_key(self.quantized)
        self._same = {
            (first, second): frozenset(_same_layers(inputs, fused[first], fused[second]))
            for first, second in self.tallies
        }
        self._wanted = {node.name: key for key, node in self.quantized.quantize_nodes.items()}
        self._wanted[proposals_node(self.quantized.graph).name] = _PROPOSALS

    def add(self, frame: NDArray[np.uint8]) -> None:
        """Compare on one frame."""
        recorder = Recorder(self.quantized.graph, self._wanted)
        with torch.no_grad():
            recorder.run(torch.from_numpy(input_of(frame, self.quantized.static.spec)))
        codes = {key: recorder.values[key].numpy() for key in self.quantized.quantize_nodes}
        proposals = recorder.values[_PROPOSALS].numpy()
        found: dict[str, Codes] = {REFERENCE: codes}
        for runner in self.runners:
            computed = runner.run_forced(runner.input_of(frame), codes, proposals)
            found[runner.artifact.target] = computed
        for (first, second), tallies in self.tallies.items():
            for key in found[first].keys() & found[second].keys() & self._same[first, second]:
                tallies.setdefault(key, _Tally()).add(found[first][key], found[second][key])


def _inputs_by_key(quantized: QuantizedDetector) -> dict[str, frozenset[str]]:
    """Return which quantized tensors each quantized tensor is computed from."""
    key_of = {node.args[0]: key for key, node in quantized.quantize_nodes.items()}
    proposals = proposals_node(quantized.graph)
    inputs: dict[str, frozenset[str]] = {}
    for key, quantizer in quantized.quantize_nodes.items():
        waiting, seen, found = [argument_node(quantizer)], set[Node](), set[str]()
        while waiting:
            node = waiting.pop()
            if node in seen or node is proposals:
                continue
            seen.add(node)
            source = node.args[0] if is_dequantize(node) else None
            if isinstance(source, Node) and is_quantize(source) and source.args[0] in key_of:
                found.add(key_of[source.args[0]])
            else:
                waiting += node.all_input_nodes
        inputs[key] = frozenset(found)
    return inputs


def _same_layers(
    inputs: Mapping[str, frozenset[str]], one: frozenset[str], other: frozenset[str]
) -> Iterator[str]:
    """Yield the keys whose layers are given the same integers by two targets.

    A target that leaves a tensor unquantized computes what reads it from values that the other rounds first.

    Args:
        inputs: of each key.
        one: keys that one target leaves unquantized.
        other: those of the other.
    """
    for key in inputs:
        waiting, read = [key], set[str]()
        while waiting:
            new = inputs[waiting.pop()] - read
            read |= new
            waiting += new & one & other  # fused in both: the layer begins before it
        if key not in one | other and not read & (one ^ other):
            yield key


def _check_same_model(runners: Sequence[ForcedRunner]) -> None:
    names = [runner.artifact.target for runner in runners]
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise QexportError(
            f"a table of targets against each other takes two or more, each once; given {', '.join(names) or 'none'}."
        )
    first = runners[0].artifact
    for runner in runners[1:]:
        other = runner.artifact
        both = f"{first.target} and {other.target} are not the same model"
        if other.encodings_sha256 != first.encodings_sha256:
            raise ArtifactError(
                f"{both}: made of different encodings ({first.encodings_sha256[:12]} and "
                f"{other.encodings_sha256[:12]}). Export both again in one run."
            )
        if (other.input, other.proposals) != (first.input, first.proposals):
            raise ArtifactError(
                f"{both}: one takes frames of {_describe(runners[0])}, the other of {_describe(runner)}. Export both "
                "again in one run."
            )


def _describe(runner: ForcedRunner) -> str:
    spec = runner.artifact.input
    return (
        f"{spec.frame_height_px}x{spec.frame_width_px}, preprocessed {spec.preprocess} to "
        f"{spec.padded_height_px}x{spec.padded_width_px}, with {runner.artifact.proposals} proposals"
    )


def _pair(
    names: tuple[str, str],
    tallies: Mapping[str, _Tally],
    keys: Sequence[str],
    known: Mapping[str, Layer],
) -> CrossPair:
    layers = tuple(
        _layer(order, key, tallies[key], known.get(key)) for order, key in enumerate(keys) if key in tallies
    )
    kinds = dict.fromkeys(layer.kind for layer in layers)
    promised = [layer for layer in layers if is_promised(layer.kind, layer.port)]
    if not promised:
        raise ParityError(
            f"{names[0]} and {names[1]} have no convolution, linear or add in common: nothing was compared. "
            "Export both again in one run."
        )
    return CrossPair(
        first=names[0],
        second=names[1],
        layers=layers,
        kinds={kind: _sum([layer for layer in layers if layer.kind == kind]) for kind in kinds},
        promised=_sum(promised),
        parts_at=next((layer.path for layer in layers if layer.differing), ""),
    )


def _layer(order: int, key: str, tally: _Tally, layer: Layer | None) -> CrossLayer:
    site, _, port = key.rpartition("/")
    path, _, call = site.rpartition("@")
    stage: Stage = layer.stage if layer else stage_of(path)
    # What only moves values, a view or a slice, is no layer of the detector's, though it has a place of its own.
    kind: Kind = layer.kind if layer else "other" if key == IMAGE_KEY else "reformat"
    return CrossLayer(
        order=order,
        path=path,
        call=int(call),
        port=port,
        stage=stage,
        kind=kind,
        values=tally.values,
        differing=tally.differing,
        max_step=tally.max_step,
    )


def _sum(layers: Sequence[CrossSum]) -> CrossSum:
    return CrossSum(
        values=sum(layer.values for layer in layers),
        differing=sum(layer.differing for layer in layers),
        max_step=max(layer.max_step for layer in layers),
    )


def _gates(pair: CrossPair) -> tuple[Gate, ...]:
    adds = [layer for layer in pair.layers if _is_add(layer.port)]
    weighted = [layer for layer in pair.layers if is_promised(layer.kind, layer.port) and layer not in adds]
    compared = [*weighted, *adds]
    worst = max(compared, key=lambda layer: (layer.max_step, layer.per_million))
    step = Gate(
        name=STEP_GATE,
        passed=pair.promised.max_step <= MOST_STEPS,
        measured=f"{pair.promised.max_step} step{'s' if pair.promised.max_step != 1 else ''}",
        limit=f"at most {MOST_STEPS} step, over convolutions, linears and adds",
        culprit=worst.path if worst.differing else "",
        subject=_subject(pair),
    )
    if not {pair.first, pair.second} <= SAME_ARITHMETIC:
        return (step,)
    over = ((VALUES_GATE, weighted, MOST_PER_MILLION), (ADDS_GATE, adds, MOST_PER_MILLION_ADDED))
    return (*(_values_gate(pair, name, layers, most) for name, layers, most in over if layers), step)


def _values_gate(pair: CrossPair, name: str, layers: Sequence[CrossLayer], most: int) -> Gate:
    found = _sum(layers)
    worst = max(layers, key=lambda layer: layer.differing)
    what = "adds" if name == ADDS_GATE else "convolutions and linears"
    return Gate(
        name=name,
        passed=found.per_million < most,
        measured=f"{found.per_million:.2f} per million ({found.differing:,} of {found.values:,})",
        limit=f"fewer than {most:,} per million, over {what}",
        culprit=worst.path if worst.differing else "",
        subject=_subject(pair),
    )


def _subject(pair: CrossPair) -> str:
    return f"{pair.first} and {pair.second}"
