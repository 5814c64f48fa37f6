"""Which layers cost the accuracy, and the fastest configuration inside a budget of it.

    RUN/sensitivity.json                 noise of every stage and unit, the points, the choice
    RUN/sensitivity/float.json           what the float detector detects on the split
    RUN/sensitivity/points/DIGEST.json   one configuration's accuracy, named after all that decides it
    RUN/sensitivity/encodings.json       the table of the chosen configuration

A configuration that was measured once is never measured again, in whatever run of the command.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qexport.dataset import require_boxes, splits_of
from qexport.encodings import save_encodings
from qexport.errors import QexportError, RunFolderError
from qexport.files import read_json, sha256_json, write_json
from qexport.results import DetectionsRecord, Gate, ImageDetections, Interval, LatencyProfile
from qexport.samples import Dataset
from qexport.sensitivity_results import Grain, Point, SensitivityReport
from qexport.work import Work

if TYPE_CHECKING:
    from qexport.benchmarks.sensitivity import Unit
    from qexport.benchmarks.trade_off import Search

FOLDER = "sensitivity"
REPORT = "sensitivity.json"
ORDER_IMAGES = 8
"""Images that decide the order in which units become float."""
_SPLITS = ("val", "valid", "validation")


def measure_sensitivity(
    work: Work,
    *,
    target: str | None,
    grain: Grain,
    split: str | None,
    max_drop: float | None,
    below_noise: bool = False,
) -> SensitivityReport:
    """Measure what each unit costs; with a budget, find the fastest configuration inside it.

    Args:
        work: the run.
        target: whose measured latency predicts that of a configuration; None: multiply-accumulates stand for it.
        grain: what is made float at a time.
        split: that mAP is measured on; None: a validation split where there is one, else the run's own.
        max_drop: the budget, as a fraction of mAP; None: none.
        below_noise: search even where the split cannot tell such a drop from noise.

    Raises:
        QexportError: the split cannot measure the budget, or there is no such split.
        RunFolderError: the run has no encodings yet.
    """
    from qexport.benchmarks.sensitivity import make_units, measure_noise  # noqa: PLC0415 - torch begins here

    measuring = Measuring(work, target=target, grain=grain, split=split)
    dataset, quantized, partly = measuring.dataset, work.quantized, measuring.partly
    units, stages = measuring.units, make_units(work.subject.layers, "stage")
    samples = work.subject.parity_samples()
    with work.progress("noise of each unit", len(samples) * (len(units) + len(stages))) as step:
        by_stage, whole_db = measure_noise(
            quantized, partly, stages, work.subject.inputs(samples), on_unit=step
        )
        by_unit, _ = measure_noise(quantized, partly, units, work.subject.inputs(samples), on_unit=step)
    first = measuring.point(())
    smallest = _half_width(first)
    found = _search(work, measuring, max_drop, smallest, below_noise=below_noise)
    report = SensitivityReport(
        encodings_sha256=sha256_json(work.encodings),
        target=measuring.profile.target if measuring.profile else "",
        grain=grain,
        noise_images=len(samples),
        dataset=dataset.name,
        dataset_sha256=dataset.sha256,
        split=dataset.split,
        images=len(dataset.samples),
        whole_db=whole_db,
        stages=by_stage,
        units=by_unit,
        points=found.points if found else (first,),
        max_drop=max_drop,
        smallest_budget=smallest,
        chosen=found.chosen if found else None,
        gates=_gates(found, max_drop),
    )
    if found and found.chosen is not None:
        chosen = partly.encodings_with(work.encodings, found.points[found.chosen].keep_float)
        save_encodings(chosen, work.path / FOLDER / "encodings.json")
    write_json(work.path / REPORT, report)
    return report


class Measuring:
    """Measures the accuracy of configurations, each once.

    Args:
        work: the run.
        target: whose measured latency predicts that of a configuration; None: multiply-accumulates stand for it.
        grain: what is made float at a time.
        split: that mAP is measured on; None: a validation split where there is one, else the run's own.

    Raises:
        QexportError: there is no such split.
        RunFolderError: the target was not timed.
    """

    def __init__(self, work: Work, *, target: str | None, grain: Grain, split: str | None) -> None:
        from qexport.benchmarks.sensitivity import make_units  # noqa: PLC0415 - torch begins here
        from qexport.quantization.partial import PartlyQuantized  # noqa: PLC0415

        self._work, self.grain = work, grain
        self.dataset, self.profile = _dataset(work, split), _profile(work, target)
        self.partly = PartlyQuantized(work.quantized)
        self.units = make_units(work.subject.layers, grain)
        self.costs = _costs(self.units, self.profile)
        layers = [layer for layer in work.subject.layers if layer.parameters]
        self._parameters = {layer.path: layer.parameters for layer in layers}
        self._int8 = {layer.path for layer in layers if layer.quantized}
        self._macs = sum(layer.macs for layer in work.subject.layers)

    def point(self, floats: Sequence[Unit]) -> Point:
        """Return the accuracy with these units in float."""
        patterns = tuple(pattern for unit in self.units if unit in floats for pattern in unit.patterns)
        encodings = sha256_json(self._work.encodings)
        identity = [
            encodings,
            patterns,
            self.dataset.sha256,
            self._work.settings.seed,
            self._cost_identity(),
        ]
        path = self._work.path / FOLDER / "points" / f"{sha256_json(identity)[:16]}.json"
        if not path.is_file():
            write_json(path, self._measure(patterns, floats))
        return read_json(path, Point, RunFolderError)

    def _cost_identity(self) -> str:
        return self.profile.artifact_sha256 if self.profile else ""

    def _measure(self, patterns: tuple[str, ...], floats: Sequence[Unit]) -> Point:
        from qexport.benchmarks.accuracy import evaluate  # noqa: PLC0415 - torch begins here
        from qexport.benchmarks.detect import to_arrays  # noqa: PLC0415

        title = f"mAP, {len(floats)} of {len(self.units)} float" if floats else "mAP, all int8"
        keys = self.partly.keys_with((*self._work.encodings.keep_float, *patterns))[0]
        found = self._detect(title, keys)
        subjects = {"float": self._float(), "configuration": found}
        arrays = {name: [to_arrays(image) for image in images] for name, images in subjects.items()}
        seed = self._work.settings.seed
        accuracy = evaluate(self.dataset, arrays, seed=seed, max_drop=1.0, baseline="float")
        base, mine = accuracy.subjects
        assert (
            mine.voc_drop_interval is not None and mine.coco_drop_interval is not None
        )  # of every but the baseline
        names = {unit.name for unit in floats}
        added = sum(self.costs[name] for name in names)
        stored = self._int8 - {path for unit in floats for path in unit.paths}
        return Point(
            keep_float=patterns,
            units=len(floats),
            voc_map50=mine.voc_map50,
            coco_map=mine.coco_map,
            voc_drop=base.voc_map50 - mine.voc_map50,
            coco_drop=base.coco_map - mine.coco_map,
            voc_drop_interval=_negated(mine.voc_drop_interval),
            coco_drop_interval=_negated(mine.coco_drop_interval),
            float_macs=sum(unit.macs for unit in floats) / self._macs,
            weight_bytes=sum(
                count * (1 if path in stored else 4) for path, count in self._parameters.items()
            ),
            latency_ms=self.profile.whole["artifact"].p50_ms + added if self.profile else None,
        )

    def _float(self) -> tuple[ImageDetections, ...]:
        path = self._work.path / FOLDER / f"float-{self.dataset.sha256[:16]}.json"
        if not path.is_file():
            found = self._detect("mAP, float", frozenset())
            write_json(path, DetectionsRecord(subjects={"float": found}))
        return read_json(path, DetectionsRecord, RunFolderError).subjects["float"]

    def _detect(self, title: str, keys: Collection[str]) -> tuple[ImageDetections, ...]:
        from qexport.benchmarks import detect  # noqa: PLC0415 - torch begins here

        spec = self._work.quantized.static.spec
        with (
            self._work.progress(title, len(self.dataset.samples)) as step,
            detect.partly(self.partly, keys, spec) as run,
        ):
            return detect.over(self.dataset, self._work.subject.frame_px, run, on_image=step)


def _search(
    work: Work,
    measuring: Measuring,
    max_drop: float | None,
    smallest: float,
    *,
    below_noise: bool,
) -> Search | None:
    from qexport.benchmarks.sensitivity import make_units  # noqa: PLC0415 - torch begins here
    from qexport.benchmarks.trade_off import order_units, search  # noqa: PLC0415

    if max_drop is None:
        return None
    if max_drop < smallest and not below_noise:
        raise QexportError(
            f"--max-drop {100 * max_drop:g}: on this split the difference between int8 and float is known to "
            f"{100 * smallest:.2f} points only (95 % paired bootstrap), so that a budget below it is noise. Give "
            f"{100 * smallest:.2f} or more, a larger --split, or --below-noise to search all the same."
        )
    samples = work.subject.parity_samples()[:ORDER_IMAGES]
    units = measuring.units
    # A layer alone gains little in float while its neighbours are int8: layers follow one another block by block.
    groups = make_units(work.subject.layers, "block") if measuring.grain == "layer" else units
    costs = _costs(groups, measuring.profile)
    with work.progress("order of the units", len(groups)) as step:
        frames = list(work.subject.inputs(samples))
        order = order_units(work.quantized, measuring.partly, groups, frames, costs, on_step=step)
    if groups is not units:
        order = tuple(unit for group in order for unit in units if unit.paths[0] in group.paths)
    return search(order, measuring.costs, measuring.point, max_drop=max_drop)


def _dataset(work: Work, split: str | None) -> Dataset:
    """Return the images that mAP is measured on."""
    there = splits_of(Path(work.settings.data))
    name = split or next((each for each in _SPLITS if each in there), None)
    if name is None or name == work.settings.split:
        return work.subject.evaluation
    dataset = work.subject.split(name)
    require_boxes(dataset)
    return dataset


def _profile(work: Work, target: str | None) -> LatencyProfile | None:
    if target is None:
        return None
    path = work.folder.require(f"{target}/latency.json", f"qexport bench {work.path} --target {target}")
    return read_json(path, LatencyProfile, RunFolderError)


def _costs(units: Sequence[Unit], profile: LatencyProfile | None) -> Mapping[str, float]:
    """Return what a unit costs in float: ms where a target was timed, else multiply-accumulates."""
    if profile is None:
        return {unit.name: float(max(unit.macs, 1)) for unit in units}
    gained = {row.path: row.fp32_ms - row.artifact_ms for row in profile.layers if row.fp32_ms is not None}
    # A layer that was not faster in int8 costs next to nothing in float.
    return {unit.name: max(sum(gained.get(path, 0.0) for path in unit.paths), 1e-3) for unit in units}


def _gates(found: Search | None, max_drop: float | None) -> tuple[Gate, ...]:
    if found is None or max_drop is None:
        return ()
    nearest = min(found.points, key=lambda point: point.drop)
    point = found.points[found.chosen] if found.chosen is not None else nearest
    return (
        Gate(
            name="accuracy budget",
            passed=found.chosen is not None,
            measured=f"{100 * point.drop:.2f} points with {point.units} units in float",
            limit=f"at most {100 * max_drop:g} points",
            subject="sensitivity",
        ),
    )


def _half_width(point: Point) -> float:
    return max(
        (interval.high - interval.low) / 2 for interval in (point.voc_drop_interval, point.coco_drop_interval)
    )


def _negated(interval: Interval) -> Interval:
    return Interval(low=-interval.high, high=-interval.low, level=interval.level)
