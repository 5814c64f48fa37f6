"""Epoch after epoch: train, measure, keep the best, write a checkpoint from which the next epoch can begin.

Everything random in an epoch is seeded by the seed and the epoch's number. A training that was killed goes on at
the last complete epoch, and comes to the same bits as one that was not (on a CPU, with as many threads).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from qexport.artifact import InputSpec
from qexport.errors import RunFolderError
from qexport.files import json_bytes, write_json
from qexport.samples import Sample
from qexport.training.folder import CHECKPOINT, load_checkpoint, save
from qexport.training.images import batches, order_of_epoch
from qexport.training.losses import Losses, total
from qexport.training.network import TrainingNetwork
from qexport.training.schedule import learning_rate
from qexport.training.settings import TrainingSettings
from qexport.training_history import HISTORY, EpochRecord, History, Measured

Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
"""Called with a title and a number of steps; gives what is called after each step."""
Measure = Callable[[TrainingNetwork], Measured]
_FLIPS = 1
"""Tells the random numbers of the flips from those of the order."""


class Training:
    """A training that is under way.

    Args:
        folder: where the checkpoint and the history go.
        network: in its state before the first step, on the device.
        losses: of a batch.
        samples: to train on.
        spec: of the static form.
        settings: how.
        seed: of everything random.
        measure: what an epoch came to, on the validation split.
        progress: shown while an epoch runs.
        on_epoch: called with each epoch's record.
    """

    def __init__(
        self,
        folder: Path,
        network: TrainingNetwork,
        losses: Losses,
        samples: Sequence[Sample],
        spec: InputSpec,
        settings: TrainingSettings,
        *,
        seed: int,
        measure: Measure,
        progress: Progress,
        on_epoch: Callable[[History], None],
    ) -> None:
        self._folder, self._network, self._losses = folder, network, losses
        self._samples, self._spec, self._settings, self._seed = samples, spec, settings, seed
        self._measure, self._progress, self._on_epoch = measure, progress, on_epoch
        self._device = torch.device(settings.device)
        self._weights = [weight for _, weight in network.named_weights() if weight.requires_grad]
        self._optimizer = torch.optim.SGD(
            self._weights,
            lr=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        images = min(len(samples), settings.images or len(samples))
        self._steps = math.ceil(images / settings.batch)
        self._best: dict[str, Tensor] = {}
        self.history = History()

    def run(self, measure_float: Callable[[], Measured]) -> History:
        """Train until the last epoch, until it gets no better, or until it diverges; the network is then the best.

        Args:
            measure_float: the float detector on the validation split, asked once.
        """
        kept = load_checkpoint(self._folder)
        if kept:
            self._take_up(kept)
        else:
            self.history = History(float_detector=measure_float())
            start = self._measure(self._network)
            self._note(0.0, {}, start, best=True)
        while self.history.status == "training":
            epoch = len(self.history.epochs)
            if epoch > self._settings.epochs:
                self._end("complete", f"all {self._settings.epochs} epochs")
                break
            cuda = range(torch.cuda.device_count()) if self._device.type == "cuda" else ()
            with torch.random.fork_rng(devices=cuda):  # the caller's random numbers stay as they are
                torch.manual_seed(int(np.random.SeedSequence([self._seed, epoch]).generate_state(1)[0]))
                losses, rate = self._train(epoch)
            bad = [f"{name} is {value}" for name, value in losses.items() if not math.isfinite(value)]
            if bad:
                self._end("diverged", f"in epoch {epoch} {', '.join(bad)}")
                break
            self._judge(rate, losses, self._measure(self._network))
        self._network.restore(self._best)
        return self.history

    def _train(self, epoch: int) -> tuple[dict[str, float], float]:
        """Train one epoch; return the mean of each loss, and the last learning rate."""
        settings, network = self._settings, self._network
        samples = order_of_epoch(self._samples, epoch, images=settings.images, seed=self._seed)
        random = np.random.default_rng([self._seed, epoch, _FLIPS])
        flips = random.random(len(samples)) < 0.5 if settings.flip else None
        sums: dict[str, float] = {}
        rate = 0.0
        first = (epoch - 1) * self._steps
        with self._progress(f"epoch {epoch}/{settings.epochs}", self._steps) as step:
            for index, batch in enumerate(batches(samples, self._spec, size=settings.batch, flips=flips)):
                follows = first + index < settings.freeze_observers_after * self._steps
                if follows != network.observing:
                    network.observe(follows)
                rate = learning_rate(
                    first + index,
                    steps=self._steps * settings.epochs,
                    peak=settings.learning_rate,
                    warm_up=settings.warm_up,
                )
                parts = self._losses(network, batch.to(self._device))
                values = {name: float(part.detach()) for name, part in parts.items()}
                if not all(math.isfinite(value) for value in values.values()):
                    return values, rate
                norm = self._step(total(parts), rate)
                if not math.isfinite(norm):
                    return {**values, "norm of the gradient": norm}, rate
                for name, value in values.items():
                    sums[name] = sums.get(name, 0.0) + value
                step()
        return {name: value / self._steps for name, value in sums.items()}, rate

    def _step(self, loss: Tensor, rate: float) -> float:
        """Make one step, unless the gradient is not finite; return the norm of the gradient before it is clipped."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(nn.utils.clip_grad_norm_(self._weights, self._settings.clip_norm))
        if math.isfinite(norm):
            self._optimizer.step()
            self._network.follow(self._settings.observer_momentum)
        return norm

    def _judge(self, rate: float, losses: dict[str, float], measured: Measured) -> None:
        """Note an epoch, and decide whether there is another one."""
        history, settings = self.history, self._settings
        start = history.epochs[0].measured
        best = measured.score > history.best.measured.score
        fallen = measured.has_fallen(start, settings.max_fall)
        number = len(history.epochs)
        without = number - (number if best else history.best.epoch)
        if fallen:
            said = f"epoch {number} has {measured}; it began with {start}"
            self._end("diverged", said, save_now=False)
        elif number == settings.epochs:
            self._end("complete", f"all {number} epochs", save_now=False)
        elif without >= settings.patience:
            said = f"{without} epochs brought nothing better"
            self._end("stopped early", said, save_now=False)
        self._note(rate, losses, measured, best=best)

    def _note(self, rate: float, losses: dict[str, float], measured: Measured, *, best: bool) -> None:
        epochs = self.history.epochs
        record = EpochRecord(
            epoch=len(epochs),
            steps=len(epochs) * self._steps,
            learning_rate=rate,
            losses=losses,
            scales_follow=self._network.observing,
            measured=measured,
            best=best,
        )
        if best:
            self._best = self._network.snapshot()
        self.history = msgspec.structs.replace(self.history, epochs=(*epochs, record))
        self._save()
        self._on_epoch(self.history)

    def _end(self, status: str, message: str, *, save_now: bool = True) -> None:
        self.history = msgspec.convert(
            {**msgspec.to_builtins(self.history), "status": status, "message": message}, History
        )
        if save_now:
            self._save()

    def _save(self) -> None:
        save(
            self._folder / CHECKPOINT,
            {
                "network": self._network.snapshot(),
                "optimizer": self._optimizer.state_dict(),
                "best": self._best,
                "history": json_bytes(self.history).decode(),
            },
        )
        write_json(self._folder / HISTORY, self.history)

    def _take_up(self, kept: dict[str, Any]) -> None:
        try:
            self.history = msgspec.json.decode(kept["history"], type=History)
            self._network.restore(kept["network"])
            self._optimizer.load_state_dict(kept["optimizer"])
            self._best = kept["best"]
        except (KeyError, ValueError, msgspec.DecodeError) as error:
            raise RunFolderError(
                f"{self._folder / CHECKPOINT}: not a checkpoint of this training ({error}). "
                "Delete the folder and train again."
            ) from error
        write_json(self._folder / HISTORY, self.history)
