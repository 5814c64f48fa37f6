"""Golden frames: images of the run's own evaluation split, and what the artifact computes for them here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qexport.bundle import ARTIFACT, GoldenFrame
from qexport.dataset import load_dataset
from qexport.errors import DatasetError
from qexport.frames import read_sample
from qexport.golden import by_key, digest, save_arrays, save_frame, tensors_of
from qexport.run_folder import RunFolder
from qexport.runtimes.runner import OUTPUTS, Runner
from qexport.samples import Dataset, Sample
from qexport.subject import evaluation_split
from qexport.target import Target


def golden_samples(run: RunFolder, count: int) -> tuple[list[Sample], Dataset]:
    """Return images of the evaluation split at equal distances, those with objects where there are any.

    Raises:
        DatasetError: the data set is not there, or has fewer images.
    """
    settings = run.settings
    dataset = load_dataset(Path(settings.data), evaluation_split(settings), classes=settings.classes)
    useful = [sample for sample in dataset.samples if sample.boxes] or list(dataset.samples)
    if count < 1 or count > len(useful):
        raise DatasetError(
            f"{dataset.root}: {count} golden frames asked for; split {dataset.split!r} has {len(useful)} images, and "
            "at least one is needed."
        )
    return [useful[(2 * number + 1) * len(useful) // (2 * count)] for number in range(count)], dataset


def write_golden(
    target: Target, samples: Sequence[Sample], dataset: Dataset, folder: Path, on_step: Callable[[], None]
) -> tuple[GoldenFrame, ...]:
    """Run the frames through the artifact, as it lies in the bundle, and keep what it computes."""
    runner: type[Runner] = importlib.import_module(f"qexport.runtimes.{target.runtime}").RUNNER
    golden = []
    with runner(folder / ARTIFACT) as running:
        spec = running.artifact.input
        for number, sample in enumerate(samples):
            frame = read_sample(sample, (spec.frame_height_px, spec.frame_width_px)).pixels
            own = folder / "golden" / str(number)
            save_frame(frame, own / "frame.png")
            golden.append(
                _golden_frame(running, frame, own, folder, dataset.name_of(sample), whole=number == 0)
            )
            on_step()
    return tuple(golden)


def _golden_frame(
    running: Runner, frame: NDArray[np.uint8], own: Path, folder: Path, source: str, *, whole: bool
) -> GoldenFrame:
    array, sites = running.input_of(frame), running.artifact.sites
    outputs = running.run(array)
    inner = by_key(sites, running.run(array, tensors_of(sites)))
    save_arrays({name: outputs[name] for name in OUTPUTS}, own / "outputs.npz")
    if whole:
        save_arrays(inner, own / "sites.npz")
    place = own.relative_to(folder).as_posix()
    return GoldenFrame(
        source=source,
        frame=f"{place}/frame.png",
        outputs=f"{place}/outputs.npz",
        sites=f"{place}/sites.npz" if whole else None,
        digests={key: digest(tensor) for key, tensor in inner.items()},
        detections=len(running.detections(outputs)),
    )
