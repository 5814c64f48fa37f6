"""A fine-tune with fake quantization: from a float checkpoint and a data set to weights with their encodings.

    checkpoint ─ calibrate ─► start.json ─ train ─► checkpoint.pt, history.json ─ compare ─► qat.pt

Every epoch is measured on the validation split by the quantized reference, as a run measures it; the test split
is never looked at. The result enters `qexport run --qat`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

import qexport
from qexport.encodings import Encodings, load_encodings, save_encodings
from qexport.errors import GateFailed, QexportError, TargetUnavailable
from qexport.files import json_bytes
from qexport.frames import frame_size
from qexport.samples import Sample
from qexport.settings import Settings
from qexport.subject import Subject
from qexport.training_data import choose_images, choose_splits
from qexport.training_history import NOTE
from qexport.versions import is_importable
from qexport.work import Progress, require_torch, silent, used_versions

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor
    from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

    from qexport.benchmarks.detect import Detect
    from qexport.detectors.static import StaticDetector
    from qexport.training.agreement import Agreement
    from qexport.training.network import TrainingNetwork
    from qexport.training.settings import TrainingRecord, TrainingSettings
    from qexport.training_history import History, Measured


@dataclass(frozen=True, slots=True)
class FineTuned:
    """What a training came to.

    result: `qat.pt`.
    picture: its history, drawn.
    history: of all epochs.
    agreement: between the trained network and the quantized reference.
    frame_px: height and width of the frame that the encodings are for.
    """

    result: Path
    picture: Path
    history: History
    agreement: Agreement
    frame_px: tuple[int, int]


class FineTuning:
    """A fine-tune: the detector, its data, and the form in which it is trained.

    Args:
        settings: detector, data and calibration; `calibration_split` is the split to train on, `split` the one to
            validate on.
        training: how to train.
        progress: shown while stages run.

    Raises:
        TargetUnavailable: software or the device is missing.
        DatasetError: the data cannot be trained on.
    """

    def __init__(
        self, settings: Settings, training: TrainingSettings, *, progress: Progress = silent
    ) -> None:
        require_torch()
        _require_device(training.device)
        train, validation = choose_splits(settings)
        settings = msgspec.structs.replace(settings, calibration_split=train, split=validation or train)
        self.training, self._progress = training, progress
        self.subject = Subject(settings)
        self.data = choose_images(self.subject, training, validation)
        if settings.frame_px is None:  # of what is trained on: the test split is not looked at
            frame_px = frame_size(self.subject.calibration)
            self.subject.settings = msgspec.structs.replace(settings, frame_px=frame_px)
        if self.data.has_boxes and not is_importable("pycocotools"):
            raise TargetUnavailable(
                "mAP on the validation split needs pycocotools. Install: pip install 'qexport[all]'"
            )

    def run(
        self, out: Path, *, command: str = "", on_epoch: Callable[[History], None] = lambda _: None
    ) -> FineTuned:
        """Train, or take up the training in `out`, and write the result.

        Raises:
            RunFolderError: the folder cannot be used, or holds another training.
            GateFailed: training diverged; the best epoch before is written nevertheless.
            ExportError: the trained network and the quantized reference differ.
        """
        from qexport.quantization.reference import quantize  # noqa: PLC0415 - torch begins here
        from qexport.training import folder  # noqa: PLC0415
        from qexport.training.agreement import compare_codes  # noqa: PLC0415
        from qexport.training.curve import draw_history  # noqa: PLC0415
        from qexport.training.state import save_result  # noqa: PLC0415

        folder.require_free(out)
        folder.bind(out, self._record(command))
        network = self._network(out)
        history = self._train(out, network, on_epoch)
        network.cpu()
        state = self._state(network)
        static, encodings = self._applied(network, state, history)
        sample = self.data.validation.samples[0]
        agreement = compare_codes(network, quantize(static, encodings), next(self._inputs([sample])))
        agreement.require()
        height, width = self.subject.frame_px
        notes: dict[str, str | int | float] = {
            "detector": self.subject.settings.model,
            "dataset": self.data.validation.name,
            "frame": f"{height}x{width}",
            "epochs": len(history.epochs) - 1,
            "best epoch": history.best.epoch,
            "status": history.status,
            "validation": str(history.best.measured),
            "qexport": qexport.__version__,
            NOTE: json_bytes(history).decode(),
        }
        result = save_result(out / folder.RESULT, state, encodings, notes)
        picture = draw_history(history, out / "history.png")
        if history.status == "diverged":
            raise GateFailed(
                f"training diverged: {history.message}. {result} holds the best epoch, number {history.best.epoch} "
                f"({history.best.measured}). Train into another --out with a smaller --lr "
                f"(it was {self.training.learning_rate:g})."
            )
        return FineTuned(result, picture, history, agreement, self.subject.frame_px)

    @cached_property
    def _begun(self) -> StaticDetector:
        """The static detector before training, BatchNorm folded."""
        from qexport.quantization.fold import fold_batch_norm  # noqa: PLC0415 - torch begins here

        return fold_batch_norm(self.subject.static)

    @cached_property
    def _pairs(self) -> dict[str, str]:
        from qexport.quantization.fold import folded_pairs  # noqa: PLC0415 - torch begins here

        return folded_pairs(self.subject.static)

    @cached_property
    def _blank(self) -> GeneralizedRCNN:
        """The detector as its factory builds it: the trained weights are loaded into one that is like it."""
        from qexport.detectors.load import load_detector  # noqa: PLC0415 - torch begins here

        settings = self.subject.settings
        return load_detector(settings.model, None, seed=settings.seed).module

    def _network(self, out: Path) -> TrainingNetwork:
        """Return the network as training begins, on its device, with the scales of an ordinary calibration."""
        import torch  # noqa: PLC0415 - torch begins here

        from qexport.training.folder import START  # noqa: PLC0415
        from qexport.training.network import TrainingNetwork  # noqa: PLC0415

        if not (out / START).is_file():
            save_encodings(self._calibrate(), out / START)
        self._start = load_encodings(out / START)
        network = TrainingNetwork(self._begun, self._start)
        trained = _trained(self._begun, self.training.freeze)
        for name, weight in network.named_weights():
            weight.requires_grad_(name.rpartition(".")[0] in trained)
        return network.to(torch.device(self.training.device))

    def _calibrate(self) -> Encodings:
        from qexport.calibration.calibrator import calibrate  # noqa: PLC0415 - torch begins here

        settings = self.subject.settings
        samples = self.subject.calibration_samples()
        with self._progress("calibrate", len(samples)) as step:
            return calibrate(
                self.subject.static,
                self.subject.inputs(samples),
                observer=settings.observer,
                percentile=settings.percentile,
                weight_scales=settings.weight_scales,
                keep_float=settings.keep_float,
                on_image=step,
            )

    def _train(self, out: Path, network: TrainingNetwork, on_epoch: Callable[[History], None]) -> History:
        import torch  # noqa: PLC0415 - torch begins here

        from qexport.training.loop import Training  # noqa: PLC0415
        from qexport.training.losses import Losses  # noqa: PLC0415

        device = torch.device(self.training.device)
        training = Training(
            out,
            network,
            Losses(self.subject.loaded.module, self._begun, self.training, device),
            self.data.samples,
            self.subject.static.spec,
            self.training,
            seed=self.subject.settings.seed,
            measure=self._measure,
            progress=self._progress,
            on_epoch=on_epoch,
        )
        return training.run(self._measure_float)

    def _measure(self, network: TrainingNetwork) -> Measured:
        """Return the validation split as the quantized reference of the network sees it."""
        from qexport.benchmarks import detect  # noqa: PLC0415 - torch begins here
        from qexport.quantization.reference import quantize  # noqa: PLC0415

        if not self.data.has_boxes:
            return self._measure_distance(network)
        static, encodings = self._applied(network, self._state(network), None)
        return self._measure_map("validate", detect.reference(quantize(static, encodings)))

    def _measure_float(self) -> Measured:
        from qexport.benchmarks import detect  # noqa: PLC0415 - torch begins here
        from qexport.training_history import Measured  # noqa: PLC0415

        if not self.data.has_boxes:
            return Measured(distance=0.0)
        return self._measure_map("validate float", detect.eager(self.subject.loaded))

    def _measure_map(self, title: str, source: AbstractContextManager[Detect]) -> Measured:
        from qexport.benchmarks import detect  # noqa: PLC0415 - torch begins here
        from qexport.benchmarks.accuracy import mean_average_precisions  # noqa: PLC0415
        from qexport.training_history import Measured  # noqa: PLC0415

        dataset = self.data.validation
        with self._progress(title, len(dataset.samples)) as step, source as run:
            images = detect.over(dataset, self.subject.frame_px, run, on_image=step)
        voc, coco = mean_average_precisions(dataset, [detect.to_arrays(image) for image in images])
        return Measured(coco_map=coco, voc_map50=voc)

    def _measure_distance(self, network: TrainingNetwork) -> Measured:
        """Return the distance to the float detector on the validation images."""
        import torch  # noqa: PLC0415 - torch begins here

        from qexport.training.images import batches  # noqa: PLC0415
        from qexport.training.losses import Losses, total  # noqa: PLC0415
        from qexport.training_history import Measured  # noqa: PLC0415

        device = torch.device(self.training.device)
        losses = Losses(self.subject.loaded.module, self._begun, self.training, device)
        samples, found = self.data.validation.samples, []
        with self._progress("validate", len(samples)) as step, torch.no_grad():
            for batch in batches(samples, self.subject.static.spec, size=1):
                found.append(float(total(losses(network, batch.to(device)))))
                step()
        return Measured(distance=sum(found) / len(found))

    def _state(self, network: TrainingNetwork) -> dict[str, Tensor]:
        from qexport.training.state import trained_state  # noqa: PLC0415 - torch begins here

        return trained_state(self._blank, self._pairs, dict(network.named_weights()))

    def _applied(
        self, network: TrainingNetwork, state: dict[str, Tensor], history: History | None
    ) -> tuple[StaticDetector, Encodings]:
        """Return the static detector that a state gives, and the encodings that go with it."""
        from qexport.detectors.fingerprint import fingerprint  # noqa: PLC0415 - torch begins here
        from qexport.detectors.static import make_static  # noqa: PLC0415
        from qexport.training.state import with_state  # noqa: PLC0415

        settings = self.subject.settings
        static = make_static(
            with_state(self._blank, state),
            frame_px=self.subject.frame_px,
            proposals=settings.proposals,
            detections=settings.detections,
            preprocess=settings.preprocess,
        )
        encodings = network.encodings(self._start, fingerprint(static))
        if history is not None:
            origin = {**self._start.calibration, "qat_epochs": history.best.epoch}
            encodings = msgspec.structs.replace(encodings, calibration=origin)
        return static, encodings

    def _inputs(self, samples: list[Sample]) -> Iterator[NDArray[np.generic]]:
        return self.subject.inputs(samples)

    def _record(self, command: str) -> TrainingRecord:
        import torch  # noqa: PLC0415 - torch begins here

        from qexport.training.settings import TrainingRecord  # noqa: PLC0415

        return TrainingRecord(
            detector=self.subject.settings,
            training=self.training,
            weights_sha256=self.subject.loaded.weights_sha256,
            images_sha256=self.subject.calibration.sha256,
            validation_sha256=self.data.sha256,
            threads=torch.get_num_threads(),
            qexport_version=qexport.__version__,
            versions=used_versions(),
            command=command,
        )


def _require_device(device: str) -> None:
    import torch  # noqa: PLC0415 - torch begins here

    if device == "cuda" and not torch.cuda.is_available():
        raise TargetUnavailable(
            f"--device cuda: torch {torch.__version__} sees no CUDA device here. Train with --device cpu, or "
            "install a torch for CUDA and the driver: https://pytorch.org/get-started/locally/"
        )


def _trained(folded: StaticDetector, freeze: tuple[str, ...]) -> set[str]:
    """Return the paths of the layers whose weights are trained.

    Raises:
        QexportError: a path of `freeze` is no module's, or nothing is left.
    """
    from torch import nn  # noqa: PLC0415 - torch begins here

    paths = {name for name, module in folded.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    for frozen in freeze:
        below = {path for path in paths if path == frozen or path.startswith(f"{frozen}.")}
        if not below:
            raise QexportError(
                f"--freeze {frozen}: no layer with weights has this path or one below it. "
                "`qexport inspect` lists the layers by module path."
            )
        paths -= below
    if not paths:
        raise QexportError("--freeze leaves no layer to train. Freeze less.")
    return paths
