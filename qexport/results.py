"""What the measurements say: parity, latency, accuracy, complexity. Frozen values that save as JSON.

Nothing that is measured in time stands in ParityReport, AccuracyReport, ProposalCurve or Complexity: times live in
LatencyProfile and ProposalLatency alone, so everything else is the same from run to run, byte for byte.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from qexport.artifact import Rung
from qexport.layers import Kind, Stage

ParityStatus = Literal["ok", "over_tolerance", "shape_mismatch", "unmatched", "unquantized", "float"]
MeasuredOn = Literal["host", "emulated", "device"]


class _Result(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base: frozen, named fields, unknown fields refused."""


class Gate(_Result, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One promise, and whether the measurement keeps it."""

    name: str
    """`layer parity`, `unmatched layers`, `VOC mAP drop`, ..."""
    passed: bool
    measured: str
    """The measured value as text with its unit, `1 step`."""
    limit: str
    """What was asked, `at most 1 step`."""
    culprit: str = ""
    """Module path of the worst layer, where there is one."""
    subject: str = ""
    """Whose gate it is: a target's name, or `reference`."""


class LayerParity(_Result, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One layer: what the runtime computed against what it should have."""

    order: int
    path: str
    call: int
    port: str
    """`output:conv2d`; empty for a layer that is float on purpose."""
    stage: Stage
    kind: Kind
    shape: tuple[int, ...]
    status: ParityStatus
    reason: str
    """Why it is float, or what is wrong; empty for `ok`."""
    values: int = 0
    """Values compared over all images."""
    max_step: int | None = None
    """Local, teacher-forced: the largest difference in quantization steps."""
    differing: int | None = None
    """Local: how many values differ."""
    sqnr_fp32_db: float | None = None
    """Cumulative: signal to quantization noise against the float detector, dB."""
    sqnr_reference_db: float | None = None
    """Cumulative: the same against the quantized reference; None where the two are identical."""
    cosine_fp32: float | None = None
    cosine_reference: float | None = None

    @property
    def failed(self) -> bool:
        """Whether it breaks the promise of parity: a wrong value, or one that could not be looked at."""
        return self.status in ("over_tolerance", "shape_mismatch", "unmatched")


class StageRecall(_Result, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How much of one detector's boxes the other also has, at one stage."""

    stage: Literal["proposals", "detections"]
    against: Literal["fp32", "reference"]
    boxes: int
    """Boxes of the side that is compared against, over all images."""
    matched: int
    """How many of them the artifact has too (IoU of at least `iou`, and the same class for detections)."""
    iou: float
    max_score_difference: float | None = None


class KernelSetParity(_Result, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The same file run by another set of kernels of the same runtime, against the same reference."""

    kernels: str
    """Which, in the runtime's words."""
    layers: int
    """That were compared, locally."""
    values: int
    differing: int
    max_step: int
    culprit: str
    """Module path of the layer with the largest difference."""
    detections: int
    """Of the reference, over all images."""
    detections_matched: int


class ParityReport(_Result, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The three questions of parity, for one target."""

    target: str
    artifact_sha256: str
    images: int
    split: str
    tolerance_steps: int
    layers: tuple[LayerParity, ...]
    recalls: tuple[StageRecall, ...]
    gates: tuple[Gate, ...]
    rung: Rung = "run"
    """What the comparison stands on: the runtime, or its builder's network evaluated where no device is."""
    kernels: str = ""
    """Which kernels ran, where the runtime has several sets of them."""
    others: tuple[KernelSetParity, ...] = ()
    """The other sets."""


class LatencyStats(_Result, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Statistics of repeated runs, milliseconds."""

    runs: int
    mean_ms: float
    std_ms: float
    min_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float


class Machine(_Result, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where a figure was measured."""

    measured_on: MeasuredOn
    system: str
    processor: str
    cores: int
    versions: dict[str, str]
    clock_mhz: float | None = None
    temperature_c: float | None = None


class LayerLatency(_Result, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One module path: its time in the artifact and in the baselines. Medians, milliseconds."""

    order: int
    path: str
    stage: Stage
    kind: Kind
    kernels: tuple[str, ...]
    """The runtime's kernels that belong to this path, `QLinearConv`."""
    artifact_ms: float
    eager_ms: float | None = None
    """PyTorch eager fp32, the module's own time (its children are rows of their own)."""
    fp32_ms: float | None = None
    """The same runtime, float32."""
    reduction_percent: float | None = None
    """100 * (1 - artifact / eager)."""


class LatencyProfile(_Result, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Latency of one target, whole and per module path, with its baselines run side by side."""

    target: str
    artifact_sha256: str
    machine: Machine
    threads: int
    warmup: int
    measured_at: str
    """UTC, ISO 8601."""
    whole: dict[str, LatencyStats]
    """Interleaved runs, frame in to boxes out: `artifact`, `eager`, `fp32`."""
    fps: float
    layers: tuple[LayerLatency, ...]
    profiled_whole_ms: float
    """Median of a whole run while profiling, less what the profiler itself takes between kernels: what the
    layers must add up to."""
    accounted_share: float
    """Sum of the layers over that whole, run by run; the median."""
    gates: tuple[Gate, ...]


class ClassAccuracy(_Result, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One class; values in 0..1, None where the split has no object of it."""

    label: str
    objects: int
    voc_ap50: float | None
    """Pascal VOC AP at IoU 0.5, area under all points."""
    voc_ap50_11point: float | None
    coco_ap: float | None
    """COCO AP, mean over IoU 0.50:0.05:0.95."""
    coco_ap50: float | None
    precision: tuple[float, ...]
    """VOC precision/recall curve at IoU 0.5, at most 101 points, recall ascending."""
    recall: tuple[float, ...]


class Interval(_Result, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A bootstrap confidence interval."""

    low: float
    high: float
    level: float
    """0.95."""


class Accuracy(_Result, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One subject (eager, reference or a target) on one split; values in 0..1."""

    subject: str
    """`eager`, `reference`, or the target's name."""
    voc_map50: float
    voc_map50_11point: float
    coco_map: float
    coco_map50: float
    coco_map75: float
    coco_map_small: float | None
    coco_map_medium: float | None
    coco_map_large: float | None
    voc_map50_interval: Interval
    """Bootstrap over images."""
    coco_map_interval: Interval
    voc_drop_interval: Interval | None
    """Paired bootstrap of this subject's VOC mAP minus eager's; None for eager."""
    coco_drop_interval: Interval | None
    classes: tuple[ClassAccuracy, ...]


class AccuracyReport(_Result, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Accuracy before and after, on one split."""

    dataset: str
    dataset_sha256: str
    split: str
    images: int
    objects: int
    dropped_boxes: int
    subjects: tuple[Accuracy, ...]
    gates: tuple[Gate, ...]


class ProposalPoint(_Result, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The detector with one number of proposals, all else equal; accuracy in 0..1."""

    proposals: int
    artifact_sha256: str
    int8_bytes: int
    """Size of the artifact's int8 file."""
    macs: int
    """Multiply-accumulates of one frame."""
    voc_map50: float
    coco_map: float
    voc_map50_interval: Interval
    coco_map_interval: Interval
    voc_change_interval: Interval | None
    """Paired bootstrap of VOC mAP minus that with the run's own number; None for that number itself."""
    coco_change_interval: Interval | None
    gates: tuple[Gate, ...]
    """Of its parity: each point is compared with its references as the run's own artifact is."""


class ProposalCurve(_Result, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Accuracy of one target over the number of proposals: same weights, same encodings, same images."""

    target: str
    artifact_sha256: str
    """Of the run's own artifact, which is one of the points."""
    encodings_sha256: str
    """Digest of the one table that every point's artifact was made of."""
    own_proposals: int
    """The run's own number, which the table was calibrated with and the changes are taken from."""
    dataset: str
    dataset_sha256: str
    split: str
    images: int
    points: tuple[ProposalPoint, ...]
    """Most proposals first."""
    rung: Rung
    """What the accuracy stands on."""


class ProposalTime(_Result, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Latency of one point of a ProposalCurve."""

    proposals: int
    artifact_sha256: str
    stats: LatencyStats


class ProposalLatency(_Result, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Latency of a ProposalCurve's points: run in turns, in one process, on one frame."""

    target: str
    machine: Machine
    threads: int
    warmup: int
    measured_at: str
    """UTC, ISO 8601."""
    points: tuple[ProposalTime, ...]
    """Most proposals first."""


class Complexity(_Result, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How large a detector is, before and after."""

    parameters: int
    macs: int
    average_sparsity: float
    """Share of weights that are exactly zero, float detector."""
    average_sparsity_quantized: float
    """Share of int8 weight codes that are zero."""
    float_bytes: int
    """Size on disk of the float32 artifact of the same target."""
    artifact_bytes: int


class MemoryUse(_Result, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Peak resident memory of a fresh process that ran one inference, bytes. Varies a little from run to run."""

    subject: str
    peak_bytes: int


class ImageDetections(_Result, frozen=True):
    """What one subject says of one image, best first."""

    image: str
    """Path relative to the dataset's root, with `/`."""
    boxes: tuple[tuple[float, float, float, float], ...]
    """xyxy, pixels of the original image."""
    scores: tuple[float, ...]
    labels: tuple[int, ...]
    """1 and above, an index into the detector's labels."""


class DetectionsRecord(_Result, frozen=True):
    """`detections.json`: the detections behind the accuracy, for the pictures of the report."""

    subjects: dict[str, tuple[ImageDetections, ...]]
    """By subject: `eager`, `reference`, or the target's name."""
