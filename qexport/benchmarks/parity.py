"""Parity of an artifact with its references, layer by layer, the three questions kept apart.

Local: feed each layer the very integers that the runtime saw; at most one step may differ.
Cumulative: signal to noise against the float detector and against the quantized reference.
Detections: proposals and detections matched as sets.

Images are streamed: sums are kept, tensors are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import GraphModule

from qexport.benchmarks.recall import Against, RecallCounter
from qexport.detections import Detections
from qexport.errors import ParityError
from qexport.layers import Layer
from qexport.quantization.graph import argument_node, scale_of
from qexport.quantization.local import LocalReference, Recorder, proposals_node
from qexport.quantization.reference import QuantizedDetector, without_quantizers
from qexport.results import Gate, KernelSetParity, LayerParity, ParityReport, ParityStatus
from qexport.runtimes.runner import Runner, input_of
from qexport.sites import codes_of

PROPOSALS = "proposals"
LAYER_GATE = "layer parity"


def compare(
    quantized: QuantizedDetector,
    runner: Runner,
    layers: Iterable[Layer],
    frames: Iterable[NDArray[np.uint8]],
    *,
    split: str,
    tolerance_steps: int = 1,
    max_unmatched: float = 0.0,
    on_image: Callable[[], None] = lambda: None,
) -> ParityReport:
    """Compare an artifact with its references.

    Args:
        quantized: the detector and encodings that the artifact was made of.
        runner: the artifact, open.
        layers: of the detector, as `inspect_layers` gives them.
        frames: (H, W, 3) uint8 RGB of the artifact's size; one is held at a time.
        split: where the frames are from, for the report.
        tolerance_steps: largest local difference that passes.
        max_unmatched: largest share of quantized layers that may be missing from the artifact.
        on_image: called after each frame.

    Raises:
        ParityError: no frame was given, or not one layer could be compared.
    """
    # The reference quantizes what the target does, neither more nor less.
    session = _Session(
        without_quantizers(quantized, [row.key for row in runner.artifact.unquantized]), runner
    )
    images = 0
    for frame in frames:
        session.add(frame)
        images += 1
        on_image()
    if not images:
        raise ParityError("no image to compare on: choose another --split, or more --parity-images.")
    declared = {row.key: row.reason for row in runner.artifact.unquantized}
    rows = tuple(_row(layer, session.tallies, declared, tolerance_steps) for layer in layers)
    if not any(row.values for row in rows):
        raise ParityError(
            f"not one layer of the {runner.artifact.target} artifact could be compared with the detector. "
            "The artifact was made from another detector: export again."
        )
    return ParityReport(
        target=runner.artifact.target,
        artifact_sha256=runner.artifact.sha256,
        images=images,
        split=split,
        tolerance_steps=tolerance_steps,
        layers=rows,
        recalls=session.recalls.results(),
        gates=tuple(
            msgspec.structs.replace(gate, subject=runner.artifact.target)
            for gate in _gates(rows, tolerance_steps, max_unmatched, session.probe_differs)
        ),
        rung=runner.rung,
        kernels=runner.kernel_set,
    )


def with_other_kernels(parity: ParityReport, *others: ParityReport) -> ParityReport:
    """Return a report that also says how other sets of kernels ran the same file; each is a gate of its own."""
    kept, gates = [], list(parity.gates)
    for other in others:
        compared = [row for row in other.layers if row.values]
        worst = max(compared, key=lambda row: (row.max_step or 0, (row.differing or 0) / row.values))
        found = next(one for one in other.recalls if (one.stage, one.against) == ("detections", "reference"))
        kept.append(
            KernelSetParity(
                kernels=other.kernels,
                layers=len(compared),
                values=sum(row.values for row in compared),
                differing=sum(row.differing or 0 for row in compared),
                max_step=worst.max_step or 0,
                culprit=worst.path,
                detections=found.boxes,
                detections_matched=found.matched,
            )
        )
        gates += [
            msgspec.structs.replace(gate, name=f"{gate.name}, {other.kernels.partition(',')[0]}")
            for gate in other.gates
            if gate.name == LAYER_GATE
        ]
    return msgspec.structs.replace(parity, others=tuple(kept), gates=tuple(gates))


@dataclass(slots=True)
class _Noise:
    """Sums for signal to noise and cosine between a reference and what was computed."""

    signal: float = 0.0
    noise: float = 0.0
    actual: float = 0.0
    product: float = 0.0

    def add(self, *, reference: Tensor, actual: Tensor) -> None:
        wanted, found = reference.double().flatten(), actual.double().flatten()
        self.signal += float(wanted @ wanted)
        self.noise += float((wanted - found).square().sum())
        self.actual += float(found @ found)
        self.product += float(wanted @ found)

    @property
    def sqnr_db(self) -> float | None:
        """Signal over noise in dB; None where the two are identical or there is no signal."""
        if self.noise == 0.0 or self.signal == 0.0:
            return None
        return 10 * math.log10(self.signal / self.noise)

    @property
    def cosine(self) -> float | None:
        norm = math.sqrt(self.signal * self.actual)
        return self.product / norm if norm else None


@dataclass(slots=True)
class _Tally:
    """What is kept of one quantized tensor over all images."""

    values: int = 0
    max_step: int = 0
    differing: int = 0
    mismatch: str = ""
    fp32: _Noise = field(default_factory=_Noise)
    reference: _Noise = field(default_factory=_Noise)


class _Session:
    """Streams frames through the runtime, the local reference and the two whole graphs."""

    def __init__(self, quantized: QuantizedDetector, runner: Runner) -> None:
        self._runner, self._quantized = runner, quantized
        self._local = LocalReference(quantized)
        self._sites = {site.key: site for site in runner.artifact.sites}
        self._tensors = [site.tensor for site in runner.artifact.sites]
        self._proposals_tensor = runner.artifact.float_sites[PROPOSALS]
        boxes = proposals_node(quantized.graph).name
        self._proposals = boxes
        nodes = quantized.quantize_nodes
        self._float_wanted = {argument_node(node).name: key for key, node in nodes.items()}
        self._codes_wanted = {node.name: key for key, node in nodes.items()}
        self.tallies = {key: _Tally() for key in nodes if key in self._sites}
        self.recalls = RecallCounter()
        self.probe_differs = 0

    def add(self, frame: NDArray[np.uint8]) -> None:
        """Compare on one frame."""
        array = self._runner.input_of(frame)
        plain = self._runner.run(array)
        probed = self._runner.run(array, [*self._tensors, self._proposals_tensor])
        self.probe_differs += any(not np.array_equal(plain[name], probed[name]) for name in plain)
        # The artifact may take the normalised image where the detector takes the frame.
        given = torch.from_numpy(input_of(frame, self._quantized.static.spec))
        proposals = torch.from_numpy(probed[self._proposals_tensor])
        codes = {
            key: torch.from_numpy(codes_of(site, probed[site.tensor])) for key, site in self._sites.items()
        }
        self._compare_locally(codes, given, proposals)
        self._compare_whole(codes, given, proposals)
        self._count_recalls(given, proposals, self._runner.detections(plain))

    def _compare_locally(self, codes: Mapping[str, Tensor], frame: Tensor, proposals: Tensor) -> None:
        for key, tally in self.tallies.items():
            expected = self._local.expected(key, codes, frame, proposals)
            actual = codes[key]
            if expected.shape != actual.shape:
                tally.mismatch = f"expected {tuple(expected.shape)}, found {tuple(actual.shape)}"
                continue
            steps = (expected.to(torch.int16) - actual.to(torch.int16)).abs()
            tally.values += steps.numel()
            tally.max_step = max(tally.max_step, int(steps.max()))
            tally.differing += int((steps > 0).sum())

    def _compare_whole(self, codes: Mapping[str, Tensor], frame: Tensor, proposals: Tensor) -> None:
        """Cumulative noise; all three box heads pool the runtime's proposals, so that rows are the same boxes."""
        pinned = {self._proposals: proposals}
        scales = {key: scale_of(node) for key, node in self._quantized.quantize_nodes.items()}
        for graph, wanted, name in (
            (self._quantized.float_graph, self._float_wanted, "fp32"),
            (self._quantized.graph, self._codes_wanted, "reference"),
        ):
            recorder = Recorder(graph, wanted, pinned)
            with torch.no_grad():
                recorder.run(frame)
            for key, tally in self.tallies.items():
                value = recorder.values[key]
                actual = codes[key].reshape(value.shape).float() * scales[key]
                wanted_value = value if name == "fp32" else value.float() * scales[key]
                getattr(tally, name).add(reference=wanted_value, actual=actual)

    def _count_recalls(self, frame: Tensor, proposals: Tensor, found: Detections) -> None:
        graphs: tuple[tuple[GraphModule, Against], ...] = (
            (self._quantized.float_graph, "fp32"),
            (self._quantized.graph, "reference"),
        )
        for graph, against in graphs:
            recorder = Recorder(graph, {self._proposals: PROPOSALS})
            with torch.no_grad():
                outputs = recorder.run(frame)
            self.recalls.add_proposals(against, wanted=recorder.values[PROPOSALS], found=proposals)
            self.recalls.add_detections(against, wanted=outputs, found=found)


def _row(
    layer: Layer, tallies: Mapping[str, _Tally], declared: Mapping[str, str], tolerance_steps: int
) -> LayerParity:
    key = f"{layer.path}@{layer.call}/output:{layer.op}"
    tally = tallies.get("preprocess@0/output:image" if layer.stage == "preprocess" else key)
    status: ParityStatus = "ok"
    reason = ""
    if tally is None or (not tally.values and not tally.mismatch):
        if key in declared:
            status, reason = "unquantized", declared[key]
        elif layer.quantized:
            status, reason = "unmatched", "the artifact does not say where this tensor is"
        else:
            status, reason = "float", layer.reason
        return LayerParity(
            order=layer.order, path=layer.path, call=layer.call, port="", stage=layer.stage, kind=layer.kind,
            shape=layer.shape, status=status, reason=reason,
        )  # fmt: skip
    if tally.mismatch:
        status, reason = "shape_mismatch", tally.mismatch
    elif tally.max_step > tolerance_steps:
        status, reason = "over_tolerance", f"{tally.max_step} steps, at most {tolerance_steps} allowed"
    return LayerParity(
        order=layer.order,
        path=layer.path,
        call=layer.call,
        port=f"output:{layer.op}",
        stage=layer.stage,
        kind=layer.kind,
        shape=layer.shape,
        status=status,
        reason=reason,
        values=tally.values,
        max_step=tally.max_step,
        differing=tally.differing,
        sqnr_fp32_db=tally.fp32.sqnr_db,
        sqnr_reference_db=tally.reference.sqnr_db,
        cosine_fp32=tally.fp32.cosine,
        cosine_reference=tally.reference.cosine,
    )


def _gates(
    rows: tuple[LayerParity, ...], tolerance_steps: int, max_unmatched: float, probe_differs: int
) -> tuple[Gate, ...]:
    compared = [row for row in rows if row.values]
    worst = max(compared, key=lambda row: (row.max_step or 0, (row.differing or 0) / row.values))
    broken = [row for row in rows if row.status in ("over_tolerance", "shape_mismatch")]
    quantized = [row for row in rows if row.status not in ("float", "unquantized")]
    unmatched = [row for row in rows if row.status == "unmatched"]
    share = len(unmatched) / len(quantized)
    return (
        Gate(
            name=LAYER_GATE,
            passed=not broken,
            measured=f"{worst.max_step} steps" if worst.max_step != 1 else "1 step",
            limit=f"at most {tolerance_steps} step" + ("s" if tolerance_steps != 1 else ""),
            culprit=(broken[0] if broken else worst).path,
        ),
        Gate(
            name="unmatched layers",
            passed=share <= max_unmatched,
            measured=f"{len(unmatched)} of {len(quantized)}",
            limit=f"at most {max_unmatched:.0%}",
            culprit=unmatched[0].path if unmatched else "",
        ),
        Gate(
            name="probing changes nothing",
            passed=not probe_differs,
            measured=f"{probe_differs} images differ",
            limit="0 images",
        ),
    )
